"""A student's server in the demonstration: own home, shared cache, limits, a fence.

It runs as the one unix user who started the hub. `python -m lablib.hub.server` is the spawner's
command; it prepares the process and then becomes `jupyterhub-singleuser`.
"""

import ctypes
import os
import pwd
import random
import resource
import sys
from pathlib import Path

from lablib.course import fence
from lablib.paths import PACKAGE, cache_dir, project_dir

STATE = "LABLIB_HUB"  # the hub's folder: its database and secrets, and every student's home
WHOLE = ("corpora", "fingerprints", "models", "packages", "tasks")  # what set-up leaves complete


def main() -> None:
    """Prepare this process as its environment says, then start the student's server in it."""
    home, shared = Path.home(), cache_dir()
    own = home / ".cache" / "lablib"
    link_cache(shared, own)
    temporary = home / ".tmp"
    temporary.mkdir(exist_ok=True)
    os.environ |= {
        "LABLIB_HOME": str(own),
        "TMPDIR": str(temporary),
        "GIT_CEILING_DIRECTORIES": str(home.parent),  # the checkout around it is not the student's
    }
    limit_memory(int(os.environ.get("MEM_LIMIT", 0)))
    limit_cores(float(os.environ.get("CPU_LIMIT", 0)))
    give_up_root()
    enclose(home, Path(os.environ[STATE]), shared)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterhub.singleuser", *sys.argv[1:]])


def link_cache(shared: Path, own: Path) -> None:
    """A student's own cache, in which everything that is already in the shared one is a link.

    What labs add while they run goes into the student's own folders.
    """
    own.mkdir(parents=True, exist_ok=True)
    for name in WHOLE:
        _link(own / name, shared / name)
    for path in (shared / "mixtures").glob("*.npz"):  # a lab may make one more of these
        (own / "mixtures").mkdir(exist_ok=True)
        _link(own / "mixtures" / path.name, path)


def _link(place: Path, target: Path) -> None:
    if not place.exists():
        place.unlink(missing_ok=True)  # a link to a cache that was elsewhere
        place.symlink_to(target)


def limit_memory(size: int) -> None:
    """Let no process of this server have more than `size` bytes of data; 0 for no limit.

    On Linux a lab that asks for more gets a MemoryError, and goes on. It counts each process by
    itself: two notebooks may have twice as much.
    """
    if size:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        size = size if most == resource.RLIM_INFINITY else min(size, most)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def limit_cores(cores: float) -> None:
    """Run on that many of this machine's cores, drawn at random, on Linux; 0 for no limit."""
    if cores and hasattr(os, "sched_setaffinity"):
        there = sorted(os.sched_getaffinity(0))
        chosen = random.sample(there, min(len(there), max(1, int(cores))))
        os.sched_setaffinity(0, chosen)


def give_up_root() -> None:
    """From the next program on, root is a user like any other: its powers would see over the fence.

    They would let a student read the password in the hub's environment, /proc/PID/environ.
    """
    if os.geteuid() == 0 and sys.platform == "linux":
        set_secure_bits, no_root_for_good = 28, 0b11  # <linux/prctl.h>, <linux/securebits.h>
        ctypes.CDLL(None).prctl(set_secure_bits, no_root_for_good, 0, 0, 0)


def enclose(home: Path, state: Path, shared: Path) -> None:
    """Close to this process, where the system has Landlock, what is not the student's.

    No file below `state` or in the home of whoever runs the hub is read, but what labs need;
    nothing is written outside the student's `home`.
    """
    if not fence.available():
        print("this system has no Landlock: students' servers can read each other's files")
        return
    person = Path(pwd.getpwuid(os.getuid()).pw_dir).resolve()
    closed = {state.resolve(), *({person} - {Path("/")})}
    code = project_dir() or PACKAGE
    readable = [home, shared, state / "labs.git", Path(sys.base_prefix), Path(sys.prefix)]
    readable += fence.around({state.resolve()}, code.resolve())
    fence.enclose(closed, [home, Path("/dev")], readable)


if __name__ == "__main__":
    main()
