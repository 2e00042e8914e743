"""Training and evaluation mode, each module's own kept."""

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
