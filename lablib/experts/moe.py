"""A mixture-of-experts layer: a router sends each token to a few of many experts.

The layer that the papers of this theme share. `MoE` takes the place of a block's feed-forward
layer: `block.mlp = MoE(dim, SwiGLUExperts(8, dim, width), 8, top_k=2)`.
Sources: Switch Transformers (Fedus et al., 2021) for top-1, capacity and the balancing loss;
ST-MoE (Zoph et al., 2022) for the z-loss; Expert Choice (Zhou et al., 2022); shared experts as in
DeepSeekMoE (Dai et al., 2024); top-k as in Mixtral (2024) and OLMoE (Muennighoff et al., 2024).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.kernels import grouped_linear, merge_tokens, moe_mlp, route


class Assignments(NamedTuple):
    """Rows to compute, sorted by expert.

    token: (n,) int64, which token each row is a copy of; weight: (n,), what its result is
    multiplied with; counts: (n_experts,) int64, rows of each expert.
    """

    token: Tensor
    weight: Tensor
    counts: Tensor


class Record(NamedTuple):
    """What a layer's router did with one batch, for `lablib.experts.routing`.

    probs: (tokens, n_experts) float32. experts: (tokens, top_k) int64, what each token asked for;
    None when experts choose. token, counts: of the rows computed, as in `Assignments`.
    """

    probs: Tensor
    experts: Tensor | None
    token: Tensor
    counts: Tensor


class Router(nn.Module):
    """Linear map from tokens to one logit an expert, in float32 even under autocast.

    jitter: in training the input is multiplied by uniform noise from 1 - jitter to 1 + jitter
    (Switch Transformers, section 2.4, which also argues for float32 here).
    """

    def __init__(self, dim: int, n_experts: int, jitter: float = 0.0):
        super().__init__()
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(n_experts, dim).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, dim) -> logits (tokens, n_experts), float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x, self.weight.float())


class Experts(nn.Module):
    """What a `MoE` calls: a module from rows sorted by expert to as many rows.

    forward(rows (n, dim), counts (n_experts,) int64) -> (n, dim).
    """

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        """Each token's weighted sum of its experts: x (tokens, dim) -> (tokens, dim)."""
        rows = self(x.index_select(0, assigned.token), assigned.counts)
        return merge_tokens(rows.new_zeros(x.shape), rows, assigned.token, assigned.weight)

    def mean_counts(self, counts: Tensor) -> Tensor:
        """counts (n_experts,), averaged over the processes that share these experts."""
        return counts


class FeedForwardExperts(Experts):
    """n_experts layers down(activation(up(x))), their weights in two tensors.

    activation: "relu", or a function of (n, width).
    """

    def __init__(
        self,
        n_experts: int,
        dim: int,
        width: int,
        activation: str | Callable[[Tensor], Tensor] = "relu",
    ):
        super().__init__()
        self.activation = activation
        self.up = nn.Parameter(torch.empty(n_experts, width, dim).normal_(0.0, 0.02))
        self.down = nn.Parameter(torch.empty(n_experts, dim, width).normal_(0.0, 0.02))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        activation = F.relu if self.activation == "relu" else self.activation
        hidden = activation(grouped_linear(rows, self.up, counts))
        return grouped_linear(hidden, self.down, counts)

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        if self.activation != "relu":
            return super().mix(x, assigned)
        token, weight, counts = assigned
        return moe_mlp(x, token, weight, self.up, self.down, counts, "relu")


class SwiGLUExperts(Experts):
    """n_experts layers down(silu(gate(x)) * up(x)); gate and up lie in one tensor, gate first.

    The layout is that of transformers' OLMoE and Mixtral.
    """

    def __init__(self, n_experts: int, dim: int, width: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * width, dim).normal_(0.0, 0.02))
        self.down = nn.Parameter(torch.empty(n_experts, dim, width).normal_(0.0, 0.02))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, self.gate_up, counts).chunk(2, -1)
        return grouped_linear(F.silu(gate) * up, self.down, counts)

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        token, weight, counts = assigned
        return moe_mlp(x, token, weight, self.gate_up, self.down, counts, "swiglu")


class ExpertList(Experts):
    """Any modules (n, dim) -> (n, dim) as experts; those without rows are not called."""

    def __init__(self, experts: Iterable[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = zip(self.experts, rows.split(counts.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part)] or [rows])


class MoE(nn.Module):
    """Experts behind a router, in the place of one feed-forward layer.

    experts: one of the three above, or an `Experts` of your own.
    n_experts: how many of them the router chooses from.
    top_k, softmax: see `lablib.kernels.route`; the weights multiply the experts' outputs.
    capacity_factor: None drops nothing; else an expert takes at most `capacity` assignments, first
        choices before second ones and earlier tokens before later ones. What finds no place adds
        nothing: the token passes through the residual connection.
    capacity_of: whose tokens share a capacity: the "batch", or each "sequence" apart.
    choice: "token", or "expert": each expert takes the `capacity` tokens that it gives the highest
        probability, so top_k is how many experts a token has on average. An expert then sees the
        whole batch, later tokens included: no language model can generate with it.
    shared: a module (..., dim) -> (..., dim) added for every token.
    balance, z: weights of `load_balancing_loss` and `router_z_loss` in `auxiliary_loss`, which
        `lablib.training.fit` adds to the loss; left in training mode only.
    Raises ValueError for another choice or capacity_of, or expert choice without a capacity_factor.
    """

    def __init__(
        self,
        dim: int,
        experts: Experts,
        n_experts: int,
        *,
        top_k: int = 1,
        softmax: str = "before",
        choice: str = "token",
        capacity_factor: float | None = None,
        capacity_of: str = "batch",
        shared: nn.Module | None = None,
        balance: float = 0.0,
        z: float = 0.0,
        jitter: float = 0.0,
    ):
        super().__init__()
        if choice not in ("token", "expert") or capacity_of not in ("batch", "sequence"):
            raise ValueError(f"choice {choice!r} or capacity_of {capacity_of!r} is unknown")
        if choice == "expert" and capacity_factor is None:
            raise ValueError("expert choice needs a capacity_factor: 1 gives each token top_k")
        self.router = Router(dim, n_experts, jitter)
        self.experts, self.shared = experts, shared
        self.n_experts, self.top_k, self.softmax = n_experts, top_k, softmax
        self.choice, self.capacity_factor = choice, capacity_factor
        self.capacity_of, self.balance, self.z = capacity_of, balance, z
        self.records: list[Record] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, dim), or (tokens, dim) -> x's shape."""
        flat = x.reshape(-1, x.shape[-1])
        sequences = len(x) if self.capacity_of == "sequence" else 1
        logits = self.router(flat)
        chosen = self._by_expert if self.choice == "expert" else self._by_token
        assigned = chosen(logits, sequences)
        mixed = self.experts.mix(flat, assigned)
        if self.shared is not None:
            mixed = mixed + self.shared(flat)
        return mixed.view(x.shape)

    def capacity(self, tokens: int) -> int:
        """Most assignments an expert takes of so many tokens; at least 1.

        Source: Switch Transformers, equation 3, times top_k as in GShard.
        """
        # Rounded first: 1.1 * 10 is a little more than 11.
        places = round(self.capacity_factor * self.top_k * tokens / self.n_experts, 6)
        return max(1, math.ceil(places))

    def _by_token(self, logits: Tensor, sequences: int) -> Assignments:
        routing = route(logits, self.top_k, self.softmax)
        self._leave_losses(logits, routing.probs, routing.counts)
        if self.capacity_factor is None:
            order, counts = routing.order, routing.counts
        else:
            size = self.capacity(len(logits) // sequences)
            order, counts = within_capacity(routing.experts, self.n_experts, size, sequences)
        token = order // self.top_k
        self._record(routing.probs, routing.experts, token, counts)
        return Assignments(token, routing.weights.flatten()[order], counts)

    def _by_expert(self, logits: Tensor, sequences: int) -> Assignments:
        probs = logits.softmax(-1)
        size = self.capacity(len(logits) // sequences)
        token = expert_choice(probs, min(size, len(logits) // sequences), sequences)
        counts = token.new_full((self.n_experts,), token.shape[1])
        expert = torch.arange(self.n_experts, device=token.device)[:, None]
        self._leave_losses(logits, probs, None)
        self._record(probs, None, token.flatten(), counts)
        return Assignments(token.flatten(), probs[token, expert].flatten(), counts)

    def _leave_losses(self, logits: Tensor, probs: Tensor, counts: Tensor | None) -> None:
        if not self.training:
            return
        total: Tensor | float = 0.0
        if self.balance and counts is not None:
            total = total + self.balance * load_balancing_loss(
                probs, self.experts.mean_counts(counts)
            )
        if self.z:
            total = total + self.z * router_z_loss(logits)
        if isinstance(total, Tensor):
            self.auxiliary_loss = total

    def _record(self, probs: Tensor, experts: Tensor | None, token: Tensor, counts: Tensor) -> None:
        if self.records is not None:
            kept = (None if t is None else t.detach() for t in (probs, experts, token, counts))
            self.records.append(Record(*kept))

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, top_k={self.top_k}, choice={self.choice!r}"


def within_capacity(
    experts: Tensor, n_experts: int, capacity: int, sequences: int = 1
) -> tuple[Tensor, Tensor]:
    """The assignments that find a place, sorted by expert.

    experts: (tokens, top_k); capacity: places of an expert in each of the equally long sequences
    that the tokens are made of.
    Returns order (kept,) int64, assignments token * top_k + choice, and counts (n_experts,).
    """
    tokens, top_k = experts.shape
    by_choice = experts.t().flatten()  # all first choices, then all second ones
    sequence = torch.arange(tokens, device=experts.device).repeat(top_k) // (tokens // sequences)
    group = by_choice * sequences + sequence
    order = group.argsort(stable=True)
    counts = group.bincount(minlength=n_experts * sequences)
    start = (counts.cumsum(0) - counts)[group[order]]
    rank = torch.arange(len(order), device=order.device) - start
    order = order[rank < capacity]
    kept = counts.clamp(max=capacity).view(n_experts, sequences).sum(1)
    return order % tokens * top_k + order // tokens, kept


def expert_choice(probs: Tensor, capacity: int, sequences: int = 1) -> Tensor:
    """Each expert's tokens of highest probability: (n_experts, sequences * capacity) int64.

    probs: (tokens, n_experts), tokens of equally long sequences that are chosen from apart.
    Source: Expert Choice (Zhou et al., 2022), section 3.2.
    """
    length = len(probs) // sequences
    best = probs.view(sequences, length, -1).topk(capacity, dim=1).indices
    start = torch.arange(sequences, device=probs.device)[:, None, None] * length
    return (best + start).permute(2, 0, 1).flatten(1)


def load_balancing_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """How unevenly tokens spread over experts: top_k when even, top_k * n_experts at worst.

    probs: (tokens, n_experts), rows sum to 1; counts: (n_experts,), assignments of each expert
    before any is dropped. Returns a scalar; gradients flow through probs only.
    To judge several layers as one, as transformers does, concatenate probs and add counts.
    Source: Switch Transformers, equation 4, without its factor alpha.
    """
    share = counts.to(probs.dtype) / len(probs)  # f_i
    return len(counts) * (share * probs.mean(0)).sum()  # N * sum_i f_i P_i


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean square of log sum exp of each token's logits, which keeps them small.

    logits: (tokens, n_experts). Returns a scalar. Source: ST-MoE (Zoph et al., 2022), equation 5.
    """
    return logits.float().logsumexp(-1).square().mean()


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Full dotted name -> MoE layer, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Record]]]:
    """Within the block, every MoE layer keeps a `Record` a call: name -> records."""
    layers = moe_layers(model)
    records: dict[str, list[Record]] = {name: [] for name in layers}
    try:
        for name, layer in layers.items():
            layer.records = records[name]
        yield records
    finally:
        for layer in layers.values():
            layer.records = None
