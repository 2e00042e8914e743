"""Compression by neural architecture search (Sukthanker et al., 2024): one model that holds many.

Lab 805. Sort a decoder's heads, neurons and channels by importance; then the first k of each are a
smaller model, and its weights are the large one's. `sandwich_loss` trains the largest, the smallest
and a few random ones together, so that any can be taken out; `evolve` looks for the good ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lablib.compression import importance
from lablib.compression.recover import cross_entropy
from lablib.compression.structures import Keep, parameters_of, remaining, sizes, sliced
from lablib.models import anatomy


@dataclass(frozen=True)
class Config:
    """How much a sub-network has: blocks, channels, and for each block of the whole model its
    key-value groups (each takes its query heads along) and neurons, also where the block goes."""

    blocks: int
    groups: tuple[int, ...]
    neurons: tuple[int, ...]
    channels: int


class Space:
    """The sub-networks of a sorted model: all choices of each size, or of each block's own sizes.

    blocks, groups, neurons, channels: the choices; None is the whole model's alone. fine: each
    block chooses for itself. order: the blocks, the most important first; None is first to last.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[int] | None = None,
        groups: Sequence[int] | None = None,
        neurons: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        fine: bool = False,
        order: Sequence[int] | None = None,
    ):
        self.model, self.size, self.fine = model, sizes(model), fine
        # The same parameters in plain layers, also once the model's have got adapters.
        self.plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        self.bones = copy.deepcopy(model, {id(p): _no_values(p) for p in model.parameters()})
        self.order = list(range(self.size.blocks)) if order is None else list(order)
        self.blocks = sorted(blocks or [self.size.blocks])
        self.groups = sorted(groups or [self.size.kv_heads])
        self.neurons = sorted(neurons or [self.size.neurons])
        self.channels = sorted(channels or [self.size.channels])
        self._shells: dict[Config, Shell] = {}
        self._counts: dict[Config, int] = {}

    def config(self, blocks: int, groups: int, neurons: int, channels: int | None = None) -> Config:
        """One value for all blocks."""
        n = self.size.blocks
        channels = channels or self.channels[-1]
        return Config(blocks, (groups,) * n, (neurons,) * n, channels)

    @property
    def largest(self) -> Config:
        """The most of everything."""
        return self.config(self.blocks[-1], self.groups[-1], self.neurons[-1], self.channels[-1])

    @property
    def smallest(self) -> Config:
        """The least of everything."""
        return self.config(self.blocks[0], self.groups[0], self.neurons[0], self.channels[0])

    def grid(self) -> list[Config]:
        """All with one value for all blocks."""
        return [
            self.config(b, g, n, c)
            for b in self.blocks
            for g in self.groups
            for n in self.neurons
            for c in self.channels
        ]

    def sample(self, random: np.random.Generator) -> Config:
        """Uniform over choices: most of a fine space lies near the middle of its sizes."""
        n = self.size.blocks if self.fine else 1
        groups, neurons = (random.choice(of, n) for of in (self.groups, self.neurons))
        each = [tuple(int(v) for v in np.resize(values, self.size.blocks))
                for values in (groups, neurons)]  # fmt: skip
        blocks, channels = (int(random.choice(of)) for of in (self.blocks, self.channels))
        return self.one_name(Config(blocks, *each, channels))

    def one_name(self, config: Config) -> Config:
        """With the most of everything in blocks that go: a sub-network has one configuration."""
        if not self.fine:
            return config
        stays = self.order[: config.blocks]
        most = {"groups": self.groups[-1], "neurons": self.neurons[-1]}
        given = {of: getattr(config, of) for of in most}
        return replace(config, **{
            of: tuple(v if place in stays else most[of] for place, v in enumerate(values))
            for of, values in given.items()
        })  # fmt: skip

    def sample_evenly(self, random: np.random.Generator, bins: int = 8, tries: int = 50) -> Config:
        """Uniform over bins of the number of parameters: the calibrated sampler.

        A bin is drawn, then configurations until one falls into it; after `tries` the nearest.
        """
        low, high = self.parameters(self.smallest), self.parameters(self.largest)
        middle = low + (high - low) * (random.integers(bins) + 0.5) / bins
        drawn = [self.sample(random) for _ in range(tries)]
        near = [abs(self.parameters(config) - middle) for config in drawn]
        inside = [c for c, gap in zip(drawn, near, strict=True) if gap <= (high - low) / bins / 2]
        return inside[0] if inside else drawn[int(np.argmin(near))]

    def neighbor(self, config: Config, random: np.random.Generator) -> Config:
        """One of its values one choice up or down: what local search and mutation try."""
        open_ = [
            of for of in ("blocks", "groups", "neurons", "channels") if len(getattr(self, of)) > 1
        ]
        where = str(random.choice(open_))
        choices, value = getattr(self, where), getattr(config, where)
        if isinstance(value, int):
            return self.one_name(replace(config, **{where: _step(choices, value, random)}))
        there = self.order[: config.blocks]
        places = [int(random.choice(there))] if self.fine else range(len(value))
        to = _step(choices, value[places[0]], random)
        changed = (to if place in places else old for place, old in enumerate(value))
        return replace(config, **{where: tuple(changed)})

    def crossed(self, one: Config, other: Config, random: np.random.Generator) -> Config:
        """Each value from either parent."""

        def either(a, b):
            return a if random.random() < 0.5 else b

        each = [
            tuple(either(*pair) for pair in zip(getattr(one, of), getattr(other, of), strict=True))
            if self.fine
            else either(getattr(one, of), getattr(other, of))
            for of in ("groups", "neurons")
        ]
        blocks, channels = (
            either(getattr(one, of), getattr(other, of)) for of in ("blocks", "channels")
        )
        return self.one_name(Config(blocks, *each, channels))

    def keep(self, config: Config) -> Keep:
        """The first of each, and the most important blocks in their own order."""
        share = self.size.heads // self.size.kv_heads
        return Keep(
            blocks=sorted(self.order[: config.blocks]),
            heads=[range(share * groups) for groups in config.groups],
            neurons=[range(neurons) for neurons in config.neurons],
            channels=range(config.channels),
        )

    def parameters(self, config: Config) -> int:
        """Of the sub-network."""
        if config not in self._counts:
            self._counts[config] = parameters_of(self.bones, self.keep(config))
        return self._counts[config]

    def sub_network(self, config: Config) -> Shell:
        """The smaller model, on the large one's weights: training one trains the other."""
        if config not in self._shells:
            self._shells[config] = Shell(self.model, self.bones, self.keep(config))
        return self._shells[config]

    def cut(self, config: Config) -> nn.Module:
        """The same as a model of its own."""
        return sliced(self.plain, self.keep(config))


def _step(choices: Sequence[int], value: int, random: np.random.Generator) -> int:
    place = choices.index(value) + int(random.choice([-1, 1]))
    return choices[min(max(place, 0), len(choices) - 1)]


class Shell:
    """A sub-network: callable as a model, with views of the whole model's weights inside.

    model: whose weights it has; bones: the same without adapters and values. What is kept must come
    first along each axis.
    """

    def __init__(self, model: nn.Module, bones: nn.Module, keep: Keep):
        self.model, self.small = model, sliced(bones, keep)
        top, places = anatomy.family(bones).blocks, list(keep.blocks)
        gain = math.sqrt(sizes(bones).channels / len(keep.channels))
        there = {name for name, _ in self.small.named_parameters()}
        norms = {f"{name}.weight" for name in anatomy.norms(self.small)}
        self.views = []  # its name here, its name in the whole, how much of it, times what
        for name, axes in remaining(bones, keep).items():
            block, _, rest = name.removeprefix(f"{top}.").partition(".")
            inside = name.startswith(f"{top}.")
            own = f"{top}.{places.index(int(block))}.{rest}" if inside else name
            if own in there:
                part = tuple(slice(0, len(axis)) for axis in axes)
                self.views.append((own, name, part, gain if own in norms else 1.0))

    def __call__(self, tokens: Tensor) -> Tensor:
        """(batch, length) -> logits (batch, length, vocab)."""
        weights = {
            own: _weight(self.model, name)[part] * gain
            if gain != 1
            else _weight(self.model, name)[part]
            for own, name, part, gain in self.views
        }
        made = functional_call(self.small, weights, (tokens,))
        return getattr(made, "logits", made)


def _no_values(parameter: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _weight(model: nn.Module, name: str) -> Tensor:
    """Of a plain layer its parameter; of one with LoRA the sum, so that adapters learn."""
    module, _, which = name.rpartition(".")
    return getattr(model.get_submodule(module), which)


@torch.no_grad()
def sort_by_importance_(model: nn.Module, rows: Tensor, *of: str) -> None:
    """Put the most important first, in place; the model computes what it did.

    rows: (n, length + 1), a little text. of: "neurons", "heads" (whole key-value groups) and
        "channels"; none is the first two.
    """
    for what in of or ("neurons", "heads"):
        {"neurons": _sort_neurons, "heads": _sort_heads, "channels": _sort_channels}[what](
            model, rows
        )


def _sort_neurons(model: nn.Module, rows: Tensor) -> None:
    for block, score in enumerate(importance.of_neurons(model, rows)):
        order = score.argsort(descending=True)
        for role, axis in (("gate", 0), ("up", 0), ("down", 1)):
            _permute(anatomy.projection(model, block, role), order, axis)


def _sort_heads(model: nn.Module, rows: Tensor) -> None:
    size = sizes(model)
    share = size.heads // size.kv_heads
    for block, score in enumerate(importance.of_heads(model, rows)):
        groups = score.square().view(-1, share).sum(1).argsort(descending=True)
        wide = _spread(groups, share * size.head_dim)
        narrow = _spread(groups, size.head_dim)
        for role, order, axis in (
            ("query", wide, 0),
            ("key", narrow, 0),
            ("value", narrow, 0),
            ("output", wide, 1),
        ):
            _permute(anatomy.projection(model, block, role), order, axis)


def _sort_channels(model: nn.Module, rows: Tensor) -> None:
    readers = ("query", "key", "value", "gate", "up")
    order = importance.of_channels(model, rows).argsort(descending=True)
    for layer in anatomy.projections(model, *readers).values():
        _permute(layer, order, 1)
    for layer in anatomy.projections(model, "output", "down").values():
        _permute(layer, order, 0)
    for norm in anatomy.norms(model).values():
        _permute(norm, order, 0)
    table, head = anatomy.embedding(model), anatomy.head(model)
    _permute(table, order, 1)
    if head.weight is not table.weight:
        _permute(head, order, 1)


def _spread(groups: Tensor, width: int) -> Tensor:
    """Places of all rows of groups: (groups,) -> (groups * width,)."""
    return (groups[:, None] * width + torch.arange(width)).flatten()


def _permute(layer: nn.Module, order: Tensor, axis: int) -> None:
    layer.weight.copy_(layer.weight.index_select(axis, order))
    if axis == 0 and getattr(layer, "bias", None) is not None:
        layer.bias.copy_(layer.bias[order])


def sandwich_loss(
    space: Space,
    random: np.random.Generator,
    *,
    n_random: int = 2,
    distill: float = 0.0,
    temperature: float = 1.0,
    evenly: bool = False,
) -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss for `recover`: of the largest, the smallest and a few random sub-networks, added.

    Universally slimmable networks (Yu and Huang, 2019). distill: share of in-place distillation in
        the smaller ones' loss, 0 to 1: the largest's logits, without a gradient, teach.
    evenly: draw by the number of parameters.
    """
    draw = space.sample_evenly if evenly else space.sample

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        teacher = space.sub_network(space.largest)(rows[:, :-1])
        total = cross_entropy(teacher, rows)
        for config in (space.smallest, *(draw(random) for _ in range(n_random))):
            logits = space.sub_network(config)(rows[:, :-1])
            part = (1 - distill) * cross_entropy(logits, rows) if distill < 1 else 0.0
            if distill:
                part = part + distill * divergence(logits, teacher.detach(), temperature)
            total = total + part
        return total

    return loss


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student), both softened by T; logits (..., vocab) -> a mean, nats.

    Hinton et al., 2015.
    """
    soft = F.log_softmax(student.float() / temperature, -1)
    target = F.log_softmax(teacher.float() / temperature, -1)
    kl = (target.exp() * (target - soft)).sum(-1)
    return temperature**2 * kl.mean()


def own_loss(space: Space, config: Config) -> Callable[[nn.Module, Tensor], Tensor]:
    """A loss that trains one sub-network alone."""
    return lambda model, rows: cross_entropy(space.sub_network(config)(rows[:, :-1]), rows)


# The front.


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats in both coordinates, by the first one.

    Lower is better. O(n log n): sort by the first, keep what lowers the second.
    """
    order = sorted(range(len(points)), key=lambda place: points[place])
    front: list[int] = []
    for place in order:
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front


def hypervolume(points: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """The area between a front and a reference point that is worse than all of it."""
    area, height = 0.0, reference[1]
    for place in pareto(points):
        x, y = points[place]
        if x < reference[0] and y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return area


# Search.

Measure = Callable[[Config], tuple[float, float]]


def random_search(space: Space, measure: Measure, tries: int, random: np.random.Generator) -> dict:
    """Config -> (size, loss) of as many different ones as are tried."""
    found: dict[Config, tuple[float, float]] = {}
    for _ in range(20 * tries):
        if len(found) >= tries:
            break
        _try(found, space.sample(random), measure)
    return found


def local_search(
    space: Space, measure: Measure, tries: int, random: np.random.Generator, start: Config
) -> dict:
    """From a configuration on: neighbours of the front that has been found."""
    found = {start: measure(start)}
    for _ in range(20 * tries):
        if len(found) >= tries:
            break
        names = list(found)
        front = [names[place] for place in pareto([*found.values()])]
        _try(found, space.neighbor(front[random.integers(len(front))], random), measure)
    return found


def evolve(
    space: Space, measure: Measure, tries: int, random: np.random.Generator, population: int = 12
) -> dict:
    """NSGA-II's idea (Deb et al., 2002): parents by front, then by distance from their neighbours.

    Half of the children are crossed, all are mutated. Returns all that was measured.
    """
    found = random_search(space, measure, population, random)
    for _ in range(20 * tries):
        if len(found) >= tries:
            break
        parents = survivors(found, population)
        one, other = (parents[random.integers(len(parents))] for _ in range(2))
        child = space.crossed(one, other, random) if random.random() < 0.5 else one
        _try(found, space.neighbor(child, random), measure)
    return found


def survivors(found: dict[Config, tuple[float, float]], n: int) -> list[Config]:
    """Front by front; of the one that doesn't fit whole, those with the most room."""
    left, chosen = dict(found), []
    while left and len(chosen) < n:
        names = list(left)
        front = [names[place] for place in pareto([*left.values()])]
        room = crowding([left[config] for config in front])
        front = [config for _, config in sorted(zip(room, front, strict=True), key=lambda t: -t[0])]
        chosen += front[: n - len(chosen)]
        for config in front:
            del left[config]
    return chosen


def crowding(front: Sequence[tuple[float, float]]) -> list[float]:
    """Room of each point of a sorted front: the box of its neighbours; infinite at both ends."""
    span = [max(values) - min(values) or 1.0 for values in zip(*front, strict=True)]
    inner = [
        sum(abs(after[axis] - before[axis]) / span[axis] for axis in (0, 1))
        for before, after in zip(front, front[2:], strict=False)
    ]
    return [math.inf, *inner, math.inf][: len(front)] if len(front) > 1 else [math.inf]


def _try(found: dict, config: Config, measure: Measure) -> None:
    if config not in found:
        found[config] = measure(config)


def uniform(space: Space) -> Iterable[Config]:
    """Shrinking that needs no search: all blocks, groups and neurons in proportion."""
    for neurons in space.neurons:
        share = neurons / space.size.neurons
        groups = min(space.groups, key=lambda g: (abs(g / space.size.kv_heads - share), -g))
        yield space.config(space.blocks[-1], groups, neurons)
