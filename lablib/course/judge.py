"""The judge: the process that has the references, and never runs a line of a student's.

The grader starts it (`Judge`) and gives its orders over its standard input; the student's function
answers it over a socket, in messages of data (`lablib.lab.link`). What a submission does to its own
process, therefore, does not reach what compares its answers.
"""

import atexit
import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lablib.evidence import tiers
from lablib.exercises import Exercise, Wrong, load
from lablib.lab import wire
from lablib.lab.answering import UNREADABLE
from lablib.lab.grading import JUDGE, outcome, parameters
from lablib.lab.limits import TooSlow
from lablib.lab.link import JudgesEnd


class Judge:
    """The grader's handle on a judge of its own. `address` is for students' kernels."""

    def __init__(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="lablib-judge-"))
        self.address = str(self.scratch / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lablib.course.judge", self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if k not in (*tiers.GRADING, JUDGE)},
            text=True,
        )
        atexit.register(self.stop)

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def open(self, module: str, name: str) -> bool:
        """Let the next answer be for this exercise; False when the lab has no such exercise."""
        return bool(self._ask("open", module, name))

    def close(self) -> tuple[str, str] | None:
        """The outcome of what was opened; None when nothing answered, or the judge is gone."""
        outcome = self._ask("close")
        return tuple(outcome) if outcome else None

    def stop(self) -> None:
        """End the process and remove its socket."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _ask(self, *order: str) -> Any:
        """The reply to an order; None when the process is gone."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            if line := self._process.stdout.readline():
                return json.loads(line)
        return None


ENDS = {"slow": TooSlow, "untried": NotImplementedError}


def judged(link: JudgesEnd, exercise: Exercise) -> tuple[str, str]:
    """The outcome of the function at the other end."""
    names = parameters(exercise.reference)

    def candidate(*arguments: Any, **options: Any) -> Any:
        try:
            kind, value = link.call(names, arguments, options)
        except (EOFError, OSError):
            raise Wrong("your code ended the process that it runs in") from None
        except (wire.Unreadable, TypeError, ValueError, IndexError):
            raise Wrong(UNREADABLE) from None
        if kind == "returned":
            return value
        if kind == "wrong":
            raise Wrong(str(value))
        raise ENDS.get(kind) or Wrong(UNREADABLE)

    return outcome(exercise, candidate)


def serve(address: str) -> None:
    """Follow the orders that come in, one a line, until there are no more."""
    orders, replies = os.fdopen(0, "rb", buffering=0), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a test prints is no reply
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        verdict = None
        while line := orders.readline():
            order, *names = json.loads(line)
            exercise = _found(*names) if order == "open" else None
            reply = verdict if order == "close" else exercise is not None
            _dismiss(server)
            print(json.dumps(reply), file=replies, flush=True)
            verdict = _heard(server, orders, exercise) if exercise else None


def _found(module: str, name: str) -> Exercise | None:
    with contextlib.suppress(LookupError):
        return load(module, name)
    return None


def _dismiss(server: socket.socket) -> None:
    """Close the connections of those who came before their turn."""
    while select.select([server], [], [], 0)[0]:
        server.accept()[0].close()


def _heard(server: socket.socket, orders: Any, exercise: Exercise) -> tuple[str, str] | None:
    """The outcome of the first function that answers before the next order; None without one."""
    verdict = None
    while orders not in select.select([server, orders], [], [])[0]:
        with Connection(server.accept()[0].detach()) as connection:
            if verdict is None:
                link = JudgesEnd(connection)
                verdict = judged(link, exercise)
                with contextlib.suppress(OSError):  # the student's process may be gone
                    link.send("verdict", *verdict)
    return verdict


if __name__ == "__main__":
    serve(sys.argv[1])
