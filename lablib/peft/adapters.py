"""Adapters (Poth et al., 2023): many methods behind one verb, and blocks that compose them.

Lab 702. At a place of the model, an adapter is a function of what a sublayer reads and of what it
gives, h <- f(x, h). A composition is such a function, too, made of named ones:

    Stack(a, b)        f_b(x, f_a(x, h))
    Average(a, b)      sum_i w_i f_i(x, h)
    Fuse(a, b)         h + attention over what each adds, f_i(x, h) - h
    Split(a, b)        f_a for the first positions, f_b for the rest
    BatchSplit(a, b)   f_a for the first texts, f_b for the rest
    Parallel(a, b)     each text once for each of them

The methods that can be named and composed are among those of `adapters_library`.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lablib.models import anatomy, sublayers
from lablib.models.hooks import drop_hooks_
from lablib.peft.adapter import (
    SublayerAdapter,
    WeightAdapter,
    adapters,
    matrix,
    method,
    trainable,
)
from lablib.peft.adapters_library import (
    METHODS,
    RECORDED,
    Serial,
    copy_from_library_,
    recorded_base,
    recorded_of,
    recorded_states,
)
from lablib.peft.fusion import Fusion
from lablib.peft.prefix import _by_name, _first_by_place


class Composition:
    """Names of adapters, and compositions of them, in order.

    Called as f(place, x, h) with x, h: (batch, length, dim) -> (batch, length, dim), where
    place.run(child, x, h) is f_child(x, h). Raises ValueError without children.
    """

    def __init__(self, *children: str | Composition):
        if not children:
            raise ValueError(f"{type(self).__name__} has nothing in it: give it adapters' names")
        self.children = children

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.children))})"


class Stack(Composition):
    """One after another: each reads what the one before it gave."""

    def __call__(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        for child in self.children:
            h = place.run(child, x, h)  # h <- f_i(x, h)
        return h


class Average(Composition):
    """Outputs, weighed. weights: one a child, of any sign; None is the mean."""

    def __init__(self, *children: str | Composition, weights: Sequence[float] | None = None):
        super().__init__(*children)
        self.weights = tuple(weights or [1 / len(children)] * len(children))
        _as_many(self, self.weights, "weights")

    def __call__(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        outputs = [place.run(child, x, h) for child in self.children]
        return sum(w * f for w, f in zip(self.weights, outputs))  # sum_i w_i f_i(x, h)


class Fuse(Composition):
    """AdapterFusion: each token asks which adapters it needs. Needs `add_fusion_`."""

    def __call__(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        added = torch.stack([place.run(child, x, h) - h for child in self.children])
        fusion, read = place.fusion_of(self, x, h)  # added: (adapters, batch, length, dim)
        mixed = (fusion.shares(read, added)[..., None] * added).sum(0)  # -> (batch, length, dim)
        return h + fusion.value(mixed)


class Split(Composition):
    """By position. sizes: how many positions each gets."""

    axis = 1

    def __init__(self, *children: str | Composition, sizes: Sequence[int]):
        super().__init__(*children)
        self.sizes = tuple(sizes)
        _as_many(self, self.sizes, "sizes")

    def __call__(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        if sum(self.sizes) != (many := h.shape[self.axis]):
            what = ("texts", "positions")[self.axis]
            raise ValueError(f"{self} has sizes for {sum(self.sizes)} {what}, and there are {many}")
        parts = zip(self.children, *(t.split(self.sizes, self.axis) for t in (x, h)))
        return torch.cat([place.run(child, *part) for child, *part in parts], self.axis)


class BatchSplit(Split):
    """By text. sizes: how many texts each gets."""

    axis = 0


class Parallel(Composition):
    """Every text once for each child: the model gives (children * batch, length, dim).

    `active` repeats the batch ahead of the lowest block with an adapter; blocks below run once.
    """

    def __call__(self, place: Place, x: Tensor, h: Tensor) -> Tensor:
        each = len(h) // len(self.children)
        return BatchSplit(*self.children, sizes=[each] * len(self.children))(place, x, h)


BLOCKS = {block.__name__: block for block in (Stack, Average, Fuse, Split, BatchSplit, Parallel)}


def parse(text: str) -> str | Composition:
    """'Stack(fr, Parallel(mood, topic))' -> the composition; a lone name stays a name.

    Numbers come by keyword: 'Average(a, b, weights=[2, -1])'.
    Raises ValueError that says what can't be read.
    """
    try:
        return _read(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{text!r} can't be read: {error.msg}") from None


def _read(node: ast.expr) -> str | Composition:
    if isinstance(node, ast.Name):
        return node.id
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in BLOCKS):
        known = ", ".join(BLOCKS)
        raise ValueError(f"{ast.unparse(node)!r} is neither a name nor one of {known}")
    numbers = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
    try:
        return BLOCKS[node.func.id](*map(_read, node.args), **numbers)
    except TypeError as error:
        raise ValueError(f"{ast.unparse(node)!r}: {error}") from None


def flat(composition: str | Composition) -> list[str]:
    """The names in it, in order."""
    if isinstance(composition, str):
        return [composition]
    return [name for child in composition.children for name in flat(child)]


def channels(composition: str | Composition) -> int:
    """How often each text comes out. Raises ValueError for a Parallel within another block."""
    if isinstance(composition, str):
        return 1
    inner = {channels(child) for child in composition.children} - {1}
    if isinstance(composition, Stack) and len(inner) < 2:
        return max(inner, default=1)
    if inner:
        raise ValueError(f"{composition}: a Parallel stands alone or in a Stack, of one width")
    return len(composition.children) if isinstance(composition, Parallel) else 1


def _as_many(block: Composition, numbers: Sequence, what: str) -> None:
    if len(numbers) != len(block.children):
        raise ValueError(f"{block} has {len(numbers)} {what} for {len(block.children)} children")


# Places: where named adapters lie.


class Place:
    """What lies at one place of a model: named parts, and how they are composed now."""

    composition: str | Composition | None = None
    parts: nn.ModuleDict
    fusions: nn.ModuleDict

    def run(self, child: str | Composition, x: Tensor, h: Tensor) -> Tensor:
        """f_child(x, h); h itself where the place has no part of such a name."""
        if not set(flat(child)) & set(self.parts):
            return h
        return child(self, x, h) if isinstance(child, Composition) else self.part(child, x, h)

    def part(self, name: str, x: Tensor, h: Tensor) -> Tensor:
        """f of one part."""
        return self.parts[name](x, h)


class SublayerPlace(Place, SublayerAdapter):
    """Named adapters behind one sublayer."""

    def __init__(self):
        super().__init__()
        self.parts, self.fusions = nn.ModuleDict(), nn.ModuleDict()

    def fusion_of(self, fuse: Fuse, x: Tensor, h: Tensor) -> tuple[Fusion, Tensor]:
        """The fusion of these names, and what its query reads: what the last adapter does."""
        if (key := ",".join(flat(fuse))) not in self.fusions:
            raise ValueError(f"{fuse} has no attention yet: call add_fusion_ with its names")
        last = self.parts[flat(fuse)[-1]]
        return self.fusions[key], last.reads(x, h) if isinstance(last, Serial) else h

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim) -> (batch, length, dim)."""
        return h if self.composition is None else self.run(self.composition, x, h)


class ProjectionPlace(Place, WeightAdapter):
    """Named changes of one projection. Stacked ones add; none is merged into the weight here."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.parts = nn.ModuleDict()

    @property
    def weight(self) -> Tensor:
        """(out, in), of the base."""
        return matrix(self.base)

    def part(self, name: str, x: Tensor, h: Tensor) -> Tensor:
        """h and what the part changes."""
        adapter = self.parts[name]
        return h + adapter.changed(x) - self.base(x)

    def delta(self) -> Tensor:
        """Raises ValueError: which change it is depends on what is active."""
        raise ValueError("named adapters stay beside the weight: merge an unnamed one")

    def changed(self, x: Tensor) -> Tensor:
        """x: (batch, length, in) -> (batch, length, out)."""
        h = self.base(x)
        return h if self.composition is None else self.run(self.composition, x, h)


COMPOSABLE = ("seq_bn", "double_seq_bn", "par_bn", "compacter", "lora", "ia3")


@method
def add_(
    model: nn.Module, name: str, kind: str, sizes: Mapping | None = None, below: int = 0
) -> None:
    """Put an adapter called `name` into the model; it does nothing until it is `active`.

    kind: one of COMPOSABLE. sizes: arguments of METHODS[kind]. below: so many of the lowest blocks
    get none. Raises ValueError for another kind, for a name that is taken or is no plain word.
    """
    if kind not in COMPOSABLE:
        raise ValueError(f"{kind!r} is none of {', '.join(COMPOSABLE)}: others stand by themselves")
    reserved = name in BLOCKS or hasattr(nn.ModuleDict, name)
    if name in names(model) or reserved or not name.isidentifier():
        raise ValueError(f"{name!r} is taken, or is no plain word")
    noted = list(getattr(model, "peft_methods", []))
    changed, layers = set(sublayers.changes(model)), anatomy.projections(model)
    METHODS[kind](model, **(sizes or {}))
    model.peft_methods = noted  # `add_` is what is noted
    low = tuple(f"{anatomy.family(model).blocks}.{block}." for block in range(below))
    for place in set(sublayers.changes(model)) - changed:
        _gather_change(model, place, name, place.startswith(low))
    for place, layer in layers.items():
        if model.get_submodule(place) is not layer:
            _gather_projection(model, place, layer, name, place.startswith(low))


def _gather_change(model: nn.Module, place: str, name: str, leave_out: bool) -> None:
    """Put a new change of a sublayer into that sublayer's place, the first one as the place."""
    outer, _, own = place.rpartition(".")
    module, change = model.get_submodule(outer), model.get_submodule(place)
    if leave_out or hasattr(module, "named"):
        sublayers.undo_(model, place)
    if leave_out:
        return
    part = change.change
    if not hasattr(module, "named"):
        delattr(module, own)
        module.named, change.change = change, SublayerPlace()
    module.named.change.parts[name] = part


def _gather_projection(
    model: nn.Module, place: str, layer: nn.Module, name: str, leave_out: bool
) -> None:
    part = model.get_submodule(place)
    if not leave_out and not isinstance(layer, ProjectionPlace):
        layer = ProjectionPlace(layer)
    anatomy.replace(model, place, layer)
    if not leave_out:
        part.base = layer.base
        layer.parts[name] = part


def places(model: nn.Module) -> dict[str, Place]:
    """Dotted name -> place."""
    return {
        name: adapter for name, adapter in adapters(model).items() if isinstance(adapter, Place)
    }


def names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, as they came."""
    return list(dict.fromkeys(name for place in places(model).values() for name in place.parts))


def parameters_of(model: nn.Module, name: str) -> list[str]:
    """Dotted names of the parameters of one named adapter, or of a fusion, "a,b"."""
    marks = f".parts.{name}.", f".fusions.{name}."
    return [n for n in trainable(model) if any(mark in n for mark in marks)]


@method
def add_fusion_(model: nn.Module, fused: Sequence[str]) -> None:
    """Put the attention that `Fuse` of these names needs behind every sublayer that has them."""
    weight = anatomy.embedding(model).weight
    found = [
        place
        for place in places(model).values()
        if isinstance(place, SublayerPlace) and set(fused) <= set(place.parts)
    ]
    if not found:
        raise ValueError(f"no sublayer has adapters called {', '.join(fused)}")
    for place in found:
        place.fusions[",".join(fused)] = Fusion(weight.shape[1]).to(weight)


@torch.no_grad()
def average_(model: nn.Module, name: str, weights: Mapping[str, float]) -> None:
    """Put a new adapter into the model whose numbers are a sum of others', of one kind and size.

    weights: name -> coefficient, of any sign. LoRA's two factors are summed apart, as in the
    library, which is not the sum of the products.
    """
    first = next(iter(weights))
    verb = f"{add_.__module__}:{add_.__name__}"
    options = next(o for v, o in model.peft_methods if v == verb and o["name"] == first)
    add_(model, **options | {"name": name})
    for place in places(model).values():
        if name in place.parts:
            every = {other: place.parts[other].own() for other in weights}
            for key, parameter in place.parts[name].own().items():
                parameter.copy_(sum(w * every[other][key] for other, w in weights.items()))


@contextlib.contextmanager
def active(model: nn.Module, composition: str | Composition) -> Iterator[None]:
    """The model with its named adapters composed so; outside, none of them does anything.

    composition: or its text, as `parse` reads it. Raises ValueError for a name that no adapter has.
    """
    block = parse(composition) if isinstance(composition, str) else composition
    if unknown := set(flat(block)) - set(names(model)):
        raise ValueError(f"no adapter is called {', '.join(sorted(unknown))}: {names(model)}")
    found, repeat = places(model).values(), Repeat(channels(block))
    before = [place.composition for place in found]
    try:
        repeat.put(model)
        for place in found:
            place.composition = block
        yield
    finally:
        drop_hooks_(model, repeat)
        for place, composition in zip(found, before):
            place.composition = composition


class Repeat:
    """Repeats the batch ahead of the lowest block with a place, and every mask above it."""

    def __init__(self, times: int):
        self.times = times
        self.first: nn.Module | None = None

    def put(self, model: nn.Module) -> None:
        """Watch the blocks, where there is something to repeat."""
        blocks = anatomy.blocks(model)
        holds = [any(isinstance(m, Place) for m in block.modules()) for block in blocks]
        if self.times > 1 and any(holds):
            lowest = holds.index(True)
            self.first = blocks[lowest]
            for block in blocks[lowest:]:
                block.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Ahead of a block."""
        given = _by_name(module, args, kwargs)
        states = next(iter(given))
        if module is self.first:
            given[states] = self._repeated(given[states])
        batch = len(given[states]) // self.times
        for name, value in given.items():
            if isinstance(value, Tensor) and name != states and 1 < len(value) == batch:
                given[name] = self._repeated(value)
        return _first_by_place(given)

    def _repeated(self, tensor: Tensor) -> Tensor:
        return tensor.repeat(self.times, *[1] * (tensor.ndim - 1))


def recorded_pair(kind: str) -> nn.Module:
    """The recorded BERT with the library's adapters a and b, and their fusion where there is one.

    kind: "seq_bn", "double_seq_bn" or "lora".
    """
    model = recorded_base()
    for name in ("a", "b"):
        add_(model, name, kind, RECORDED[kind])
        copy_from_library_(model, recorded_of(f"{kind}:{name}:"), name)
    if weights := recorded_of(f"{kind}:fusion:"):
        add_fusion_(model, ["a", "b"])
        copy_from_library_(model, weights, "a,b")
    return model


def compare_compositions(kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Composition -> our output and the library's; that of "its own Average" is another thing."""
    model, found = recorded_pair(kind), {}
    for text, output in recorded_of(f"{kind}:").items():
        if "(" in text:
            with active(model, text.removeprefix("its own ")):
                found[text] = recorded_states(model), output
    return found
