"""Optimizers as `fit` takes them: functions that are given the model."""

from collections.abc import Callable

import torch
from torch import nn

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    fused: bool | None = None,
) -> MakeOptimizer:
    """AdamW (Loshchilov and Hutter, 2019) on all that needs a gradient; only matrices decay.

    lr: the peak that the schedule scales. fused: one kernel a step; None means wherever `fit`'s own
    precision allows it, which float16 does not.
    """

    def make(model: nn.Module) -> torch.optim.Optimizer:
        one_kernel = _has_bfloat16(model) if fused is None else fused
        return torch.optim.AdamW(groups(model, weight_decay), lr, betas, fused=one_kernel)

    return make


def groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms' scales and biases don't."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    parts = [(matrices, weight_decay), (others, 0.0)]
    return [{"params": part, "weight_decay": decay} for part, decay in parts if part]


def _has_bfloat16(model: nn.Module) -> bool:
    """Whether the model lies on a device where `fit` computes in bfloat16 or float32."""
    on_cuda = any(p.is_cuda for p in model.parameters())
    return not on_cuda or torch.cuda.is_bf16_supported(including_emulation=False)


# What says how a step is computed, not what it computes.
_MEANS = {"params", "fused", "foreach", "capturable", "differentiable", "initial_lr"}


def describe(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The optimizer's name and settings, as text: {"optimizer": "AdamW", "lr": "0.003", ...}."""
    described = {"optimizer": type(optimizer).__name__}
    for key in sorted(set(optimizer.param_groups[0]) - _MEANS):
        values = {str(group[key]): None for group in optimizer.param_groups}  # in order, once
        described[key] = " and ".join(values)
    return described
