"""What this process takes of the machine: memory, and time by comparison."""

import sys
import time
from collections.abc import Callable, Mapping
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
