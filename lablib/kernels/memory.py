"""Large buffers on CPU."""

import math
import weakref

import numpy as np
import torch
from torch import Tensor

LINE = 16  # floats in a cache line
LARGE = 2**18  # floats: 1 MiB
KEPT = 2**25  # floats: 128 MiB
_idle: dict[int, list[np.ndarray]] = {}  # by size


def empty(like: Tensor, *shape: int) -> Tensor:
    """An uninitialized contiguous tensor of that shape, in like's dtype and on its device.

    Large ones in float32 on CPU lie in NumPy's memory, for which Linux is asked for huge pages,
    as PyTorch's allocator does not: first writing 32 MiB then takes about a quarter of the time.
    When such a tensor is gone its memory is kept for the next one of that size (at most 128 MiB in
    all), since the system would take it back and hand it out again page by page.
    """
    size = math.prod(shape)
    if size < LARGE or like.device.type != "cpu" or like.dtype != torch.float32:
        return like.new_empty(shape)
    memory = _take(size + LINE)
    start = -memory.ctypes.data // memory.itemsize % LINE  # NumPy aligns to 16 bytes only
    array = memory[start : start + size]
    weakref.finalize(array, _give, memory).atexit = False  # the tensor holds array, not memory
    return torch.from_numpy(array).view(shape)


def _take(size: int) -> np.ndarray:
    found = _idle.pop(size, [])  # in one step, so that two threads cannot take the same
    memory = found.pop() if found else np.empty(size, np.float32)
    if found:
        _idle.setdefault(size, []).extend(found)
    return memory


def _give(memory: np.ndarray) -> None:
    """Keep it; when that would be more than KEPT, let the others go."""
    if sum(size * len(found) for size, found in list(_idle.items())) + memory.size > KEPT:
        _idle.clear()
    if memory.size <= KEPT:
        _idle.setdefault(memory.size, []).append(memory)
