"""Invertible adapters (MAD-X, Pfeiffer et al., 2020): embeddings changed so that it can be undone.

Of each token's embedding e = [e_1, e_2],

    o_1 = F(e_2) + e_1,   o_2 = G(o_1) + e_2,   and back   e_2 = o_2 - G(o_1),   e_1 = o_1 - F(e_2),

with two small networks F and G. o is what the blocks read; before a head that shares the
embeddings' space, the inverse is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lablib.models import anatomy
from lablib.models.hooks import drop_hooks_
from lablib.peft.adapter import Adapter, method
from lablib.peft.bottleneck import start_


class Invertible(Adapter):
    """The coupling of two halves and its inverse. dim: even. reduction: of a half to F's width."""

    def __init__(self, dim: int, reduction: int = 2, start: str = "lora"):
        super().__init__()
        if dim % 2:
            raise ValueError(f"a width of {dim} has no two halves")
        half = dim // 2
        self.first, self.second = (_network(half, half // reduction, start) for _ in range(2))

    def there(self, e: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        e_1, e_2 = e.chunk(2, -1)
        o_1 = self.first(e_2) + e_1
        return torch.cat([o_1, self.second(o_1) + e_2], -1)

    def back(self, o: Tensor) -> Tensor:
        """The inverse of `there`."""
        o_1, o_2 = o.chunk(2, -1)
        e_2 = o_2 - self.second(o_1)
        return torch.cat([o_1 - self.first(e_2), e_2], -1)

    def after_embedding(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """What the blocks read."""
        return self.there(output) if self.enabled else output

    def before_head(self, module: nn.Module, args: tuple) -> tuple | None:
        """What the head reads."""
        return (self.back(args[0]), *args[1:]) if self.enabled else None

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete it and its hooks."""
        drop_hooks_(model, self)
        place, _, last = name.rpartition(".")
        delattr(model.get_submodule(place), last)


def _network(dim: int, inner: int, start: str) -> nn.Sequential:
    down, up = nn.Linear(dim, inner), nn.Linear(inner, dim)
    start_(start, down, up)
    return nn.Sequential(down, nn.ReLU(), up)


@method
def invertible_(model: nn.Module, reduction: int = 2, start: str = "lora") -> None:
    """Put an `Invertible` after the embedding, and its inverse before the head, where one is.

    start: as in `bottleneck.start_`; "lora" starts at the base's function.
    Raises ValueError for an odd width, for T5, and where one is already.
    """
    if anatomy.family(model).name.startswith("T5"):
        raise ValueError("T5's encoder and decoder embed apart: no invertible adapter here")
    if hasattr(model, "invertible"):
        raise ValueError(f"{type(model).__name__} has an invertible adapter already")
    embedding = anatomy.embedding(model)
    adapter = Invertible(embedding.weight.shape[1], reduction, start).to(embedding.weight)
    model.invertible = adapter
    embedding.register_forward_hook(adapter.after_embedding)
    if (head := _head(model)) is not None:
        head.register_forward_pre_hook(adapter.before_head)


def _head(model: nn.Module) -> nn.Module | None:
    try:
        return anatomy.head(model)
    except (AttributeError, ValueError):
        return None
