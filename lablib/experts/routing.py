"""Routers: which tokens go to which experts, and with what weight.

A router is a module that `lablib.experts.moe.MoE` calls with its tokens; it returns `Assignments`,
and leaves its own losses and records. One of your own is a subclass of `Router` whose `forward`
chooses experts and weights and ends with `self.assign(experts, weights)`.
Sources: Switch Transformers (Fedus et al., 2021) for top-1, capacity, jitter and the balancing
loss; ST-MoE (Zoph et al., 2022) for the z-loss; Expert Choice (Zhou et al., 2022); top-k as in
Mixtral (2024) and OLMoE (Muennighoff et al., 2024); sigmoids as in DeepSeek-V3 (2024); Hash Layers
(Roller et al., 2021); Soft MoE (Puigcerver et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.kernels import route
from lablib.models import anatomy

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
    counted: (batch, length) bool, false at padding, which then is neither routed nor counted;
        `lablib.training.losses.counting` sets it for the time of a forward pass.
    by_sequence: whether what it does depends on where a sequence ends.
    """

    by_sequence = False

    def __init__(self, n_experts: int):
        super().__init__()
        self.n_experts = n_experts
        self.observer: Callable[[Record], None] | None = None
        self.group: ProcessGroup | None = None
        self.counted: Tensor | None = None

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"observer": None, "counted": None}

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

    @property
    def by_sequence(self) -> bool:
        return self.capacity_of == "sequence"

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
            counts = shared_counts(self.group, counts, len(probs))
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

    @property
    def by_sequence(self) -> bool:
        return self.capacity_of == "sequence"

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


class RandomChoice(Router):
    """Each token goes to top_k experts drawn anew at each call, with equal weights: a control.

    It learns nothing and its experts cannot specialize. Draws come from torch's own generator of
    the tokens' device.
    """

    def __init__(self, n_experts: int, top_k: int = 1):
        super().__init__(n_experts)
        _check_top_k(top_k, n_experts)
        self.top_k = top_k

    def forward(self, x: Tensor, sequences: int | None = None) -> Assignments:
        drawn = torch.rand(len(x), self.n_experts, device=x.device)
        experts = drawn.topk(self.top_k).indices  # (tokens, top_k), distinct
        return self.assign(experts, x.new_full(experts.shape, 1 / self.top_k))

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, top_k={self.top_k}"


class SigmoidChoice(LinearRouter):
    """Each token chooses the top_k experts of its highest sigmoids, normalized to sum to 1.

    Experts do not compete for probability: a token may score all of them high. With top_k = 1 the
    weight is always 1 and the router gets no gradient but the balancing loss's, so at least 2 are
    asked for.
    balance: weight of `load_balancing_loss` over scores divided by their sum, in training mode.
    Raises ValueError for top_k below 2 or above n_experts.
    Source: DeepSeek-V3 (2024), section 2.1.2, without its bias and groups, balanced over the batch.
    """

    def __init__(self, dim: int, n_experts: int, top_k: int = 2, *, balance: float = 0.0):
        super().__init__(dim, n_experts)
        _check_top_k(top_k, n_experts)
        if top_k < 2:
            raise ValueError("top_k 1 leaves every weight at 1, so that the router learns nothing")
        self.top_k, self.balance = top_k, balance

    def forward(self, x: Tensor, sequences: int | None = None) -> Assignments:
        scores = self.logits(x).sigmoid()  # (tokens, n_experts)
        best, experts = scores.topk(self.top_k)  # (tokens, top_k) each
        probs = scores / scores.sum(-1, keepdim=True)
        if self.training and self.balance:
            counts = experts.flatten().bincount(minlength=self.n_experts)
            counts = shared_counts(self.group, counts, len(x))
            self.auxiliary_loss = self.balance * load_balancing_loss(probs, counts)
        return self.assign(experts, best / best.sum(-1, keepdim=True), probs)

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, top_k={self.top_k}"


class HashChoice(Router):
    """A token's experts follow from its vocabulary id, by a table that never changes.

    table: (vocab,) or (vocab, top_k) int64, from `random_table` or `balanced_table`. Weights are
    equal. The router is told the ids by `hash_by_token(model)`, once after the model is built.
    Raises ValueError for a table with entries outside 0 to n_experts - 1.
    Source: Hash Layers (Roller et al., 2021).
    """

    def __init__(self, table: Tensor, n_experts: int):
        super().__init__(n_experts)
        table = table[:, None] if table.ndim == 1 else table
        if not (int(table.min()) >= 0 and int(table.max()) < n_experts):
            raise ValueError(f"the table names experts outside 0 to {n_experts - 1}")
        self.register_buffer("table", table)
        self.ids: Tensor | None = None

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"ids": None}

    def forward(self, x: Tensor, sequences: int | None = None) -> Assignments:
        ids = self.ids
        if ids is not None and self.counted is not None:
            ids = ids[self.counted]
        if ids is None or ids.numel() != len(x):
            seen = "none" if ids is None else ids.numel()
            raise ValueError(
                f"{len(x)} tokens but {seen} ids: call hash_by_token(model) once, and the model, "
                "not its layers, with token ids"
            )
        experts = self.table[ids.flatten()]  # (tokens, top_k)
        return self.assign(experts, x.new_full(experts.shape, 1 / experts.shape[1]))

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, top_k={self.table.shape[1]}"


class _TellIds:
    """A hook before the embedding, which hands its ids on; copied with the model it belongs to."""

    def __init__(self, routers: list[HashChoice]):
        self.routers = routers

    def __call__(self, embedding: nn.Module, arguments: tuple) -> None:
        for router in self.routers:
            router.ids = arguments[0]


def hash_by_token(model: nn.Module) -> None:
    """From now on what the model embeds, its `HashChoice` routers get as ids, in place."""
    routers = [module for module in model.modules() if isinstance(module, HashChoice)]
    anatomy.embedding(model).register_forward_pre_hook(_TellIds(routers))


def random_table(vocab: int, n_experts: int, top_k: int = 1, seed: int = 0) -> Tensor:
    """top_k different experts for each id, drawn at random: (vocab, top_k) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(vocab, n_experts, generator=generator).topk(top_k).indices


def balanced_table(frequencies: Tensor, n_experts: int) -> Tensor:
    """One expert for each id, so that experts get about as many tokens: (vocab,) int64.

    frequencies: (vocab,), how often each id occurs. The most frequent id not yet placed goes to the
    expert with the fewest tokens. Source: the balanced assignment of Roller et al. (2021).
    """
    load = torch.zeros(n_experts, dtype=torch.float64)
    table = torch.empty(len(frequencies), dtype=torch.long)
    for token in frequencies.argsort(descending=True, stable=True).tolist():
        expert = int(load.argmin())
        table[token] = expert
        load[expert] += float(frequencies[token])
    return table


class Slots(NamedTuple):
    """What `SoftSlots` returns in the place of `Assignments`.

    dispatch, combine: (sequences, length, n_experts * slots); dispatch sums to 1 over a sequence's
    tokens, combine over slots.
    """

    dispatch: Tensor
    combine: Tensor

    def mix(self, experts: Experts, x: Tensor) -> Tensor:
        """Each expert runs its slots, which are mixtures of tokens: x (tokens, dim) -> same."""
        sequences, length, slots = self.dispatch.shape
        tokens = x.view(sequences, length, -1)
        rows = self.dispatch.transpose(1, 2).to(x.dtype) @ tokens  # (sequences, slots, dim)
        each = slots // experts.n_experts
        by_expert = rows.view(sequences, experts.n_experts, each, -1).transpose(0, 1)
        counts = torch.full((experts.n_experts,), sequences * each, device=x.device)
        out = experts(by_expert.reshape(sequences * slots, -1), counts)  # sorted by expert
        out = out.view(experts.n_experts, sequences, each, -1).transpose(0, 1)
        mixed = self.combine.to(x.dtype) @ out.reshape(sequences, slots, -1)
        return mixed.reshape(x.shape)  # (tokens, dim)


class SoftSlots(LinearRouter):
    """Each expert computes a few slots, every slot a weighted mean of all tokens of a sequence.

    slots: of each expert; length / n_experts of them cost what one expert a token costs.
    Nothing is chosen, so all is differentiable and balanced. But a slot sees the whole sequence,
    later tokens included: no language model can generate with it.
    Source: Soft MoE (Puigcerver et al., 2023), section 2, Algorithm 1, with the tokens and the
    slots' parameters normalized to length 1 and one learned scale.
    """

    by_sequence = True

    def __init__(self, dim: int, n_experts: int, slots: int = 1):
        super().__init__(dim, n_experts)
        self.slots = slots
        self.weight = nn.Parameter(torch.empty(n_experts * slots, dim).normal_(0.0, 0.02))
        self.scale = nn.Parameter(torch.ones(()))

    def logits(self, x: Tensor) -> Tensor:
        """x: (tokens, dim) -> (tokens, n_experts * slots), float32."""
        with torch.autocast(x.device.type, enabled=False):
            slots = self.scale.float() * F.normalize(self.weight.float(), dim=-1)
            return F.linear(F.normalize(x.float(), dim=-1), slots)

    def forward(self, x: Tensor, sequences: int | None = None) -> Slots:
        logits = self.logits(x).view(sequences or 1, -1, self.n_experts * self.slots)
        return Slots(logits.softmax(1), logits.softmax(2))

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, slots={self.slots}"


def _check_top_k(top_k: int, n_experts: int) -> None:
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k {top_k} is not between 1 and the {n_experts} experts")


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


def shared_counts(group: ProcessGroup | None, counts: Tensor, tokens: int) -> Tensor:
    """counts (n_experts,), of a batch of so many tokens with the shares of all processes' tokens.

    Processes may hold different numbers of tokens. As they are without a group.
    """
    if group is None:
        return counts
    import torch.distributed as dist

    total = torch.cat([counts, counts.new_tensor([tokens])]).float()
    dist.all_reduce(total, group=group)
    return total[:-1] * (tokens / total[-1].clamp(min=1))


def counted_places(router: Router, tokens: int) -> Tensor:
    """Which of a layer's tokens `router.counted` names: (counted,) int64.

    Raises ValueError when the mask is of other tokens, or when the router has to know where each
    sequence ends, since without padding they are not equally long.
    """
    if router.by_sequence:
        raise ValueError(
            f"{type(router).__name__} treats each sequence apart, and without padding they are not "
            "equally long: use one that treats the batch as a whole"
        )
    if router.counted.numel() != tokens:
        raise ValueError(f"a mask of {router.counted.numel()} for {tokens} tokens")
    return router.counted.flatten().nonzero()[:, 0]
