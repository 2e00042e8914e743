"""A base in bfloat16 with adapters in float32: small steps would be rounded away in bfloat16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lablib.models import anatomy
from lablib.peft.adapter import trainable


def adapters_to_float32_(model: nn.Module) -> None:
    """What the methods brought and train is kept in float32; the base stays as it is."""
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()


@contextlib.contextmanager
def in_precision_of_base(model: nn.Module) -> Iterator[None]:
    """Products are computed in the precision of the embedding, those of adapters, too.

    For a forward pass at a time: within, autocast keeps the parameters that it has rounded, and
    would not see them change.
    """
    weight = anatomy.embedding(model).weight
    kind, dtype = weight.device.type, weight.dtype
    with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        yield
