"""Train some of the base's own parameters: norms, biases, attention, last blocks, any by name.

theta <- theta + d, with d zero outside the chosen tensors. Each module that holds a chosen one is
wrapped by `Tuned`, which computes with copies that train; the originals lie untouched beside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lablib.models import anatomy
from lablib.peft.adapter import Adapter, adapters, method


class Tuned(Adapter):
    """A module of the base, computed with copies of some of its parameters, which train.

    base: keeps its own parameters; its other attributes are found here too. Copies carry the
        originals' names: `norm.weight` is what trains, `norm.base.weight` what was.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        if next(base.children(), None) is not None:
            raise ValueError(f"{type(base).__name__} has modules below it: name one of those")
        self.base = base

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args, **kwargs):
        """What the base computes of these, with the copies in the originals' places."""
        with self._in_place() if self.enabled else contextlib.nullcontext():
            return self.base(*args, **kwargs)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        originals = dict(self.base._parameters)  # a bias that the base lacks is None there
        self.base._parameters.update(self._parameters)
        try:
            yield
        finally:
            self.base._parameters.update(originals)

    def take_out(self, model: nn.Module, name: str) -> None:
        """Put the base back, wherever the model has this module."""
        for place, module in list(model.named_modules(remove_duplicate=False)):
            if module is self:
                anatomy.replace(model, place, self.base)


def tune_(model: nn.Module, chosen: dict[int, Tensor]) -> None:
    """Wrap every module that holds a chosen parameter; tied places share one copy.

    chosen: id of a base's parameter -> the parameter. One that is tuned already stays as it is.
    """
    copies = {i: nn.Parameter(p.detach().clone()) for i, p in chosen.items()}
    for module in list(model.modules()):
        held = dict(module._parameters) if not isinstance(module, Adapter) else {}
        for name, parameter in held.items():
            if id(parameter) in copies:
                _train(model, module, name, copies[id(parameter)])


def _train(model: nn.Module, module: nn.Module, name: str, copy: nn.Parameter) -> None:
    """Let the module's parameter of this name be `copy` from now on."""
    for tuned in model.modules():
        if isinstance(tuned, Tuned) and tuned.base is module:
            break
    else:
        places = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
        tuned = Tuned(module).train(module.training)
        for place in places:
            anatomy.replace(model, place, tuned)
    tuned._parameters.setdefault(name, copy)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name in the plain model -> parameter, of those that no method brought."""
    brought = {id(p) for a in adapters(model).values() for p in a.own().values()}
    return {
        ".".join(part for part in name.split(".") if part != "base"): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in brought
    }


def _below(model: nn.Module, modules: dict[str, nn.Module]) -> dict[int, Tensor]:
    own = {id(p) for p in base_parameters(model).values()}
    below = [p for module in modules.values() for p in module.parameters()]
    return {id(p): p for p in below if id(p) in own}


@method
def only_(model: nn.Module, names: Sequence[str]) -> None:
    """Train the parameters of these names, or patterns such as "blocks.*.mlp.*".

    Raises ValueError for one that fits no parameter.
    """
    known, chosen = base_parameters(model), {}
    for pattern in names:
        fits = {id(p): p for name, p in known.items() if fnmatchcase(name, pattern)}
        if not fits:
            raise ValueError(f"{pattern!r} fits no parameter of {type(model).__name__}")
        chosen |= fits
    tune_(model, chosen)


@method
def norms_(model: nn.Module) -> None:
    """Train gains (and biases) of all norms of the residual stream.

    Source: Zhao et al., 2023 (LayerNorm tuning). The norm of a masked-token head stays.
    """
    tune_(model, _below(model, anatomy.norms(model)))


@method
def biases_(model: nn.Module) -> None:
    """Train the biases of blocks and norms; a model without any gets zeros on each projection.

    Source: BitFit (Ben Zaken et al., 2022). Head and pooler stay.
    """
    names = anatomy.family(model)
    stem = (f"{names.blocks}.", *(f"{name}." for name in anatomy.norms(model)))
    known = base_parameters(model)
    chosen = {id(p): p for n, p in known.items() if n.startswith(stem) and n.endswith(".bias")}
    tune_(model, chosen)
    if not chosen:
        for layer in anatomy.projections(model).values():
            inner = _innermost(layer)
            zeros = inner.weight.new_zeros(inner.out_features)
            _train(model, inner, "bias", nn.Parameter(zeros))


def _innermost(layer: nn.Module) -> nn.Module:
    return _innermost(layer.base) if isinstance(layer, Adapter) else layer


@method
def attention_(model: nn.Module, roles: Sequence[str] = ()) -> None:
    """Train attention's projections, with their biases.

    roles: as `anatomy.projections` names them; none for all of attention's.
    """
    names = anatomy.family(model)
    places = names.projections.items()
    of_attention = [role for role, place in places if place.startswith(f"{names.attention}.")]
    if others := set(roles) - set(of_attention):
        known = ", ".join(of_attention)
        raise ValueError(f"{min(others)!r} is no projection of attention, which has {known}")
    tune_(model, _below(model, anatomy.projections(model, *(roles or of_attention))))


@method
def last_blocks_(model: nn.Module, n: int = 1) -> None:
    """Train all of the last n blocks; what comes after them stays."""
    blocks = anatomy.blocks(model)
    if not 0 < n <= len(blocks):
        raise ValueError(f"{n} blocks of the last are wanted, and the model has {len(blocks)}")
    tune_(model, _below(model, {str(i): block for i, block in enumerate(blocks[-n:])}))


def _has(model: nn.Module, name: str) -> bool:
    return any(place == name for place, _ in model.named_modules(remove_duplicate=False))


@method
def head_only_(model: nn.Module) -> None:
    """Train the language model's head, with its bias if it has one; what comes before it stays.

    A head that shares the embedding's matrix learns with a copy of it, and the embedding stays.
    Raises ValueError for a model without a head.
    """
    if not (place := anatomy.family(model).head) or not _has(model, place):
        raise ValueError(f"{type(model).__name__} has no head to train")
    head = _innermost(model.get_submodule(place))
    for name, parameter in list(head._parameters.items()):
        if parameter is not None:
            _train(model, head, name, nn.Parameter(parameter.detach().clone()))
