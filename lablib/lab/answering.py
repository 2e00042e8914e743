"""The student's side of a graded check: their function answers a judge in another process."""

import contextlib
from collections.abc import Callable
from multiprocessing.connection import Client
from typing import Any

from lablib.exercises import Wrong
from lablib.lab.grading import blame, own_random_numbers, watched
from lablib.lab.limits import LIMIT, TooSlow, within
from lablib.lab.link import StudentsEnd

UNREADABLE = "the check cannot read what your function returns"


def answer(address: str, attempt: Callable[..., Any], limit: float = LIMIT) -> tuple[str, str]:
    """The judge's outcome of `attempt`: ("correct", "wrong" or "untried", what to say of it).

    address: of the judge's socket. limit: seconds. Raises OSError when no judge listens there.
    """
    verdict: list[str] = []
    with Client(address) as connection, contextlib.suppress(EOFError, ConnectionError):
        link = StudentsEnd(connection)
        try:
            with own_random_numbers():
                within(limit, _answer_all, link, attempt, verdict)
        except TooSlow:
            link.send("slow", "")
            while not verdict and connection.poll(5):
                _note(link.receive(), verdict)
    kind, text = verdict or ("wrong", "Not yet: the judge gave no verdict")
    return kind, text


def _answer_all(link: StudentsEnd, attempt: Callable[..., Any], verdict: list[str]) -> None:
    """Do as the judge asks until it has its verdict."""
    while not verdict:
        message = link.receive()
        if message[0] == "call":
            _reply(link, *_call(link, attempt, *message[1:]))
        elif message[0] == "gradients":
            link.send("value", link.gradients(*message[1:]))
        else:
            _note(message, verdict)


def _reply(link: StudentsEnd, kind: str, value: Any) -> None:
    try:
        link.send(kind, value)
    except (ValueError, RecursionError):  # a list in itself, a number of 5,000 digits
        link.send("wrong", UNREADABLE)


def _note(message: tuple[Any, ...], verdict: list[str]) -> None:
    if message[0] == "verdict":
        verdict += message[1:]


def _call(
    link: StudentsEnd, attempt: Callable[..., Any], names: list[str], leaves: Any, pickled: bytes
) -> tuple[str, Any]:
    """What the function returns, or what is wrong with it in a sentence."""
    arguments, options = link.arguments(leaves, pickled)
    try:
        return "returned", watched(names, attempt)(*arguments, **options)
    except Wrong as error:
        return "wrong", str(error)
    except NotImplementedError as error:
        return ("wrong", blame(error)) if error.args else ("untried", "")
    except (Exception, SystemExit) as error:
        return "wrong", blame(error)
