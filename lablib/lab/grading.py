"""`check`: one cell below each exercise, for self-study and for graded courses alike."""

import html
import os
from collections.abc import Callable

from IPython.display import display

from lablib.exercises import Exercise

COLORS = {"correct": "#009e73", "wrong": "#d55e00", "untried": "#767676"}
# nbgrader sets these while it grades and validates; courses without it can set LABLIB_GRADE.
GRADING = ("LABLIB_GRADE", "NBGRADER_EXECUTION", "NBGRADER_VALIDATING")


def grading() -> bool:
    """Whether a wrong or missing answer must raise."""
    return any(os.environ.get(name) for name in GRADING)


def check(exercise: Exercise, attempt: Callable) -> None:
    """Test the reader's `attempt` and say what came of it.

    Untried (it raises NotImplementedError), it says so and the lab runs on. Under grading, a wrong
    or missing answer raises AssertionError.
    """
    outcome, text = _outcome(exercise, attempt)
    if outcome != "correct" and grading():
        raise AssertionError(text)
    style = f"border-left:6px solid {COLORS[outcome]};padding:.3em 1em"
    card = f"<div style='{style}'>{html.escape(text)}</div>"
    display({"text/html": card, "text/plain": text}, raw=True)


def _outcome(exercise: Exercise, attempt: Callable) -> tuple[str, str]:
    try:
        exercise.test(attempt)
    except NotImplementedError:
        return "untried", "Not tried yet. Replace the `raise` in the cell above, then run this one."
    except AssertionError as error:
        return "wrong", f"Not yet: {error}"
    except Exception as error:
        return "wrong", f"Not yet: your code raised {type(error).__name__}: {error}"
    return "correct", "Correct."
