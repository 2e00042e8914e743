"""Clip gradients by their norm, also when some parameters are spread over processes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients in place so that their norm is at most max_norm; returns that norm.

    max_norm: None only measures.
    A parameter with an attribute `process_group` is one process's part of a larger one: the
    squares of such gradients are summed over that group, so all processes scale alike.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = _norm(parameters)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    groups = {p.process_group for p in parameters if hasattr(p, "process_group")}
    if not groups:
        return nn.utils.get_total_norm([p.grad for p in parameters])
    total = _square([p for p in parameters if not hasattr(p, "process_group")])
    for group in groups:
        part = _square([p for p in parameters if getattr(p, "process_group", None) is group])
        torch.distributed.all_reduce(part, group=group)
        total = total.to(part.device) + part
    return total.sqrt()


def _square(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in parameters]).square()
