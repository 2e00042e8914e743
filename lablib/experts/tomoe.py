"""ToMoE (Gao et al., 2025): the experts that a dense model already holds, found by masks.

Lab 307. No weight changes. A hypernetwork learns masks over the width of each feed-forward layer,
a router learns which mask each token gets, and afterwards each mask's rows and columns are gathered
into an expert. `MaskedMLP` is the method; training is `ToMoE`, with the losses of section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.experts.routing import Assignments, Router, load_balancing_loss
from lablib.models import anatomy


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of hard, the gradient of soft."""
    return hard + (soft - soft.detach())


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise: added to logits, the largest is a draw from their softmax."""
    return -torch.empty_like(like).exponential_().log()


def choose(logits: Tensor, temperature: float = 0.4, noise: bool = True) -> Tensor:
    """One of n, as a row with a single 1: (..., n) -> (..., n). The Gumbel softmax."""
    soft = ((logits + gumbel(logits) if noise else logits) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft)
    return straight_through(hard, soft)


def keep(logits: Tensor, temperature: float = 0.4, noise: bool = True) -> Tensor:
    """Each unit kept, 1, or not, 0: any shape -> the same. The Gumbel sigmoid."""
    soft = ((logits + gumbel(logits) if noise else logits) / temperature).sigmoid()
    return straight_through((soft > 0.5).to(soft), soft)


class MaskedMLP(nn.Module):
    """A frozen feed-forward layer of which each token uses one of several parts.

    mlp: with linear layers gate, up and down. masks: (experts, width) of 0 and 1, set from outside;
    None is the dense layer.
    """

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, n_experts: int):
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        self.router = nn.Linear(gate.in_features, n_experts, bias=False)
        self.masks: Tensor | None = None
        self.chosen: Tensor | None = None  # (tokens, experts), of the last call
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim) -> (..., dim)."""
        hidden = F.silu(self.gate(x)) * self.up(x)  # (..., width), of the dense model
        if self.masks is None:
            return self.down(hidden)
        # Each token chooses one expert, by straight-through Gumbel softmax in training.
        self.logits = self.router(x)  # (..., experts)
        self.chosen = choose(self.logits, noise=self.training)  # (..., experts), one 1 a row
        # An expert is a mask over the width: what it keeps of the dense layer.
        mask = self.chosen @ self.masks  # (..., width)
        return self.down(mask * hidden)


class RoutedValues(nn.Module):
    """Attention whose values have fewer dimensions, others for each token: k of head_dim.

    All heads of a layer share a token's choice. It masks what the value projection gives for a
    token, and what the output projection reads there; queries and keys stay.
    """

    def __init__(self, value: nn.Module, output: nn.Module, head_dim: int, k: int, size: int = 128):
        super().__init__()
        self.head_dim, self.k, self.on = head_dim, k, True
        self.router = nn.Linear(value.in_features, size, bias=False)
        self.norm, self.decoder = nn.LayerNorm(size), nn.Linear(size, head_dim, bias=False)
        value.register_forward_hook(lambda part, given, made: self.masked(made, given[0]))
        output.register_forward_pre_hook(lambda part, given: self.masked(given[0]))
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, dim) -> (batch, length, head_dim) of 0 and 1, k ones a token."""
        scores = self.decoder(F.gelu(self.norm(self.router(x))))  # (batch, length, head_dim)
        soft = ((scores + gumbel(scores) if self.training else scores) / 0.4).sigmoid()
        return straight_through(most(soft.detach(), self.k), soft)

    def masked(self, heads: Tensor, x: Tensor | None = None) -> Tensor:
        """heads: (batch, length, n * head_dim), of values or of what heads read; x draws anew."""
        if not self.on:
            return heads
        if x is not None:
            self.mask = self(x)
        return (heads.unflatten(-1, (-1, self.head_dim)) * self.mask.unsqueeze(-2)).flatten(-2)


class Hypernetwork(nn.Module):
    """Logits of all masks, from fixed random inputs: what is trained in the place of weights.

    A bidirectional GRU runs over the layers, so that a layer's masks know of the others'; then each
    layer has its own norm and decoder. size: 128 in the paper's code.
    """

    offset = 3.0  # added to logits, so that training starts near the dense model

    def __init__(self, widths: Sequence[int], n_experts: int = 8, size: int = 128):
        super().__init__()
        self.register_buffer("inputs", torch.randn(len(widths), n_experts, size // 4))
        self.gru = nn.GRU(size // 4, size // 2, bidirectional=True)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in widths)
        self.decoders = nn.ModuleList(nn.Linear(size, width, bias=False) for width in widths)

    def forward(self) -> list[Tensor]:
        """(experts, width) logits of each layer; above 0 a unit is kept."""
        states, _ = self.gru(self.inputs)  # (layers, experts, size)
        parts = zip(self.decoders, self.norms, states)
        return [decoder(F.gelu(norm(state))) + self.offset for decoder, norm, state in parts]


def ratio_loss(value: Tensor, target: float) -> Tensor:
    """log(larger / smaller): 0 where value is the target, and growing on both sides."""
    target = torch.as_tensor(target, dtype=value.dtype)
    return (torch.maximum(value, target) / torch.minimum(value, target).clamp(min=1e-3)).log()


def active_share(masks: Sequence[Tensor]) -> Tensor:
    """Share of the feed-forward width that a token can meet: the largest expert of each layer."""
    widest = torch.stack([mask.sum(-1).max() for mask in masks])
    return widest.sum() / sum(mask.shape[-1] for mask in masks)


def union(mask: Tensor) -> Tensor:
    """Share of the width that some expert keeps: (experts, width) -> scalar."""
    return (1 - (1 - mask).prod(0)).mean()


class ToMoE(nn.Module):
    """A dense model and what is learned beside it; the model's own weights are frozen.

    model: ours or a Llama-like one of transformers; its feed-forward layers are replaced by
        `MaskedMLP`s, in place. share: of the feed-forward parameters that a token may use.
    weights: of distillation, size, union and balance in the loss: 16, 16, 3 and 1 as in the paper's
        script for LLaMA-2.
    learn_masks: False keeps random masks of the right size, and trains the routers alone.
    blocks: which; None takes all. values: how many dimensions of a head's values each token keeps;
        None leaves attention dense.
    """

    def __init__(
        self,
        model: nn.Module,
        n_experts: int = 8,
        share: float = 0.5,
        weights: tuple[float, float, float, float] = (16.0, 16.0, 3.0, 1.0),
        learn_masks: bool = True,
        blocks: Sequence[int] | None = None,
        values: int | None = None,
    ):
        super().__init__()
        self.share, self.weights, self.n_experts = share, weights, n_experts
        self.model = model.requires_grad_(False).eval()
        self.layers = masked_(model, n_experts, blocks)
        self.values = nn.ModuleList(routed_values_(model, values, blocks) if values else [])
        widths = [layer.gate.out_features for layer in self.layers]
        self.hypernetwork = Hypernetwork(widths, n_experts) if learn_masks else None
        self.fixed: list[Tensor] | None = (
            None if learn_masks else random_masks(widths, n_experts, share)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, length) -> logits, each token through its expert of each layer."""
        self.set_masks(self.masks())
        return anatomy.logits(self.model, tokens)

    def masks(self) -> list[Tensor]:
        """(experts, width) of each layer: drawn in training, and once decided, fixed."""
        if self.fixed is not None:
            return self.fixed
        return [keep(logits, noise=self.training) for logits in self.hypernetwork()]

    def set_masks(self, masks: Sequence[Tensor] | None) -> None:
        """Give each layer its masks; None makes all of them dense."""
        for place, layer in enumerate(self.layers):
            layer.masks = None if masks is None else masks[place].to(layer.router.weight)
        for part in self.values:
            part.on = masks is not None

    @torch.no_grad()
    def dense(self, tokens: Tensor) -> Tensor:
        """The dense model's logits: what is to be kept."""
        self.set_masks(None)
        return anatomy.logits(self.model, tokens)

    @torch.no_grad()
    def decide(self) -> ToMoE:
        """End of training: every expert of a layer keeps as many units, its most wanted.

        A layer's width is that of its largest expert, all widths scaled so that they are the share.
        """
        if self.fixed is None:
            logits = self.hypernetwork()
            widest = torch.stack([(row > 0).sum(-1).max() for row in logits]).double()
            widths = scaled(widest, [row.shape[-1] for row in logits], self.share)
            self.fixed = [most(row, width) for row, width in zip(logits, widths)]
        return self.eval()


def masked_(
    model: nn.Module, n_experts: int, blocks: Sequence[int] | None = None
) -> list[MaskedMLP]:
    """Replace feed-forward layers by `MaskedMLP`s of the same modules, in place; all or some."""
    layers = []
    for block in range(len(anatomy.blocks(model))) if blocks is None else blocks:
        parts = [anatomy.projection(model, block, role) for role in ("gate", "up", "down")]
        layers.append(MaskedMLP(*parts, n_experts).to(parts[0].weight))
        anatomy.replace_part(model, block, "mlp", layers[-1])
    return layers


def routed_values_(
    model: nn.Module, k: int, blocks: Sequence[int] | None = None
) -> list[RoutedValues]:
    """Give attention layers `RoutedValues`, through hooks on their projections."""
    head_dim = model.config.head_dim
    made = []
    for block in range(len(anatomy.blocks(model))) if blocks is None else blocks:
        value, output = (anatomy.projection(model, block, role) for role in ("value", "output"))
        made.append(RoutedValues(value, output, head_dim, k).to(value.weight))
    return made


def scaled(wanted: Tensor, limits: Sequence[int], share: float) -> list[int]:
    """Whole widths in the proportions of `wanted`, none above its limit, `share` of all in sum."""
    limit = torch.tensor(limits, dtype=wanted.dtype)
    total = round(share * float(limit.sum()))
    low, high = 0.0, float(limit.max()) / max(float(wanted.min()), 1e-6)
    for _ in range(60):  # the factor by bisection: the sum grows with it
        middle = (low + high) / 2
        inside = torch.minimum(wanted * middle, limit).floor().clamp(min=1).sum() <= total
        low, high = (middle, high) if inside else (low, middle)
    widths = torch.minimum(wanted * low, limit).floor().clamp(min=1)
    spare = (widths < limit).nonzero()[: total - int(widths.sum()), 0]
    widths[spare] += 1
    return widths.int().tolist()


def most(scores: Tensor, width: int) -> Tensor:
    """1 at the `width` largest of each row, 0 elsewhere: (rows, n) -> (rows, n)."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(width, -1).indices, 1.0)


def random_masks(widths: Sequence[int], n_experts: int, share: float) -> list[Tensor]:
    """The control: experts of random units, of the right size."""
    return [most(torch.rand(n_experts, width), round(share * width)) for width in widths]


def tomoe_loss(moe: ToMoE, tokens: Tensor) -> Tensor:
    """What `fit` minimizes: stay near the dense model, with few parameters, all units in use.

    tokens: (batch, length + 1); the last of each row is not read.
    """
    distill, size, cover, balance = moe.weights
    given = tokens[:, :-1]
    teacher = moe.dense(given).log_softmax(-1)
    student = moe(given).log_softmax(-1)
    # KL(dense || masked), a token: what the masks lose
    loss = distill * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
    spread = [balanced(layer) for layer in moe.layers]
    loss = loss + balance * torch.stack(spread).mean()
    if moe.hypernetwork is not None:
        masks = [layer.masks for layer in moe.layers]
        loss = loss + size * ratio_loss(active_share(masks), moe.share)
        loss = loss + cover * torch.stack([ratio_loss(union(mask), 1.0) for mask in masks]).mean()
    return loss


def balanced(layer: MaskedMLP) -> Tensor:
    """The balancing loss of one layer's last call, as in Switch Transformers."""
    probs = layer.logits.flatten(0, -2).softmax(-1)  # (tokens, experts)
    counts = layer.chosen.detach().flatten(0, -2).sum(0)  # (experts,)
    return load_balancing_loss(probs, counts.long())


class Nearest(Router):
    """Each token to the expert of its largest logit, with weight 1."""

    top_k = 1

    def __init__(self, weight: Tensor):
        super().__init__(len(weight))
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor, sequences: int | None = None) -> Assignments:
        """x: (tokens, dim)."""
        logits = F.linear(x, self.weight)  # (tokens, experts)
        experts = logits.argmax(-1, keepdim=True)
        return self.assign(experts, x.new_ones(experts.shape), logits.softmax(-1))


@torch.no_grad()
def gathered(layer: MaskedMLP) -> MoE:
    """The same layer as a mixture of small experts: the masked units are gone, not multiplied by 0.

    Raises ValueError before `decide`, or when experts are of unequal width or have biases.
    """
    masks = layer.masks
    sizes = set() if masks is None else set(masks.sum(-1).int().tolist())
    if len(sizes) != 1 or layer.gate.bias is not None:
        raise ValueError("experts can be gathered once decided: of one width, without biases")
    (width,) = sizes
    experts = SwiGLUExperts(len(masks), layer.gate.in_features, width)
    for place, mask in enumerate(masks):
        kept = mask.nonzero()[:, 0]  # (width,)
        experts.gate_up[place] = torch.cat([layer.gate.weight[kept], layer.up.weight[kept]])
        experts.down[place] = layer.down.weight[:, kept]
    return MoE(Nearest(layer.router.weight), experts).to(layer.gate.weight)


def gather_(moe: ToMoE) -> nn.Module:
    """The model with real experts in the place of masks, in place."""
    moe.set_masks(moe.masks())
    for block in range(len(anatomy.blocks(moe.model))):
        part = anatomy.part(moe.model, block, "mlp")
        if isinstance(part, MaskedMLP):
            anatomy.replace_part(moe.model, block, "mlp", gathered(part))
    return moe.model


def by_magnitude(layer: MaskedMLP) -> Tensor:
    """Static pruning's score of each unit, (width,): the product of its three weights' norms."""
    parts = (
        layer.gate.weight.norm(dim=1),
        layer.up.weight.norm(dim=1),
        layer.down.weight.norm(dim=0),
    )
    return parts[0] * parts[1] * parts[2]


@torch.no_grad()
def by_activation(moe: ToMoE, tokens: Tensor) -> list[Tensor]:
    """The same by what units do on a text: root mean square times the norm of their output weights.

    tokens: (batch, length). Returns (width,) of each layer.
    """
    downs = [layer.down for layer in moe.layers]
    with heard(downs) as hidden:
        moe.dense(tokens)
    return [
        made.square().mean(0).sqrt() * down.weight.norm(dim=0) for made, down in zip(hidden, downs)
    ]


@torch.no_grad()
def units_needed(model: nn.Module, tokens: Tensor, part: float = 0.9) -> Tensor:
    """Share of the units that writes `part` of all that a layer's units write: (blocks, 2).

    First when each token counts its own largest units, on average; then when all tokens must have
    the same ones. What a unit writes is its value times the norm of its output weights.
    """
    downs = [anatomy.projection(model, b, "down") for b in range(len(anatomy.blocks(model)))]
    with heard(downs) as hidden:
        model(tokens)
    rows = []
    for made, down in zip(hidden, downs):
        size = made.abs() * down.weight.norm(dim=0)  # (tokens, width)
        own = size.sort(-1, descending=True).values.cumsum(-1) / size.sum(-1, keepdim=True)
        same = size.sum(0).sort(descending=True).values.cumsum(-1) / size.sum()  # (width,)
        needed = [((share < part).sum(-1) + 1).float().mean() for share in (own, same)]
        rows.append(torch.stack(needed) / size.shape[-1])
    return torch.stack(rows)


@contextlib.contextmanager
def heard(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block, what goes into each module, called in this order: (tokens, width)."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda part, given: seen.append(given[0].flatten(0, -2)))
        for module in modules
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def prune_(moe: ToMoE, scores: Sequence[Tensor], together: bool = False) -> ToMoE:
    """Static structured pruning: every token keeps the same units, those of the best scores.

    scores: (width,) of each layer. together: ranks the units of all layers as one, so that layers
    may end up unequally wide; else each layer keeps the share.
    """
    ranked = [torch.cat(list(scores))] if together else scores
    kept = torch.cat([most(row[None], round(moe.share * len(row)))[0] for row in ranked])
    parts = kept.split([len(row) for row in scores])
    moe.fixed = [part.expand(moe.n_experts, -1) for part in parts]
    return moe.eval()
