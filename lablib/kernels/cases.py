"""What an op's `bench.py` is made of: the ways to compute one thing, on the same inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor, nn

from lablib.resources import Way


@dataclass
class Case:
    """One table, our way first. flops, moved (bytes): of one run, for the share of limits.

    other_moved: bytes of the ways that move others than ours do.
    repeats: at most so many rounds, for what takes long.
    """

    title: str
    ways: dict[str, Way]
    flops: float = 0.0
    moved: float = 0.0
    other_moved: Mapping[str, float] = field(default_factory=dict)
    repeats: int | None = None


def naive(op: str):
    """The module with an op's definition."""
    return import_module(f"lablib.kernels.{op}.naive")


def compiled(function: Callable) -> Callable:
    """torch.compile of a definition, compiled for the shapes that it meets."""
    return torch.compile(function, dynamic=False)


def step(function: Callable, *leaves: Tensor) -> Way:
    """Forward and backward of the output's sum of squares."""

    def run():
        for leaf in leaves:
            leaf.grad = None
        out = function(*leaves)
        (out * out).sum().backward()
        return out.detach()

    return run


def layer_step(layer: nn.Module, x: Tensor) -> Way:
    """`step` of a layer at x; the gradients of its parameters are begun anew, too."""
    once = step(layer, x)

    def run():
        layer.zero_grad(set_to_none=True)
        return once()

    return run
