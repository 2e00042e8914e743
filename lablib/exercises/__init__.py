"""Exercises: a reference, and a test whose messages teach. One module a paper.

While a submission is graded these modules open for `load` alone.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lablib.evidence import tiers

DIFFICULTIES = ("easy", "medium", "open")


class Wrong(AssertionError):
    """What is wrong with an answer. It is raised, never asserted: `python -O` grades alike."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows in place of a traceback through lablib."""
        return [str(self)]


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """One exercise of a lab.

    reference: the solution; it is shown after a correct answer, so it reads well by itself.
    test: called with a candidate; raises Wrong, usually through `expect`. It draws random inputs,
        so that no constant passes. That the candidate returns something and leaves its arguments
        as they were is seen to by the grader.
    question: one sentence to think on after a correct answer.
    hint: what to look at, shown folded until the answer is correct.
    minutes: for a reader of the lab. difficulty: "easy", "medium" or "open".
    """

    reference: Callable[..., Any]
    test: Callable[[Callable[..., Any]], None]
    question: str
    hint: str
    minutes: int
    difficulty: str

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty {self.difficulty!r} is none of {', '.join(DIFFICULTIES)}")


def load(module: str, name: str) -> Exercise:
    """The exercise `name` of `lablib.exercises.<module>`.

    Raises LookupError, naming those there are, when the module has no such exercise.
    """
    exercises = named(_module(module))
    if name not in exercises:
        raise LookupError(
            f"{name!r} is no exercise of this lab; keep the function's name, one of "
            f"{', '.join(exercises)}"
        )
    return exercises[name]


def named(module: Any) -> dict[str, Exercise]:
    """The exercises that a module defines, by name, in order."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Exercise)}


class _Closed(importlib.abc.MetaPathFinder):
    """Refuses the modules of references while a submission is graded, except to `load`."""

    opened = False

    def find_spec(self, fullname, path, target=None):
        if fullname.startswith(f"{__name__}.") and tiers.grading() and not self.opened:
            raise ImportError("exercises cannot be imported while they are graded; use lab.check")


_closed = _Closed()
sys.meta_path.insert(0, _closed)


def _module(name: str) -> Any:
    place = f"{__name__}.{name}"
    if not tiers.grading():
        return importlib.import_module(place)
    _closed.opened = True
    try:
        return importlib.import_module(place)
    finally:
        _closed.opened = False
        sys.modules.pop(place, None)  # the submission, which runs next, does not find it there
        globals().pop(name, None)


def expect(
    found: Any,
    wanted: Any,
    hint: str = "",
    *,
    known: Iterable[tuple[Any, str]] = (),
    atol: float = 1e-6,
) -> None:
    """Raise Wrong unless `found` is of wanted's kind and, in each element, within `atol` of it.

    wanted: a number, array, tensor, or anything that == compares; tuples, lists and dicts of them.
    hint: a sentence on what to look at, added to a wrong value.
    known: wrong values that have a well-known cause, each with a sentence that is said instead.
    """
    same_kind(found, wanted)
    difference = differs(found, wanted, atol)
    if not difference:
        return
    for value, why in known:
        if not differs(found, value, atol):
            raise Wrong(why)
    raise Wrong(f"{difference}. {hint}" if hint else difference)


def same_kind(found: Any, wanted: Any) -> None:
    """Raise Wrong unless `found` has the type, shape and dtype of `wanted`.

    For a number any type of number will do, for an integer any of integer; for a tuple a list.
    """
    if difference := _other_kind(found, wanted):
        raise Wrong(difference)


INT, FLOAT = ("a whole number", (), ""), ("a number", (), "")


def _kind(value: Any) -> tuple[str, tuple[int, ...], str]:
    """Type in words, shape and dtype; the last two empty where there are none."""
    if is_tensor(value):
        return "a tensor", tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if isinstance(value, np.ndarray):
        return "an array", value.shape, str(value.dtype)
    if isinstance(value, (tuple, list)):
        return "a tuple", (len(value),), ""
    if isinstance(value, (bool, np.bool_)):
        return "True or False", (), ""
    if isinstance(value, (int, np.integer)):
        return INT
    if isinstance(value, (float, np.floating)):
        return FLOAT
    return f"of type {type(value).__name__}", (), ""


def _other_kind(found: Any, wanted: Any) -> str:
    yours, right = _kind(found), _kind(wanted)
    if right in (INT, FLOAT) and getattr(found, "shape", None) == ():
        yours = _kind(found.item())  # an array or tensor of one number
    if yours == right or (yours, right) == (INT, FLOAT):
        return ""
    if yours[0] != right[0]:
        return f"expected {_described(right)}, yours is {_described(yours)}"
    name, at = ("shape", 1) if yours[1] != right[1] else ("dtype", 2)
    return f"expected {right[0]} of {name} {right[at]}, yours has {name} {yours[at]}"


def _described(kind: tuple[str, tuple[int, ...], str]) -> str:
    name, shape, dtype = kind
    if name in ("a tensor", "an array"):
        return f"{name} of shape {shape} and dtype {dtype}"
    return f"{name} of {shape[0]}" if shape else name


def is_tensor(value: Any) -> bool:
    """Whether it is a torch.Tensor, without importing torch."""
    return "torch" in sys.modules and sys.modules["torch"].is_tensor(value)


def differs(found: Any, wanted: Any, atol: float = 0.0) -> str:
    """How `found` differs from `wanted`, where most, in words; empty when it does not."""
    if difference := _other_kind(found, wanted):
        return difference
    if isinstance(wanted, dict):
        if found.keys() != wanted.keys():
            return f"expected the keys {list(wanted)}, yours are {list(found)}"
        return _first((differs(found[key], wanted[key], atol), f"[{key!r}]") for key in wanted)
    if isinstance(wanted, (tuple, list)):
        pairs = enumerate(zip(found, wanted, strict=True))
        return _first((differs(*pair, atol), f"[{at}]") for at, pair in pairs)
    if is_tensor(wanted) or isinstance(wanted, (np.ndarray, np.floating, float)):
        return _worst(found, wanted, atol)
    same = found is wanted or found == wanted
    return "" if same else f"expected {wanted}, yours {found}"


def _first(differences: Iterable[tuple[str, str]]) -> str:
    return next((f"at {place}: {text}" for text, place in differences if text), "")


def _worst(found: Any, wanted: Any, atol: float) -> str:
    """The largest difference; NaN and infinity are infinitely far from numbers."""
    yours, right = _numbers(found), _numbers(wanted)
    with np.errstate(invalid="ignore"):
        gap = np.nan_to_num(np.abs(yours - right), nan=np.inf)
    gap = np.where((yours == right) | (np.isnan(yours) & np.isnan(right)), 0.0, gap)
    if not gap.size or gap.max() <= atol:
        return ""
    at = np.unravel_index(gap.argmax(), gap.shape)
    where = f"largest difference at {[int(i) for i in at]}: " if at else ""
    return "{}expected {}, yours {}".format(where, *_rounded(right[at], yours[at]))


def _numbers(value: Any) -> np.ndarray:
    if is_tensor(value):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, np.float64)


def _rounded(right: float, yours: float) -> tuple[str, str]:
    """Both numbers with as many digits as tell them apart, four at least."""
    pair = "", ""
    for digits in (4, 6, 9, 17):
        if all(float(value).is_integer() and abs(value) < 1e15 for value in (right, yours)):
            return f"{right:.0f}", f"{yours:.0f}"
        pair = f"{right:.{digits}g}", f"{yours:.{digits}g}"
        if pair[0] != pair[1]:
            break
    return pair
