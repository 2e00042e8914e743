"""A fence around a student's kernel: what it may not read, and the only places it may write to.

Linux's Landlock holds the process and all that it starts, compiled code too, and nothing lifts it.
"""

import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

# Numbers of <asm/unistd.h>, the same on every processor, and bits of <linux/landlock.h>.
CREATE, ADD, RESTRICT = 444, 445, 446
READ_FILE, TRUNCATE = 1 << 2, 1 << 14
WRITE = sum(1 << bit for bit in (1, *range(4, 14))) | TRUNCATE  # write, remove, make, move
OF_FILES = (1 << 1) | READ_FILE | TRUNCATE
KNOWN = {1: (1 << 13) - 1, 2: (1 << 14) - 1}  # the bits of old kernels; later ones know all of ours
SIGNALS, SIGNALS_SINCE = 1 << 1, 6  # no signal to processes outside, from this version on
NO_NEW_PRIVILEGES = 38  # <linux/prctl.h>


def version() -> int:
    """Of Landlock on this machine; 0 where there is none or we may not use it."""
    return max(0, _call(CREATE, None, 0, 1)) if os.uname().sysname == "Linux" else 0


def available() -> bool:
    """Whether `enclose` works here."""
    return version() > 0


def enclose(closed: Iterable[Path], writable: Iterable[Path], readable: Iterable[Path]) -> None:
    """For this process, from now on: read no file in `closed`, write only in `writable`.

    Where the system knows how, no signal either to processes that it did not start.
    readable: places in `closed` that may be read nevertheless. Raises OSError when Landlock
    refuses. The process should have one thread: others that run already stay outside.
    """
    known = KNOWN.get(version(), -1)
    handled = struct.pack("Q", (READ_FILE | WRITE) & known)
    if version() >= SIGNALS_SINCE:
        handled += struct.pack("QQ", 0, SIGNALS)  # of the network nothing is handled
    rules = _checked(_call(CREATE, handled, len(handled), 0))
    for path in [*around({path.resolve() for path in closed}), *readable]:
        _allow(rules, path, READ_FILE)
    for path in writable:
        _allow(rules, path, WRITE & known)
    _checked(ctypes.CDLL(None, use_errno=True).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(_call(RESTRICT, rules, 0))
    os.close(rules)


def around(closed: set[Path], at: Path = Path("/")) -> Iterator[Path]:
    """The fewest files and folders that hold everything below `at` but what is in `closed`."""
    if at in closed:
        return
    if not any(at in path.parents for path in closed):
        yield at
        return
    for child in at.iterdir():
        if not child.is_symlink():  # what it leads to has a place of its own
            yield from around(closed, child)


def _allow(rules: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # gone, or not ours to open
        return
    try:
        rights &= -1 if path.is_dir() else OF_FILES
        _checked(_call(ADD, rules, 1, struct.pack("=Qi", rights, place), 0))
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes | None) -> int:
    return ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)


def _checked(returned: int) -> int:
    if returned < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no fence around the kernel: {os.strerror(number)}")
    return returned
