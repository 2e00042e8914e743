"""Large buffers on CPU."""

import contextlib
import math
import weakref
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

LINE = 16  # floats in a cache line
KEPT = 2**25  # floats: 128 MiB
_idle: defaultdict[int, list[np.ndarray]] = defaultdict(list)  # by size


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialized contiguous tensor of that shape, in like's dtype and on its device.

    In float32 on CPU the memory is NumPy's, which asks Linux for huge pages where PyTorch's
    allocator does not: first writing 32 MiB then takes about a quarter of the time. When the
    tensor is gone its memory is kept for the next one of that size (at most 128 MiB in all), since
    the system would take it back and hand it out again page by page.
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return like.new_empty(shape)
    size = math.prod(shape)
    memory = _take(size + LINE)
    start = -memory.ctypes.data // memory.itemsize % LINE  # NumPy aligns to 16 bytes only
    array = memory[start : start + size]
    weakref.finalize(array, _give, memory).atexit = False  # the tensor holds array, not memory
    return torch.from_numpy(array).view(shape)


def _take(size: int) -> np.ndarray:
    with contextlib.suppress(IndexError):  # one step, so that threads cannot take the same
        return _idle[size].pop()
    return np.empty(size, np.float32)


def _give(memory: np.ndarray) -> None:
    """Keep it; when that would be more than KEPT, let the others go."""
    if sum(size * len(idle) for size, idle in list(_idle.items())) + memory.size > KEPT:
        _idle.clear()
    if memory.size <= KEPT:
        _idle[memory.size].append(memory)
