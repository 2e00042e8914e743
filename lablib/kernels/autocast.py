"""What autocast does for PyTorch's own matrix products, for ours."""

import torch
from torch import Tensor


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where it is on for their device, else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def same_dtype(op: str, **tensors: Tensor) -> None:
    """Raise TypeError, naming each dtype, unless all tensors have the same floating one."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not dtypes.pop().is_floating_point:
        given = ", ".join(f"{name} {t.dtype}".replace("torch.", "") for name, t in tensors.items())
        raise TypeError(f"{op} needs one floating-point dtype, got {given}")
