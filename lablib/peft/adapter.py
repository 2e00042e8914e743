"""What every method of parameter-efficient tuning shares: its verbs.

A method is a function of a model that puts `Adapter` modules into it, in place (`lora_`, ...). Then
`freeze_base_` leaves only those to train, `disabled` computes what the model computed before, bit
for bit, `merge_` writes a change of weights into them, `remove_` takes all of it out again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.files import atomic_write
from lablib.models import anatomy, sublayers


class Adapter(nn.Module):
    """A part that a method adds. Computes the base's function while it is not `enabled`."""

    enabled = True

    def own(self) -> dict[str, nn.Parameter]:
        """Name below this module -> parameter, of those that the method brought."""
        return {n: p for n, p in self.named_parameters() if not f".{n}".startswith(".base.")}

    def take_out(self, model: nn.Module, name: str) -> None:
        """Leave the model, where this lies under `name`, as it was."""
        raise NotImplementedError


class WeightAdapter(Adapter):
    """A projection whose weight is changed: base.weight + delta(), merged or not.

    base: nn.Linear, or the Conv1D of transformers' GPT-2, whose weight is (in, out).
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        if not hasattr(base, "weight") or base.weight.ndim != 2:
            raise ValueError(f"{type(base).__name__} has no weight matrix to change")
        self.base = base
        self.original: Tensor | None = None  # the base's own bits, while merged

    @property
    def weight(self) -> Tensor:
        """(out, in), with the change."""
        as_it_is = self.merged or not self.enabled
        return matrix(self.base) if as_it_is else matrix(self.base) + self.delta()

    @property
    def merged(self) -> bool:
        """Whether the change is in the base's weight."""
        return self.original is not None

    def delta(self) -> Tensor:
        """(out, in): what is added to the base's weight."""
        raise NotImplementedError

    def changed(self, x: Tensor) -> Tensor:
        """The changed projection of x: (..., in) -> (..., out)."""
        return self.base(x) + F.linear(x, self.delta())

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return self.changed(x) if self.enabled and not self.merged else self.base(x)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the change into the base's weight; its own bits are kept beside it."""
        if not self.merged:
            delta = self.delta()
            self.original = self.base.weight.detach().clone()
            matrix(self.base).add_(delta.to(self.original.dtype))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own bits back."""
        if self.merged:
            self.base.weight.copy_(self.original)
            self.original = None

    def take_out(self, model: nn.Module, name: str) -> None:
        """Put the base back, unmerged."""
        self.unmerge()
        anatomy.replace(model, name, self.base)


class SublayerAdapter(Adapter):
    """A module of (x, h) that `sublayers.change_` put into a block."""

    def take_out(self, model: nn.Module, name: str) -> None:
        """Undo the change."""
        sublayers.undo_(model, name.removesuffix(".change"))


def matrix(layer: nn.Module) -> Tensor:
    """A projection's weight as (out, in): a view of it, transposed for GPT-2's Conv1D."""
    weight = layer.weight
    as_linear = hasattr(layer, "in_features") or isinstance(layer, WeightAdapter)
    return weight if as_linear else weight.T


def method(build: Callable[..., None]) -> Callable[..., None]:
    """Make a verb of a function that adds adapters to a model: note on the model what was done.

    What is noted goes into a saved adapter's header, from which `load_adapter` builds it again.
    """

    @functools.wraps(build)
    def verb(model: nn.Module, *args, **kwargs) -> None:
        bound = inspect.signature(build).bind(model, *args, **kwargs)
        bound.apply_defaults()
        build(model, *args, **kwargs)
        options = dict(list(bound.arguments.items())[1:])
        noted = [f"{build.__module__}:{build.__name__}", options]
        model.peft_methods = [*getattr(model, "peft_methods", []), noted]

    return verb


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Dotted name -> adapter, outermost first."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Dotted name -> parameter, of those that the methods brought and that train."""
    found = {}
    for place, adapter in adapters(model).items():
        dotted = f"{place}." if place else ""
        found |= {f"{dotted}{n}": p for n, p in adapter.own().items() if p.requires_grad}
    return found


def n_trainable(model: nn.Module) -> int:
    """How many numbers the methods train."""
    return sum(p.numel() for p in {id(p): p for p in trainable(model).values()}.values())


def freeze_base_(model: nn.Module) -> None:
    """Only what the methods brought asks for gradients."""
    wanted = {id(p) for p in trainable(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters: the base's outputs, bit for bit, merged ones included."""
    found = list(adapters(model).values())
    merged = [a for a in found if isinstance(a, WeightAdapter) and a.merged]
    switches = [*found, *sublayers.changes(model).values()]
    before = [switch.enabled for switch in switches]
    try:
        for adapter in merged:  # the outermost first
            adapter.unmerge()
        for switch in switches:
            switch.enabled = False
        yield
    finally:
        for switch, enabled in zip(switches, before, strict=True):
            switch.enabled = enabled
        for adapter in reversed(merged):
            adapter.merge()


def merge_(model: nn.Module) -> None:
    """Write every change of a weight into it. Logits stay within rounding.

    Raises ValueError when an adapter is no change of weights, such as a bottleneck.
    """
    for name, adapter in adapters(model).items():
        if not isinstance(adapter, WeightAdapter):
            raise ValueError(f"{name} ({type(adapter).__name__}) can't be merged into a weight")
    for adapter in reversed(list(adapters(model).values())):
        adapter.merge()


def unmerge_(model: nn.Module) -> None:
    """Take the changes out of the weights again: the base's own bits."""
    for adapter in adapters(model).values():
        if isinstance(adapter, WeightAdapter):
            adapter.unmerge()


def fold_(model: nn.Module) -> None:
    """Write every change into its weight for good: plain projections stay, no adapter."""
    merge_(model)
    while found := adapters(model):
        name, adapter = next(iter(found.items()))
        anatomy.replace(model, name, adapter.base)
    model.peft_methods = []


def remove_(model: nn.Module) -> None:
    """Take every adapter out; the base is what it was, bit for bit."""
    while found := adapters(model):
        name = next(iter(found))
        found[name].take_out(model, name)
    model.peft_methods = []


def base_hash(model: nn.Module) -> str:
    """SHA-256 over names and bits of the parameters that are not an adapter's."""
    own = {id(p) for a in adapters(model).values() for p in a.own().values()}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            digest.update(".".join(part for part in name.split(".") if part != "base").encode())
            bits = parameter.detach().cpu().contiguous().view(-1)
            digest.update(bits.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Dotted name -> what a saved adapter holds: the methods' parameters and buffers."""
    state = {}
    for place, adapter in adapters(model).items():
        dotted = f"{place}." if place else ""
        buffers = {n: b for n, b in adapter.named_buffers() if not f".{n}".startswith(".base.")}
        state |= {f"{dotted}{n}": t.detach() for n, t in {**adapter.own(), **buffers}.items()}
    return state


def save_adapter(model: nn.Module, file: str | Path) -> None:
    """Write the adapters as safetensors: method, options and the base's hash in the header.

    Raises ValueError while they are merged.
    """
    if any(isinstance(a, WeightAdapter) and a.merged for a in adapters(model).values()):
        raise ValueError("the adapters are merged; unmerge_ the model, then save them")
    header = {"base": base_hash(model), "methods": json.dumps(model.peft_methods)}
    state = {n: t.cpu().contiguous().clone() for n, t in adapter_state(model).items()}
    with atomic_write(Path(file)) as temporary:
        save_file(state, temporary, metadata=header)


def load_adapter(model: nn.Module, file: str | Path) -> None:
    """Put a saved adapter into a plain model, in place.

    Raises ValueError when the model's weights are not those that the adapter was trained on, and
    for a file that is no saved adapter or names a method that is none.
    """
    header, state = _read(Path(file))
    verbs = [(_verb(place), options) for place, options in json.loads(header["methods"])]
    if (found := base_hash(model)) != header["base"]:
        raise ValueError(
            f"{Path(file).name} belongs to a base with hash {header['base'][:12]}..., and this "
            f"model has {found[:12]}...: load the base that it was trained on"
        )
    for verb, options in verbs:
        verb(model, **options)
    with torch.no_grad():
        for name, tensor in adapter_state(model).items():
            tensor.copy_(state[name])


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A saved adapter's header and tensors."""
    try:
        with safe_open(file, "pt") as saved:
            header = saved.metadata() or {}
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is cut or no safetensors file: {error}") from error
    if not {"base", "methods"} <= header.keys():
        raise ValueError(f"{file} is no saved adapter: `save_adapter` writes one")
    return header, state


_VERB = method(print).__code__  # of whatever `method` returns


def _verb(place: str) -> Callable[..., None]:
    """The method that a header names as "module:function", and no other function.

    An adapter may come from a stranger: calling what it names could run anything.
    """
    module, _, name = place.partition(":")
    if module.startswith("lablib.peft."):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    verb = getattr(sys.modules.get(module), name, None)
    if getattr(verb, "__code__", None) is not _VERB:
        raise ValueError(
            f"the adapter names {place!r}, which is no method of lablib.peft nor of a module that "
            "you have imported: import its module first, if you trust it"
        )
    return verb
