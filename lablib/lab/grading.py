"""`check`: one cell below each exercise, for self-study and for graded courses alike."""

import contextlib
import functools
import html
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from IPython.display import display

from lablib.evidence import tiers
from lablib.exercises import Exercise, Wrong, differs, is_tensor, load
from lablib.lab.limits import LIMIT, TooSlow, within
from lablib.paths import PACKAGE

COLORS = {"correct": "#009e73", "wrong": "#d55e00", "untried": "#767676"}
JUDGE = "LABLIB_JUDGE"  # where a course's judge listens: the answer is compared there, not here


def check(module: str, attempt: Callable[..., Any]) -> None:
    """Test the reader's `attempt` against the exercise of its name and say what came of it.

    module: of the exercises, such as "switch_transformers". Untried (it raises
    NotImplementedError), it says so and the lab runs on. Under grading, a wrong or missing answer
    raises Wrong, an AssertionError. Raises TypeError when `attempt` is no function, LookupError
    when the lab has no exercise of its name.
    """
    if not callable(attempt):
        raise TypeError(f"lab.check takes the function itself; {attempt!r} is what it returns")
    name = getattr(attempt, "__name__", type(attempt).__name__)
    if address := os.environ.get(JUDGE):
        from lablib.lab.answering import answer

        result, text = answer(address, attempt)
    else:
        exercise = load(module, name)
        result, text = outcome(exercise, attempt)
    if tiers.grading() and result != "correct":
        raise Wrong(text)
    more = _after(exercise, name, result) if not tiers.grading() else ""
    style = f"border-left:6px solid {COLORS[result]};padding:.3em 1em;max-width:46em"
    card = f"<div style='{style}'>{html.escape(text)}{more}</div>"
    display({"text/html": card, "text/plain": text}, raw=True)


def outcome(
    exercise: Exercise, attempt: Callable[..., Any], limit: float = LIMIT
) -> tuple[str, str]:
    """("correct", "wrong" or "untried", what to say of it).

    limit: seconds. The notebook's random numbers go on as if nothing had been drawn.
    """
    try:
        with own_random_numbers():
            within(limit, exercise.test, watched(parameters(exercise.reference), attempt))
    except Wrong as error:
        return "wrong", f"Not yet: {error}"
    except TooSlow:
        return "wrong", (
            f"Not yet: your code was stopped after {limit:g} s; look for a loop that does not end"
        )
    except NotImplementedError as error:
        return ("wrong", f"Not yet: {blame(error)}") if error.args else _untried(exercise)
    except (Exception, SystemExit) as error:
        return "wrong", f"Not yet: {blame(error)}"
    return "correct", "Correct."


def _untried(exercise: Exercise) -> tuple[str, str]:
    minutes = f"{exercise.minutes} minute{'s' if exercise.minutes > 1 else ''}"
    return "untried", (
        f"Not tried yet ({exercise.difficulty}, about {minutes}). Replace the `raise` in the cell "
        "above, then run this one."
    )


def _after(exercise: Exercise, name: str, result: str) -> str:
    """HTML below the outcome: the reference and a question, or the hint."""
    if result != "correct":
        return _folded("Hint", html.escape(exercise.hint))
    source = inspect.cleandoc("\n" + inspect.getsource(exercise.reference))
    source = source.replace(f"def {exercise.reference.__name__}(", f"def {name}(", 1)
    question = f"<div>Think on: {html.escape(exercise.question)}</div>"
    return _folded("One way to write it", f"<pre>{html.escape(source)}</pre>") + question


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>{body}</details>"


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, in order."""
    return list(inspect.signature(function).parameters)


def watched(names: list[str], attempt: Callable[..., Any]) -> Callable[..., Any]:
    """`attempt`; it raises Wrong when it returns None or changes an argument in place.

    names: of the parameters, for what is said.
    """

    @functools.wraps(attempt)
    def call(*arguments: Any, **options: Any) -> Any:
        before = _snapshot(arguments)
        returned = attempt(*arguments, **options)
        for at, name in enumerate(names[: len(before)]):
            if differs(arguments[at], before[at]):
                raise Wrong(f"`{name}` was changed in place; its owner needs it: change a copy")
        if returned is None:
            raise Wrong("it returned None: `return` the result; `print` only shows it")
        return returned

    return call


def _snapshot(value: Any) -> Any:
    """A copy of the data in it; what is no array, tensor or container stays itself."""
    if is_tensor(value):
        return value.detach().clone()
    if isinstance(value, (tuple, list)):
        return [_snapshot(item) for item in value]
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    return value.copy() if isinstance(value, np.ndarray) else value


def blame(error: BaseException) -> str:
    """What went wrong in the reader's own code: its line, not lablib's and not a library's."""
    text = f"{type(error).__name__}: {error}".strip(": ").splitlines()[0][:200]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_readers(f.filename)]
    if not frames:
        return f"the check cannot use what your function takes or returns ({text})"
    return f"line {frames[-1].lineno} of your code, `{frames[-1].line}`, raised {text}"


def _is_readers(filename: str) -> bool:
    paths = sysconfig.get_paths()
    others = (PACKAGE, *(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")))
    path = Path(filename)
    return not filename.startswith("<frozen") and not any(p in path.parents for p in others)


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Fresh random numbers inside; torch's generator is put back at the end."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    state = torch.random.get_rng_state()
    torch.random.default_generator.seed()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)
