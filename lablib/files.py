"""Files and folders that are either whole or not there."""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# What this process has read of corpora and models, by name: what its results depend on.
opened: dict[str, Path] = {}


def note_opened(name: str, path: str | Path) -> None:
    """Record in `opened` that the content of `path` was read as `name`, "corpus bible" say."""
    opened[name] = Path(path)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; put it into place on success, remove it on error.

    The caller creates a file or a folder there. What is at `path` is replaced in one step, a folder
    too (in two where the system can't exchange names), so who opens `path` finds the old or the new
    one, whole. Files get the mode that the umask leaves.
    Raises OSError, in one sentence, when the disk is full; what was at `path` is still there.
    """
    path = Path(path)
    if path.is_dir():
        path = path.resolve()  # neither "." nor a link is a name to exchange
    with scratch(path) as new:
        try:
            yield new
            _share(new)
            _put(new, path)
        except Exception as error:
            if _tells_of_a_full_disk(error):
                raise OSError(
                    errno.ENOSPC, f"the disk is full: {path.parent} has no room for {path.name}"
                ) from error
            raise


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A free name beside `path`, for a file or a folder that is removed in the end.

    What a killed process left of these is removed by the next one that writes into the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent)
    new = path.with_name(f".{path.name}.{_here()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield new
    finally:
        remove(new)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process or thread prepares `path`."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


@cache
def _clear(folder: Path) -> None:
    """Remove, once a process, the scratch of processes that are no more."""
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r".*\.(\w+)-(\d+)-[0-9a-f]{8}\.tmp", path.name)
        with contextlib.suppress(OSError):  # another process may be clearing
            day_old = time.time() - path.stat().st_mtime > 86_400
            if day_old or (match and match[1] == _here() and not _alive(int(match[2]))):
                remove(path)


@cache
def _here() -> str:
    """Eight digits for the machine or container, in which a process id is one process's."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 would end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _share(new: Path) -> None:
    """Give files that only their owner may use the mode that the umask leaves.

    safetensors writes such files; a shared cache must be readable by others.
    """
    files = new.rglob("*") if new.is_dir() else [new]
    private = [
        f for f in files if f.is_file() and not f.is_symlink() and not f.stat().st_mode & 0o77
    ]
    if private:
        with scratch(new) as probe:
            probe.touch()
            for file in private:
                file.chmod(probe.stat().st_mode & 0o777)


def _put(new: Path, path: Path) -> None:
    """Rename `new` to `path`, whatever is there and whoever else does so at the same time."""
    for _ in range(1000):
        try:
            if not path.is_dir():
                os.replace(new, path)
            elif not _exchanged(new, path):
                _moved_aside(new, path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                raise
            if not new.exists():
                raise
    raise OSError(errno.EBUSY, f"{path} is replaced by others all the time")


def _exchanged(new: Path, path: Path) -> bool:
    """Exchange two names in one step; False where the system can't, or one of them is gone."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
    names = os.fsencode(new), os.fsencode(path)
    return call is not None and call(here, names[0], here, names[1], exchange) == 0


def _moved_aside(new: Path, path: Path) -> None:
    """Put `new` at `path`, the folder there moved aside and removed, or back when that fails."""
    with scratch(path) as old:
        os.replace(path, old)
        try:
            os.replace(new, path)
        except OSError:
            if not path.exists():
                os.replace(old, path)
            raise


def _tells_of_a_full_disk(error: Exception) -> bool:
    # safetensors and torch have errors of their own for it.
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
