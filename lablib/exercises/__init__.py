"""Exercises: a reference, and a test whose messages teach. One module a paper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lab.

    reference: the solution.
    test: called with a candidate; raises AssertionError with a message that teaches. It draws
        random inputs, so that no constant passes.
    """

    reference: Callable[..., Any]
    test: Callable[[Callable[..., Any]], None]
