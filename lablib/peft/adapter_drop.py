"""AdapterDrop (Rücklé et al., 2021): adapters of the lowest blocks left out.

At inference that saves their time. In training a number of blocks, drawn anew at each step, makes
one model good at any number, and below the lowest adapter nothing needs a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import Adapter, adapters


@contextlib.contextmanager
def without_lowest(model: nn.Module, n: int) -> Iterator[None]:
    """The model without the adapters of its lowest n blocks, merged weights aside.

    Raises ValueError for an n that is not 0 to the number of blocks.
    """
    if not 0 <= n <= (most := len(anatomy.blocks(model))):
        raise ValueError(f"{n} blocks are to be without adapters, and the model has {most}")
    switches = [part for block in range(n) for part in _of_block(model, block)]
    before = [part.enabled for part in switches]
    try:
        for part in switches:
            part.enabled = False
        yield
    finally:
        for part, enabled in zip(switches, before, strict=True):
            part.enabled = enabled


def _of_block(model: nn.Module, block: int) -> list[Adapter | sublayers.SublayerChange]:
    start = f"{anatomy.family(model).blocks}.{block}."
    found = {**adapters(model), **sublayers.changes(model)}
    return [part for name, part in found.items() if name.startswith(start)]
