"""What this process takes of the machine: memory, and time by comparison."""

import contextlib
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Way = Callable[[], object]


def measure(ways: Mapping[Any, Way], repeats: int = 7) -> dict[Any, list[float]]:
    """Seconds of each way in each round, CUDA's work included.

    Ways take turns, so that whatever else the machine does slows all of them alike.
    """
    times: dict[Any, list[float]] = {key: [] for key in ways}
    for _ in range(repeats):
        for key, way in ways.items():
            start = _clock()
            way()
            times[key].append(_clock() - start)
    return times


def _clock() -> float:
    """Seconds of a clock, read once CUDA has done what it was asked to."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_limit(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes of memory that this process may take: the machine's, or less in a container.

    groups, own: where Linux lists control groups of processes, and this process's; None where
    nobody tells.
    """
    limits = [int(text) for text in _group_limits(groups, own) if text.isdigit()]
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def _group_limits(groups: Path, own: Path) -> Iterator[str]:
    """What is written as the limit of this process's group and of those around it."""
    for line in own.read_text().splitlines() if own.exists() else []:
        _, kinds, inside = line.split(":", 2)
        if kinds in ("", "memory"):  # version 2 has one tree, version 1 one for memory
            name = "memory.max" if not kinds else "memory.limit_in_bytes"
            place = Path(inside.strip("/"))
            for folder in (place, *place.parents):
                file = groups / kinds / folder / name
                if file.is_file():
                    yield file.read_text().strip()


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where nobody counts.

    Linux's own count begins with the program; getrusage's begins with what its parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(part for part in status.read_text().splitlines() if part.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def release_memory() -> None:
    """Give freed memory back to the system, before something large is loaded.

    glibc keeps what small tensors leave behind; elsewhere this does nothing.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
