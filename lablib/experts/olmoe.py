"""OLMoE (Muennighoff et al., 2024): many small experts, none dropped, and what each of them does.

Lab 304. `OLMoEFFN` is the layer as section 2 defines it, with its two losses; `olmoe_` makes the
same layer of fast parts and puts it into a model. Then the four analyses of section 5, on the
routes of any model, ours or one of transformers: router saturation, co-activation, and
specialization by domain and by vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lablib.experts import statistics
from lablib.experts.hub import WideNorm
from lablib.experts.moe import MoE, SwiGLUExperts, moe_layers, recorded
from lablib.experts.routing import LeavesLoss, TokenChoice, router_z_loss
from lablib.models import anatomy
from lablib.modes import kept_modes
from lablib.training.losses import Loss, next_token_loss


class OLMoEFFN(LeavesLoss):
    """An OLMoE layer, written as in section 2: (..., dim) -> (..., dim), top_k experts a token.

    experts: modules (n, dim) -> (n, dim). alpha, beta: weights of the balancing loss and of the
    router's z-loss, which training leaves in `auxiliary_loss`; the defaults are the paper's.
    """

    def __init__(
        self,
        dim: int,
        experts: Iterable[nn.Module],
        top_k: int = 8,
        alpha: float = 1e-2,
        beta: float = 1e-3,
    ):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(dim, len(self.experts), bias=False)  # r
        self.top_k, self.alpha, self.beta = top_k, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        tokens, n = x.reshape(-1, x.shape[-1]), len(self.experts)  # (tokens, dim)
        # Equation 1: y = sum over the top k of softmax(r(x))_i E_i(x); no token is dropped.
        logits = self.router(tokens.float())  # (tokens, n)
        p = logits.softmax(-1)
        weight, chosen = p.topk(self.top_k)  # (tokens, top_k) each; they need not sum to 1
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            row, place = (chosen == i).nonzero(as_tuple=True)  # (rows,): who chose expert i
            y[row] += weight[row, place, None].to(y.dtype) * expert(tokens[row])
        if self.training:
            # Equation 3: n sum_i f_i P_i, shares of tokens times mean probabilities.
            f = chosen.flatten().bincount(minlength=n) / len(tokens)  # (n,), sums to top_k
            balance = n * (f * p.mean(0)).sum()
            # Equation 4: the mean square of log sum_j exp(r_j(x)).
            z = logits.logsumexp(-1).square().mean()
            self.auxiliary_loss = self.alpha * balance + self.beta * z
        return y.view(x.shape)


def olmoe_layer(
    dim: int,
    width: int,
    n_experts: int,
    top_k: int,
    *,
    balance: float = 1e-2,
    z: float = 1e-3,
) -> MoE:
    """An OLMoE layer of fast parts: (..., dim) -> (..., dim).

    width: of an expert. Splitting n experts of which k are asked into m n of width / m, of which
    m k are asked, keeps total and active parameters but for the router's: that is granularity.
    """
    router = TokenChoice(dim, n_experts, top_k, balance=balance, z=z)
    return MoE(router, SwiGLUExperts(n_experts, dim, width))


def olmoe_(
    model: nn.Module, n_experts: int, top_k: int, width: int | None = None, **options
) -> nn.Module:
    """Make a dense model an OLMoE, in place: experts in every block, norms of queries and keys.

    width: of an expert; None: 1 / top_k of the layer's, so that active parameters stay. options: of
    `olmoe_layer`. The norms, over all heads together, are put into `GPT` alone. Returns model.
    Raises ValueError when top_k does not divide the layer's width.
    """
    for place in range(len(anatomy.blocks(model))):
        weight = anatomy.projection(model, place, "gate").weight  # (ffn width, dim)
        ffn, dim = weight.shape
        if width is None and ffn % top_k:
            raise ValueError(f"a width of {ffn} can't be split among {top_k} experts")
        layer = olmoe_layer(dim, width or ffn // top_k, n_experts, top_k, **options)
        anatomy.replace_part(model, place, "mlp", layer.to(weight))
        attention = anatomy.part(model, place, "attention")
        if hasattr(attention, "query_norm"):
            attention.query_norm = WideNorm(attention.query.out_features, 1e-5).to(weight)
            attention.key_norm = WideNorm(attention.key.out_features, 1e-5).to(weight)
    return model


@torch.no_grad()
def routes(model: nn.Module, tokens: Tensor) -> Tensor:
    """Which experts each token asks for: (layers, batch * length, top_k) int64, best first.

    tokens: (batch, length) int64. model: one with `MoE` layers, or a transformers model that can
    return router logits, such as OLMoE. It is in eval mode for it, and as it was afterwards.
    """
    with kept_modes(model), recorded(model.eval()) as records:
        if records:
            anatomy.logits(model, tokens)
            return torch.stack([record.experts.cpu() for (record,) in records.values()])
        logits = model(tokens, output_router_logits=True).router_logits  # (tokens, n) a layer
    top_k = model.config.num_experts_per_tok
    return torch.stack([layer.float().cpu().topk(top_k).indices for layer in logits])


def watching(tokens: Tensor, seen: list[Tensor], every: int) -> Loss:
    """The next-token loss of `lablib.training.fit`, which also reads where tokens go.

    tokens: (batch, length). seen: gets their `routes` before the first training step and after each
    `every` steps; those after the last step are the caller's to add.
    """
    step = 0

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal step
        if model.training:
            if step % every == 0:
                seen.append(routes(model, tokens.to(batch.device)))
            step += 1
        return next_token_loss(model, batch)

    return loss


def saturation_curve(seen: Sequence[Tensor]) -> Tensor:
    """Router saturation of each checkpoint against the last: (checkpoints, layers).

    seen: `routes` of the same tokens at each checkpoint. Source: section 5.1, equation 5.
    """
    last = seen[-1]
    rows = [[statistics.saturation(*pair) for pair in zip(early, last)] for early in seen]
    return torch.tensor(rows)


def domain_distance(experts: Tensor, domains: Tensor, n_experts: int, n_domains: int) -> float:
    """How far domains are from each other in the experts they use: 0 when all use them alike.

    Half the sum over experts of |a domain's share - the mean domain's share|, averaged over
    domains: what part of its assignments a domain would have to move. At most 1 - 1 / n_domains.
    experts: (tokens, top_k); domains: (tokens,) int64. The shares are section 5.3's domain
    specialization, equation 7, over top_k.
    """
    shares = statistics.specialization(experts, domains, n_experts, n_domains) / experts.shape[1]
    return float((shares - shares.mean(0)).abs().sum(1).mean() / 2)


def vocabulary_specialization(
    experts: Tensor, ids: Tensor, n_experts: int, n_ids: int, least: int = 8
) -> float:
    """Mean over vocabulary ids of the share of their occurrences that their favorite expert takes.

    experts: (tokens, top_k), of which the first choice counts; ids: (tokens,) int64, the input at
    each place, or what comes next. least: ids that occur less often are left out, since an id that
    occurs once has a favorite that takes all. Source: section 5.4, equation 8, with k = 1.
    Raises ValueError when no id occurs often enough.
    """
    shares = statistics.specialization(experts[:, :1], ids, n_experts, n_ids)  # (n_ids, n_experts)
    often = ids.bincount(minlength=n_ids) >= least
    if not often.any():
        raise ValueError(f"no id occurs {least} times among {len(ids)} tokens")
    return float(shares[often].max(1).values.mean())


@torch.no_grad()
def router_z(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Mean over layers and batches of the router's z-loss, without its weight."""
    values: list[float] = []
    handles = [
        layer.router.register_forward_hook(
            lambda router, inputs, _: values.append(router_z_loss(router.logits(inputs[0])).item())
        )
        for layer in moe_layers(model).values()
    ]
    with kept_modes(model):
        for batch in batches:
            anatomy.logits(model.eval(), batch[:, :-1])
    for handle in handles:
        handle.remove()
    return sum(values) / len(values)


def opened(name: str, tokenizer: Any) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """A transformers OLMoE of the hub, on the GPU if there is one, and what cuts text for it.

    name: such as "allenai/OLMoE-1B-7B-0924", 14 GB in bfloat16; "" gives a small one of random
    weights, and tokenizer, one of `lablib.data`, cuts its text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

    if name:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device)
        return model.eval(), AutoTokenizer.from_pretrained(name).encode
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_experts": 64, "num_experts_per_tok": 8}
    ends = {"pad_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos}
    config = OlmoeConfig(**sizes, **ends, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    return OlmoeForCausalLM(config).eval(), tokenizer.encode
