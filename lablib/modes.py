"""What a model is left with: each module's mode, and whether each parameter trains."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back at the end.

    `model.train(mode)` would give all of them the root's: a part frozen in evaluation mode would
    then train, and a trained part of a model in evaluation mode would stop.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def kept_requires_grad(model: nn.Module) -> Iterator[None]:
    """Let every parameter ask for gradients at the end as it did at the start.

    Parameters that come in between are left alone.
    """
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, asks in asked:
            parameter.requires_grad_(asks)
