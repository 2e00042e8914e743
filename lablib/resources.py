"""What this process has taken of the machine."""

import sys
from pathlib import Path


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
