"""A sublayer of a block, whatever the family: its input, its output, and a way to change it.

A block adds a sublayer's output h to the residual stream. `change_` puts h <- f(x, h), where x is
what the sublayer reads: after the norm in GPT, Llama, GPT-2 and T5; in BERT, whose norm comes after
the sum, the residual stream itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from lablib.models import anatomy

SUBLAYERS = ("attention", "mlp")


class SublayerChange(nn.Module):
    """h <- change(x, h), as long as it is enabled. x, h: (batch, length, dim)."""

    def __init__(self, change: nn.Module):
        super().__init__()
        self.change = change
        self.enabled = True
        self.seen: Tensor | None = None  # x, between the two hooks of a BERT sublayer

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Remember what the residual sum adds to."""
        self.seen = args[1] if len(args) > 1 else kwargs["input_tensor"]

    def put(self, module: nn.Module, args: tuple, kwargs: dict, output):
        """The output, changed; of an attention that also returns its weights, the first."""
        x = self.seen
        if x is None:
            x = args[0] if args else kwargs["hidden_states"]
        self.seen = None
        if not self.enabled:
            return output
        if isinstance(output, tuple):
            return self.change(x, output[0]), *output[1:]
        return self.change(x, output)


def change_(
    model: nn.Module, block: int, sublayer: str, change: nn.Module, name: str = "change"
) -> str:
    """Put change(x, h) in the place of h; the dotted name under which the change now lies.

    change: a module of (x, h), both (batch, length, dim), that returns (batch, length, dim). On the
        device of the block. name: of the place; several changes apply in the order they came.
    Raises ValueError for another sublayer than "attention" and "mlp", or a name that is taken.
    """
    outer, inner = _places(model, block, sublayer)
    module = model.get_submodule(outer)
    if hasattr(module, name):
        raise ValueError(f"{outer} has a {name!r} already")
    wrapped = SublayerChange(change)
    module.add_module(name, wrapped)
    if inner != outer:
        module.register_forward_pre_hook(wrapped.look, with_kwargs=True)
    model.get_submodule(inner).register_forward_hook(wrapped.put, with_kwargs=True)
    return f"{outer}.{name}"


def changes(model: nn.Module) -> dict[str, SublayerChange]:
    """Dotted name -> change, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SublayerChange)}


def undo_(model: nn.Module, name: str | None = None) -> None:
    """Take the change of this name out, or all of them; nothing of it stays, no hook either."""
    wanted = changes(model) if name is None else {name: changes(model)[name]}
    for place, change in wanted.items():
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [k for k, hook in hooks.items() if _of(hook, change)]:
                    del hooks[key]
                    module._forward_hooks_with_kwargs.pop(key, None)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        outer, _, last = place.rpartition(".")
        delattr(model.get_submodule(outer), last)


def _of(hook, change: SublayerChange) -> bool:
    return getattr(hook, "__self__", None) is change


def _places(model: nn.Module, block: int, sublayer: str) -> tuple[str, str]:
    """The module that is given x, and the one that returns h: one and the same, except in BERT."""
    if sublayer not in SUBLAYERS:
        raise ValueError(f"{sublayer!r} is no sublayer: {', '.join(SUBLAYERS)}")
    names = anatomy.family(model)
    place = f"{names.blocks}.{range(len(anatomy.blocks(model)))[block]}"
    if names.mlp:
        return (f"{place}.{getattr(names, sublayer)}",) * 2
    norm = names.attention_norm if sublayer == "attention" else names.mlp_norm
    outer = f"{place}.{norm.rpartition('.')[0]}"
    return outer, f"{outer}.dropout"
