"""FlexiGPT (Smith et al., 2025): a block that is removed computes on with another block's weights.

Lab 804. Which blocks go: those that turn their input least (equation 1). Whose weights stand in:
those of the kept block that is nearest when both are seen through few singular values (equations 2
to 5). What is stored of the removed block: the difference to its stand-in, again in few singular
values, as two thin matrices that learn (equations 7 and 8), and a gain for each output feature,
which starts small (equation 6). The same parts make a trained model longer: blocks run once more,
each time with thin matrices of their own (section 3.5).

A shared block keeps the gains of the norms it reads through, two numbers a feature, frozen; the
paper does not say whose are used. Its baseline, ShortGPT (Men et al., 2024), drops the same blocks.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.calibration import token_losses
from lablib.models import anatomy
from lablib.paths import data_dir

GAMMA = 0.1  # what the outputs' gains start at: small; the paper names no value


def influence(x: Tensor, y: Tensor) -> Tensor:
    """How far a block turns what it reads: 0 when only lengths change. A scalar.

    x, y: (..., dim), the hidden states before and after it. Source: equation 1, ShortGPT's score.
    """
    # BI = 1 - E[x^T y / (|x| |y|)], over texts and positions
    return 1 - F.cosine_similarity(x, y, dim=-1).mean()


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two thin matrices, A (out, rank) and B (rank, in), whose product is nearest to weight.

    rank: at most min(out, in) are given. Source: equations 3 and 8.
    """
    u, s, v = torch.linalg.svd(weight, full_matrices=False)  # (out, k), (k,), (k, in)
    return (u * s)[:, :rank], v[:rank]  # A = (U S)[1:r], B = V[1:r]^T


def distance(w_i: Tensor, w_j: Tensor, rank: int, metric: str = "paper") -> Tensor:
    """How much of w_i a stand-in w_j with `rank` singular values of their difference misses.

    metric: "paper"; "whole" leaves out the first step, in which both are seen through few singular
    values; "plain" is |w_i - w_j|. Source: equation 2 and Figure 2's three metrics.
    """
    if metric == "paper":  # W^ = (U S)[1:r] V[1:r]^T, equations 3 and 4
        w_i, w_j = (a @ b for a, b in (low_rank(w_i, rank), low_rank(w_j, rank)))
    difference = w_i - w_j
    if metric == "plain":
        return difference.norm()
    a, b = low_rank(difference, rank)  # D = A B
    return (difference - a @ b).norm()  # |W^_i - (W^_j + D)|, equation 2


class SharedLinear(nn.Module):
    """A layer that computes with another one's weight, plus its own difference of low rank.

    base: the other layer, by reference; a (out, rank), b (rank, in): the difference; gain: (out,)
    where the output is normalized, as those of attention and feed-forward layer are.
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, gain: Tensor | None = None):
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a.clone()), nn.Parameter(b.clone())
        self.gain = None if gain is None else nn.Parameter(gain)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        h = self.base(x) + F.linear(F.linear(x, self.b), self.a)  # W_j x + A (B x)
        if self.gain is None:
            return h
        return F.layer_norm(h, h.shape[-1:], self.gain)  # (h - mean h) / std h * gain, equation 6

    def extra_repr(self) -> str:
        """What print shows."""
        return f"rank={self.b.shape[0]}, normalized={self.gain is not None}"


def shared_block(
    block: nn.Module, base: nn.Module, rank: int, gamma: float | None = GAMMA, start: str = "svd"
) -> nn.Module:
    """What stands in a block's place: base's weights, the difference to its own in `rank` parts.

    gamma: what the outputs' gains start at; None normalizes no output. start: "svd" of the
    difference (equation 7); "zero" starts as base itself, as LoRA does: a is 0 and b random.
    Norms are block's own, biases base's. Raises ValueError where one of the two is shared itself,
    or has no nn.Linear.
    """
    shared, others = _copied_over(base), _projections(block)
    for name, layer in _projections(base).items():
        difference = others[name].weight.detach() - layer.weight.detach()  # W_i - W_j
        a, b = low_rank(difference, rank) if start == "svd" else _zero(difference, rank)
        ends = name.rpartition(".")[2] in LAST and gamma is not None
        gain = torch.full_like(a[:, 0], gamma) if ends else None
        owner = shared.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], SharedLinear(layer, a, b, gain))
    _take_norms(shared, block)
    return shared


LAST = ("output", "down", "o_proj", "down_proj")  # the layers whose outputs join the residual


def _copied_over(base: nn.Module) -> nn.Module:
    """A copy of a block that has the same parameters, not equal ones."""
    shared = copy.deepcopy(base, {id(p): p for p in (*base.parameters(), *base.buffers())})
    return shared.train(base.training)


def _projections(block: nn.Module) -> dict[str, nn.Linear]:
    """Name below the block -> its linear layers."""
    modules = dict(block.named_modules())
    if any(isinstance(module, SharedLinear) for module in modules.values()):
        raise ValueError("a shared block can be no base, and is not shared once more")
    found = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    if not any(name.rpartition(".")[2] in LAST for name in found):
        raise ValueError(f"{type(block).__name__} has no nn.Linear called {' or '.join(LAST)}")
    return found


def _zero(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """a of zeros, and b drawn as nn.Linear draws its weight."""
    out, size = difference.shape
    b = difference.new_empty(min(rank, out, size), size)
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    return difference.new_zeros(out, len(b)), b


def _take_norms(shared: nn.Module, block: nn.Module) -> None:
    """The removed block's own norms, frozen."""
    for name, module in block.named_modules():
        if [*module.parameters(recurse=False)] and not isinstance(module, nn.Linear):
            owner, _, child = name.rpartition(".")
            own = copy.deepcopy(module).requires_grad_(False)
            setattr(shared.get_submodule(owner), child, own)


# From one block to a model.


def block_influence(model: nn.Module, rows: Tensor) -> Tensor:
    """Each block's influence (blocks,) on rows (n, length + 1) of text."""
    scores: list[list[Tensor]] = [[] for _ in anatomy.blocks(model)]

    def watch(place: int) -> Callable:
        def hook(block, given, made):
            after = made if isinstance(made, Tensor) else made[0]
            scores[place].append(influence(given[0], after))

        return hook

    blocks = enumerate(anatomy.blocks(model))
    handles = [block.register_forward_hook(watch(place)) for place, block in blocks]
    try:
        token_losses(model, rows, batch=1)  # a mean over rows is one over all positions, then
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.stack(found).mean() for found in scores])


def least(scores: Tensor, count: int) -> list[int]:
    """Where the `count` lowest scores are, in order of place. Raises ValueError for too many."""
    if not 0 <= count < len(scores):
        raise ValueError(f"{count} of {len(scores)} blocks can't go: at least one must stay")
    return sorted(scores.argsort()[:count].tolist())


def distances(
    model: nn.Module, rank: int, metric: str = "paper", roles: Sequence[str] = ()
) -> Tensor:
    """(blocks, blocks): `distance` between blocks, summed over a block's matrices.

    roles: those of `anatomy.projections`; all by default.
    """
    names = anatomy.family(model).projections
    parts = [_distances(_weights(model, role), rank, metric) for role in roles or names]
    return torch.stack(parts).sum(0)


def _weights(model: nn.Module, role: str) -> list[Tensor]:
    """One role's weights, block by block, with the shorter axis first."""
    layers = anatomy.projections(model, role).values()
    weights = [layer.weight.detach().float() for layer in layers]
    return [w if w.shape[0] <= w.shape[1] else w.t() for w in weights]


def _distances(weights: list[Tensor], rank: int, metric: str) -> Tensor:
    """The same as `distance` for every pair, each matrix taken apart once."""
    if metric == "paper":
        thin = [_thin(w, rank) for w in weights]  # W^ = A B
        return _each_pair(len(weights), lambda i, j: _missed_of_thin(thin[i], thin[j], rank))
    if metric == "whole":
        return _each_pair(len(weights), lambda i, j: _missed(weights[i] - weights[j], rank))
    return _each_pair(len(weights), lambda i, j: (weights[i] - weights[j]).norm())


def _each_pair(n: int, measure: Callable[[int, int], Tensor]) -> Tensor:
    table = torch.zeros(n, n)
    for i in range(n):
        for j in range(i):
            table[i, j] = table[j, i] = measure(i, j)
    return table


def _thin(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`low_rank` by way of W W^T (out, out): several times as fast, and as exact as is needed."""
    _, u = torch.linalg.eigh((weight @ weight.t()).double())  # eigenvalues from small to large
    u = u[:, -rank:].float()
    return u, u.t() @ weight  # the projection on the largest `rank` directions


def _missed(difference: Tensor, rank: int) -> Tensor:
    """The norm of all singular values after the first `rank`: what no rank-r matrix can hold."""
    squares = torch.linalg.eigvalsh((difference @ difference.t()).double())
    return squares[: max(0, len(squares) - rank)].clamp_min(0).sum().sqrt().float()


def _missed_of_thin(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], rank: int
) -> Tensor:
    """The same for A_i B_i - A_j B_j, whose rank is 2 r at most, so that 2 r x 2 r is enough."""
    left = torch.cat([first[0], second[0]], 1)  # (out, 2 r)
    right = torch.cat([first[1], -second[1]], 0)  # (2 r, in)
    small = torch.linalg.qr(left, mode="r").R @ right  # as long as the difference, on fewer rows
    return _missed(small, rank)


def bases(table: Tensor, pruned: Sequence[int]) -> dict[int, int]:
    """Each pruned block's stand-in: the nearest block that stays. Source: equation 5."""
    kept = [place for place in range(len(table)) if place not in set(pruned)]
    return {i: kept[int(table[i, kept].argmin())] for i in pruned}


def share_(
    model: nn.Module,
    chosen: Mapping[int, int],
    rank: int,
    gamma: float | None = GAMMA,
    start: str = "svd",
) -> nn.Module:
    """Put a `shared_block` in the place of each block i, with block chosen[i] as its base.

    Everything else is frozen. Returns the model.
    """
    blocks = anatomy.blocks(model)
    model.requires_grad_(False)
    made = {i: shared_block(blocks[i], blocks[j], rank, gamma, start) for i, j in chosen.items()}
    for place, block in made.items():
        blocks[place] = block
    _number(model)
    return model


def prune_(
    model: nn.Module, rows: Tensor, ratio: float, rank: int, gamma: float | None = GAMMA
) -> dict[int, int]:
    """FlexiGPT: the blocks of lowest influence on rows go, a shared one takes each one's place.

    ratio: the share of blocks that goes, rounded. Returns block -> base.
    """
    pruned = least(block_influence(model, rows), round(ratio * len(anatomy.blocks(model))))
    chosen = bases(distances(model, rank), pruned)
    share_(model, chosen, rank, gamma)
    return chosen


def extend_(
    model: nn.Module,
    first: int,
    last: int,
    times: int = 2,
    pattern: str = "block",
    rank: int = 8,
    gamma: float | None = GAMMA,
) -> nn.Module:
    """Run blocks first to last `times` times: each repetition shares the weights of the first run.

    pattern: "block" repeats each before the next comes, "sequential" the whole span. Weights ask
    for gradients as before, thin matrices (which start at 0) and gains besides. Returns the model.
    Source: section 3.5.
    """
    names = anatomy.family(model)
    blocks = list(anatomy.blocks(model))
    made: list[nn.Module] = []
    for place in order(len(blocks), first, last, times, pattern):
        block = blocks[place]
        again = any(block is earlier for earlier in made)
        made.append(shared_block(block, block, rank, gamma, "zero") if again else block)
    anatomy.replace(model, names.blocks, nn.ModuleList(made))
    _number(model)
    return model


def order(n: int, first: int, last: int, times: int = 2, pattern: str = "block") -> list[int]:
    """Which block runs when: n blocks, of which first to last run `times` times.

    Raises ValueError for a pattern or a span that can't be.
    """
    if not 0 <= first <= last < n or times < 1:
        raise ValueError(f"blocks {first} to {last}, {times} times, is no span of {n} blocks")
    span = range(first, last + 1)
    if pattern == "block":
        repeated = [place for place in span for _ in range(times)]
    elif pattern == "sequential":
        repeated = [*span] * times
    else:
        raise ValueError(f'pattern {pattern!r} can be "block" or "sequential"')
    return [*range(first), *repeated, *range(last + 1, n)]


def _number(model: nn.Module) -> None:
    """Tell a model of transformers how many blocks it has, and each attention which it is."""
    blocks = anatomy.blocks(model)
    for config in filter(None, (getattr(m, "config", None) for m in model.modules())):
        for key in ("n_layers", "num_hidden_layers"):
            if hasattr(config, key):
                setattr(config, key, len(blocks))
    for place, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place


def learning(model: nn.Module) -> list[str]:
    """The names of what a shared model trains: thin matrices and gains."""
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, SharedLinear)
        for key, _ in module.named_parameters(recurse=False)
    ]


def shared_places(model: nn.Module) -> list[int]:
    """Which blocks are shared ones."""
    blocks = enumerate(anatomy.blocks(model))
    return [i for i, b in blocks if any(isinstance(m, SharedLinear) for m in b.modules())]


class Skip(nn.Module):
    """A block that does nothing."""

    def forward(self, x: Tensor, *rest, **more) -> Tensor:
        """x: (batch, length, dim), as it is."""
        return x


@contextlib.contextmanager
def without(model: nn.Module, places: Sequence[int]) -> Iterator[nn.Module]:
    """The model computes without these blocks, as ShortGPT's; afterwards it has them back."""
    blocks = anatomy.blocks(model)
    before = {place: blocks[place] for place in places}
    try:
        for place in before:
            blocks[place] = Skip()
        yield model
    finally:
        for place, block in before.items():
            blocks[place] = block


@torch.no_grad()
def speculate(model: nn.Module, tokens: Tensor, new: int, ahead: int = 4) -> tuple[Tensor, float]:
    """Greedy continuation (length + new,) of tokens (length,), drafted without the shared blocks.

    ahead: tokens drafted before the whole model looks at all of them at once, and keeps those that
    it would have chosen itself; the result is its own. Also returns the share of drafted tokens
    that were kept. Without a cache, so it shows how many steps are saved, not how much time.
    Source: section 4.2.
    """
    end, places, drafted, kept = len(tokens) + new, shared_places(model), 0, 0
    while len(tokens) < end:
        size = min(ahead, end - len(tokens) - 1)
        draft = tokens
        with without(model, places):
            for _ in range(size):
                draft = torch.cat([draft, _next(model, draft)[-1:]])
        best = _next(model, draft)[len(tokens) - 1 :]  # what the whole model says, size + 1 of them
        same = (draft[len(tokens) :] == best[:size]).long().cumprod(0).sum().item()
        tokens = torch.cat([tokens, best[: same + 1]])  # its own next token comes for free
        drafted, kept = drafted + size, kept + same
    return tokens, kept / max(1, drafted)


def _next(model: nn.Module, tokens: Tensor) -> Tensor:
    """The likeliest token after each of tokens (length,)."""
    return anatomy.logits(model, tokens[None])[0].argmax(-1)


# What is stored.


def block_parameters(dim: int, ffn_dim: int, kv_dim: int | None = None) -> int:
    """Of a Llama block: four matrices of attention, three of the feed-forward layer, two norms."""
    return sum(out * size for out, size in _shapes(dim, ffn_dim, kv_dim)) + 2 * dim


def shared_parameters(dim: int, ffn_dim: int, rank: int, kv_dim: int | None = None) -> int:
    """What a shared block stores of its own: thin matrices and two gains of the outputs.

    Norms that it reads through are left out: they may be its base's.
    """
    return sum(rank * (out + size) for out, size in _shapes(dim, ffn_dim, kv_dim)) + 2 * dim


def _shapes(dim: int, ffn_dim: int, kv_dim: int | None) -> list[tuple[int, int]]:
    kv_dim = kv_dim or dim
    attention = [(dim, dim), (kv_dim, dim), (kv_dim, dim), (dim, dim)]
    return [*attention, (ffn_dim, dim), (ffn_dim, dim), (dim, ffn_dim)]


def published() -> list[dict[str, str]]:
    """The paper's tables: a row for each figure, with its table."""
    with (data_dir() / "published" / "flexigpt.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
