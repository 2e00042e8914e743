"""Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities (Dutt et al.,
2025).

Lab 310. A trained text mixture learns tokens of a second kind: `PartialLoRA`, low-rank updates that
only tokens of the new kind pass through, put on attention, on the routers and on the experts that
text leaves idle; and `gromov_wasserstein`, the coupling that new embeddings start from. `grow_`
does all of it to a `GPT`. Text logits stay what they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts import statistics
from lablib.experts.moe import Experts, SwiGLUExperts, moe_layers, recorded
from lablib.experts.routing import Assignments, TokenChoice
from lablib.kernels import moe_mlp
from lablib.models import GPT
from lablib.training import evaluate


class PartialLoRA(nn.Module):
    """A linear layer whose new tokens also take a low-rank path: (..., in) -> (..., out).

    base: the trained layer, frozen. rank: of the update. `new` says which tokens are of the new
    kind, (...) bool; `tell_new_tokens` sets it before each call of the model.
    """

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(
            torch.empty(rank, base.in_features).normal_(0, base.in_features**-0.5)
        )
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.new: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # W x, for all tokens
        # W x + B A x, for tokens of the new kind alone.
        return torch.where(self.new[..., None], y + F.linear(F.linear(x, self.A), self.B), y)


class PartialExperts(Experts):
    """SwiGLU experts of which some have low-rank updates, which only new tokens pass through.

    base: the trained experts, frozen. adapted: (k,) int64, which have updates.
    """

    def __init__(self, base: SwiGLUExperts, adapted: Tensor, rank: int):
        super().__init__(base.n_experts)
        self.base = base.requires_grad_(False)
        self.register_buffer("adapted", adapted)
        for name, weight in (("gate_up", base.gate_up), ("down", base.down)):
            n, out, into = len(adapted), *weight.shape[1:]
            self.register_parameter(
                f"{name}_A", nn.Parameter(torch.randn(n, rank, into) * into**-0.5)
            )
            self.register_parameter(f"{name}_B", nn.Parameter(torch.zeros(n, out, rank)))
        self.new: Tensor | None = None

    def updated(self, name: str) -> Tensor:
        """The experts' weights as new tokens see them: (n_experts, out, in)."""
        weight = getattr(self.base, name)
        update = getattr(self, f"{name}_B") @ getattr(self, f"{name}_A")  # (k, out, in)
        return weight.index_add(0, self.adapted, update)

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        new = self.new.flatten()
        old_rows, new_rows = (_only(assigned, kind, self.n_experts) for kind in (~new, new))
        y = self.base.mix(x, old_rows)
        if not new.any():
            return y
        token, weight, counts = new_rows
        weights = self.updated("gate_up"), self.updated("down")
        return y + moe_mlp(x, token, weight, *weights, counts, "swiglu")


def _only(assigned: Assignments, wanted: Tensor, n_experts: int) -> Assignments:
    """The rows of the wanted tokens, (tokens,) bool, still sorted by expert."""
    keep = wanted[assigned.token]  # (rows,)
    expert = torch.arange(n_experts, device=keep.device).repeat_interleave(assigned.counts)
    counts = expert[keep].bincount(minlength=n_experts)
    return Assignments(assigned.token[keep], assigned.weight[keep], counts)


class PartialChoice(TokenChoice):
    """A token-choice router with an update of its rows that only new tokens see."""

    @classmethod
    def of(cls, router: TokenChoice) -> PartialChoice:
        """The same router, its weights frozen, with an update that starts at 0."""
        made = cls(router.weight.shape[1], router.n_experts, router.top_k, router.softmax)
        made.weight = nn.Parameter(router.weight.detach().clone(), requires_grad=False)
        made.update = nn.Parameter(torch.zeros_like(router.weight))
        made.new = None
        return made

    def logits(self, x: Tensor) -> Tensor:
        """x: (tokens, dim) -> (tokens, n_experts), float32."""
        logits = super().logits(x)
        return torch.where(self.new.flatten()[:, None], logits + F.linear(x, self.update), logits)


class GrownEmbedding(nn.Module):
    """Trained embeddings, frozen, and rows for new tokens: (...) int64 -> (..., dim)."""

    def __init__(self, old: nn.Embedding, new: Tensor):
        super().__init__()
        self.old = old.requires_grad_(False)
        self.rows = nn.Parameter(new.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, torch.cat([self.old.weight, self.rows]))


class GrownHead(nn.Module):
    """Logits of old and new tokens, tied to the embedding: (..., dim) -> (..., vocab + new)."""

    def __init__(self, embedding: GrownEmbedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        # Two products, not one of all rows: sums of other shapes round otherwise.
        return torch.cat(
            [F.linear(x, self.embedding.old.weight), F.linear(x, self.embedding.rows)], -1
        )


def grow_(
    model: GPT,
    rows: Tensor,
    adapted: Sequence[Tensor],
    rank: int = 4,
    attention: bool = True,
) -> GPT:
    """Let a tied `GPT` of MoE layers learn new tokens beside its own, in place. Returns model.

    rows: (new, dim), embeddings of the new tokens, whose ids follow the old ones. adapted: for each
    block which experts get updates, (k,) int64. rank: of all updates. attention: whether its
    projections get updates, too. Only what is new has gradients.
    Raises ValueError for a model that is not tied, or has another number of MoE layers.
    """
    layers = moe_layers(model)
    if model.head.weight is not model.embedding.weight:
        raise ValueError("the head must be tied to the embedding")
    if len(layers) != len(adapted):
        raise ValueError(f"{len(adapted)} lists of experts for {len(layers)} MoE layers")
    model.requires_grad_(False)
    model.embedding = GrownEmbedding(model.embedding, rows)
    model.head = GrownHead(model.embedding)
    for layer, experts in zip(layers.values(), adapted):
        layer.router = PartialChoice.of(layer.router)
        layer.experts = PartialExperts(layer.experts, experts, rank)
    if attention:
        for block in model.blocks:
            for role in ("query", "key", "value", "output"):
                setattr(block.attention, role, PartialLoRA(getattr(block.attention, role), rank))
    tell_new_tokens(model, model.config.vocab_size)
    return model


def tell_new_tokens(model: nn.Module, first: int) -> None:
    """From now on each call tells the model's parts which tokens are new: ids from `first` on."""

    def tell(module: nn.Module, arguments: tuple, named: dict) -> None:
        new = (arguments[0] if arguments else named["tokens"]) >= first
        for part in module.modules():
            if isinstance(part, (PartialLoRA, PartialExperts, PartialChoice)):
                part.new = new

    model.register_forward_pre_hook(tell, with_kwargs=True)


@torch.no_grad()
def text_loads(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Each MoE layer's share of assignments by expert, on text: (n_experts,) each."""
    with recorded(model) as records:
        evaluate(model, batches)
    chosen = [torch.cat([record.experts for record in layer]) for layer in records.values()]
    sizes = [layer.router.n_experts for layer in moe_layers(model).values()]
    return [statistics.load(experts, n) for experts, n in zip(chosen, sizes)]


def least_used(load: Tensor, count: int) -> Tensor:
    """The `count` experts that text uses least, in order of their numbers: (count,) int64."""
    return load.argsort(stable=True)[:count].sort().values


def distances(x: Tensor) -> Tensor:
    """Euclidean distances between rows, divided by the largest: (n, dim) -> (n, n)."""
    apart = torch.cdist(x.double(), x.double())
    return apart / apart.max()


def gromov_wasserstein(
    first: Tensor, second: Tensor, epsilon: float = 5e-3, rounds: int = 30, sinkhorn: int = 100
) -> Tensor:
    """A coupling of two sets under which distances agree as well as they can: (n, m).

    first: (n, n) and second: (m, m), distances within each set. Rows sum to 1/n, columns to 1/m.
    epsilon: weight of the entropy; larger couplings are blurred and found faster. rounds: of the
    outer loop, each a transport problem solved by so many `sinkhorn` steps.
    Source: entropic Gromov-Wasserstein with squared loss, Peyre, Cuturi and Solomon (2016),
    proposition 2 with equation 8; the problem has local minima.
    """
    n, m = len(first), len(second)
    p, q = first.new_full((n,), 1 / n), second.new_full((m,), 1 / m)
    constant = (first.square() @ p)[:, None] + (second.square() @ q)[None]  # (n, m)
    plan = p[:, None] * q[None]
    for _ in range(rounds):
        # Gradient of sum_ijkl (C1_ik - C2_jl)^2 T_ij T_kl by T.
        cost = 2 * (constant - 2 * first @ plan @ second.T)
        plan = transport(cost, p, q, epsilon, sinkhorn)
    return plan


def transport(cost: Tensor, p: Tensor, q: Tensor, epsilon: float, steps: int) -> Tensor:
    """Entropic optimal transport by Sinkhorn's steps on logarithms: (n, m), marginals p and q."""
    kernel = -cost / epsilon
    f, g = torch.zeros_like(p), torch.zeros_like(q)
    for _ in range(steps):
        f = p.log() - torch.logsumexp(kernel + g[None], 1)
        g = q.log() - torch.logsumexp(kernel + f[:, None], 0)
    f = p.log() - torch.logsumexp(kernel + g[None], 1)
    return (kernel + f[:, None] + g[None]).exp()


def gw_loss(first: Tensor, second: Tensor, plan: Tensor) -> float:
    """sum_ijkl (C1_ik - C2_jl)^2 T_ij T_kl: how badly a coupling keeps distances."""
    p, q = plan.sum(1), plan.sum(0)
    constant = (first.square() @ p)[:, None] + (second.square() @ q)[None]
    return ((constant - 2 * first @ plan @ second.T) * plan).sum().item()


def gw_start(levels: Tensor, text: Tensor, epsilon: float = 5e-3) -> Tensor:
    """Embeddings for new tokens that lie among text's as the tokens lie among each other.

    levels: (new, features), what the new tokens mean, such as gray values. text: (m, dim), trained
    embeddings. Returns (new, dim): each is the mean of text rows that its row of the plan names.
    """
    plan = gromov_wasserstein(distances(levels), distances(text), epsilon)
    return ((plan / plan.sum(1, keepdim=True)) @ text.double()).to(text.dtype)


@torch.no_grad()
def draw(
    model: GPT, prompts: Tensor, choices: range, length: int, temperature: float = 1.0
) -> Tensor:
    """Tokens that follow the prompts, of the choices alone: (rows, prompt) -> (rows, length).

    choices: the ids that may be drawn, such as those of patches.
    """
    tokens, allowed = prompts, torch.tensor(choices)
    for _ in range(length):
        logits = model(tokens)[:, -1, allowed] / temperature  # (rows, choices)
        drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        tokens = torch.cat([tokens, allowed[drawn][:, None]], 1)
    return tokens[:, prompts.shape[1] :]


def n_new_parameters(model: nn.Module) -> int:
    """How many parameters are trained, each counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
