"""Routers: which tokens go to which experts, and with what weight.

A router is a module that `lablib.experts.moe.MoE` calls with its tokens; it returns `Assignments`,
and leaves its own losses and records. One of your own is a subclass of `Router` whose `forward`
chooses experts and weights and ends with `self.assign(experts, weights)`.
Sources: Switch Transformers (Fedus et al., 2021) for top-1, capacity, jitter and the balancing
loss; ST-MoE (Zoph et al., 2022) for the z-loss; Expert Choice (Zhou et al., 2022); top-k as in
Mixtral (2024) and OLMoE (Muennighoff et al., 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.kernels import route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lablib.experts.moe import Experts


class Assignments(NamedTuple):
    """Rows to compute, sorted by expert.

    token: (rows,) int64, which token each row is a copy of; weight: (rows,), what its result is
    multiplied with; counts: (n_experts,) int64, rows of each expert.
    """

    token: Tensor
    weight: Tensor
    counts: Tensor

    def mix(self, experts: Experts, x: Tensor) -> Tensor:
        """Each token's weighted sum of its experts: x (tokens, dim) -> (tokens, dim).

        All that `MoE` asks for: a router that does not copy tokens, such as one that mixes them
        into slots, returns an object with a `mix` of its own.
        """
        return experts.mix(x, self)


class Record(NamedTuple):
    """What a router did with one batch, for `lablib.experts.statistics`.

    probs: (tokens, n_experts) float32, None where the router has none. experts: (tokens, top_k)
    int64, what each token asked for, dropped or not; None when experts choose. token, counts: of
    the rows computed, as in `Assignments`.
    """

    probs: Tensor | None
    experts: Tensor | None
    token: Tensor
    counts: Tensor


class LeavesLoss(nn.Module):
    """A module that leaves a scalar in `auxiliary_loss`, which `lablib.training.fit` adds.

    It belongs to the graph of the last call, so copies and pickles of the module do without.
    """

    def __init__(self):
        super().__init__()
        self.auxiliary_loss: Tensor | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"auxiliary_loss": None}


class Router(LeavesLoss):
    """What all routers have: `forward` is yours, `assign` sorts what it chose.

    forward(x (tokens, dim), sequences) -> Assignments; sequences: of how many equally long ones the
    tokens are made, None when that is not known.
    n_experts: how many there are to choose from. observer: called with the `Record` of each call.
    group: the processes whose tokens are balanced as one batch.
    """

    def __init__(self, n_experts: int):
        super().__init__()
        self.n_experts = n_experts
        self.observer: Callable[[Record], None] | None = None
        self.group: ProcessGroup | None = None

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"observer": None}

    def assign(self, experts: Tensor, weights: Tensor, probs: Tensor | None = None) -> Assignments:
        """Every token goes to the experts it chose: nothing is dropped.

        experts: (tokens, top_k) int64; weights: (tokens, top_k); probs: for the record alone.
        """
        order = experts.flatten().argsort(stable=True)  # (tokens * top_k,)
        counts = experts.flatten().bincount(minlength=self.n_experts)
        return self.keep(order, counts, experts, weights, probs)

    def keep(
        self, order: Tensor, counts: Tensor, experts: Tensor, weights: Tensor, probs: Tensor | None
    ) -> Assignments:
        """Of the assignments token * top_k + choice those in order (rows,), sorted by expert."""
        token = order // experts.shape[1]
        assigned = Assignments(token, weights.flatten()[order], counts)
        self.record(probs, experts, assigned)
        return assigned

    def record(self, probs: Tensor | None, experts: Tensor | None, assigned: Assignments) -> None:
        """Tell the observer, if there is one."""
        if self.observer is not None:
            told = (probs, experts, assigned.token, assigned.counts)
            self.observer(Record(*(None if part is None else part.detach() for part in told)))


class LinearRouter(Router):
    """A linear map from a token to one logit an expert, in float32 even under autocast.

    jitter: in training the input is multiplied by uniform noise from 1 - jitter to 1 + jitter.
    Source: Switch Transformers, section 2.4 for float32, appendix C for the noise.
    """

    def __init__(self, dim: int, n_experts: int, jitter: float = 0.0):
        super().__init__(n_experts)
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(n_experts, dim).normal_(0.0, 0.02))

    def logits(self, x: Tensor) -> Tensor:
        """x: (tokens, dim) -> (tokens, n_experts), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(self.noisy(x.float()), self.weight.float())

    def noisy(self, x: Tensor) -> Tensor:
        """x times the jitter's noise, in training."""
        if not (self.training and self.jitter):
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)


class TokenChoice(LinearRouter):
    """Each token chooses the top_k experts of its highest logits.

    softmax: over all logits "before" the choice, or "after" it over the chosen ones, so that
        weights sum to 1; see `lablib.kernels.route`.
    capacity_factor: None drops nothing; else in training an expert takes at most `capacity`
        assignments, first choices before second ones and earlier tokens before later ones. What
        finds no place adds nothing: the token passes through the residual connection.
    eval_capacity_factor: the same in eval mode. None, which drops nothing, keeps a text's logits
        apart from what else is in the batch and from later tokens, and cached generation equal to
        uncached; a capacity does neither.
    capacity_of: whose tokens share a capacity: the "batch", or each "sequence" apart, for which the
        layer's input must be (batch, length, dim).
    balance, z: weights of `load_balancing_loss` and `router_z_loss`, left in training mode only.
    Raises ValueError for another capacity_of or a capacity factor that is not above 0.
    """

    def __init__(
        self,
        dim: int,
        n_experts: int,
        top_k: int = 1,
        softmax: str = "before",
        *,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        capacity_of: str = "batch",
        balance: float = 0.0,
        z: float = 0.0,
        jitter: float = 0.0,
    ):
        super().__init__(dim, n_experts, jitter)
        _check_capacity(capacity_of, capacity_factor, eval_capacity_factor)
        self.top_k, self.softmax, self.balance, self.z = top_k, softmax, balance, z
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.capacity_of = capacity_of

    def forward(self, x: Tensor, sequences: int | None = None) -> Assignments:
        logits = self.logits(x)  # (tokens, n_experts)
        chosen = route(logits, self.top_k, self.softmax)
        if self.training:
            self.auxiliary_loss = self._losses(logits, chosen.probs, chosen.counts)
        order, counts = chosen.order, chosen.counts  # (tokens * top_k,), (n_experts,)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is not None:
            sequences = _sharing(self.capacity_of, sequences)
            places = capacity(len(x) // sequences, self.n_experts, factor, self.top_k)
            order, counts = within_capacity(chosen.experts, self.n_experts, places, sequences)
        return self.keep(order, counts, chosen.experts, chosen.weights, chosen.probs)

    def _losses(self, logits: Tensor, probs: Tensor, counts: Tensor) -> Tensor | None:
        losses = []
        if self.balance:
            counts = mean_over(self.group, counts)
            losses.append(self.balance * load_balancing_loss(probs, counts))
        if self.z:
            losses.append(self.z * router_z_loss(logits))
        return sum(losses) if losses else None

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, top_k={self.top_k}, softmax={self.softmax!r}"


class ExpertChoice(LinearRouter):
    """Each expert chooses as many tokens: those that give it the highest probability.

    capacity_factor: how many experts a token has on average.
    capacity_of: whether an expert chooses from the "batch", or from each "sequence" apart, for
        which the layer's input must be (batch, length, dim).
    z: weight of `router_z_loss`, left in training mode only.
    An expert sees all it chooses from, later tokens included: no language model can generate
    with it. Source: Expert Choice (Zhou et al., 2022), section 3.2.
    Raises ValueError for another capacity_of or a capacity factor that is not above 0.
    """

    def __init__(
        self,
        dim: int,
        n_experts: int,
        capacity_factor: float = 1.0,
        *,
        capacity_of: str = "batch",
        z: float = 0.0,
        jitter: float = 0.0,
    ):
        super().__init__(dim, n_experts, jitter)
        _check_capacity(capacity_of, capacity_factor)
        self.capacity_factor, self.capacity_of, self.z = capacity_factor, capacity_of, z

    def forward(self, x: Tensor, sequences: int | None = None) -> Assignments:
        sequences = _sharing(self.capacity_of, sequences)
        length = len(x) // sequences
        logits = self.logits(x)
        probs = logits.softmax(-1)  # (tokens, n_experts)
        if self.training and self.z:
            self.auxiliary_loss = self.z * router_z_loss(logits)
        places = min(length, capacity(length, self.n_experts, self.capacity_factor))
        token = best_tokens(probs, places, sequences)  # (n_experts, sequences * places)
        counts = token.new_full((self.n_experts,), token.shape[1])
        weight = probs.t().gather(1, token)  # as token
        assigned = Assignments(token.flatten(), weight.flatten(), counts)
        self.record(probs, None, assigned)
        return assigned

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, capacity_factor={self.capacity_factor}"


def capacity(tokens: int, n_experts: int, capacity_factor: float, top_k: int = 1) -> int:
    """Most assignments an expert takes of so many tokens; at least 1.

    Raises ValueError for a capacity factor that is not above 0.
    Source: Switch Transformers, equation 3, times top_k as in GShard.
    """
    _check_factor(capacity_factor)
    # Rounded first: 1.1 * 10 is a little more than 11.
    return max(1, math.ceil(round(capacity_factor * top_k * tokens / n_experts, 6)))


def _check_factor(capacity_factor: float) -> None:
    if not 0 < capacity_factor < math.inf:
        raise ValueError(f"capacity_factor {capacity_factor} is not above 0; None drops nothing")


def _check_capacity(capacity_of: str, *factors: float | None) -> None:
    if capacity_of not in ("batch", "sequence"):
        raise ValueError(f"capacity_of {capacity_of!r} is neither 'batch' nor 'sequence'")
    for factor in factors:
        if factor is not None:
            _check_factor(factor)


def _sharing(capacity_of: str, sequences: int | None) -> int:
    """In how many equal parts the tokens share capacities."""
    if capacity_of == "batch":
        return 1
    if sequences is None:
        raise ValueError(
            "capacity_of='sequence' needs an input (batch, length, dim): one of two dimensions "
            "does not say where a sequence ends"
        )
    return sequences


def within_capacity(
    experts: Tensor, n_experts: int, places: int, sequences: int = 1
) -> tuple[Tensor, Tensor]:
    """The assignments that find a place, sorted by expert.

    experts: (tokens, top_k); places: of an expert in each of the equally long sequences that the
    tokens are made of.
    Returns order (kept,) int64, assignments token * top_k + choice, and counts (n_experts,).
    """
    tokens, top_k = experts.shape
    by_choice = experts.t().flatten()  # (top_k * tokens,): all first choices, then all second ones
    sequence = torch.arange(tokens, device=experts.device).repeat(top_k) // (tokens // sequences)
    group = by_choice * sequences + sequence
    order = group.argsort(stable=True)
    counts = group.bincount(minlength=n_experts * sequences)
    start = (counts.cumsum(0) - counts)[group[order]]
    rank = torch.arange(len(order), device=order.device) - start
    order = order[rank < places]  # (kept,)
    kept = counts.clamp(max=places).view(n_experts, sequences).sum(1)
    return order % tokens * top_k + order // tokens, kept


def best_tokens(probs: Tensor, places: int, sequences: int = 1) -> Tensor:
    """Each expert's tokens of highest probability: (n_experts, sequences * places) int64.

    probs: (tokens, n_experts), tokens of equally long sequences that are chosen from apart.
    """
    length = len(probs) // sequences
    best = probs.view(sequences, length, -1).topk(places, dim=1).indices
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


def mean_over(group: ProcessGroup | None, counts: Tensor) -> Tensor:
    """counts (n_experts,), averaged over the group's processes; as they are without a group."""
    if group is None:
        return counts
    import torch.distributed as dist

    total = counts.float()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
