"""Wrong answers made from each reference by rule: none may pass its exercise's test."""

import functools
import importlib
import inspect
import math
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lablib.exercises
from lablib.exercises import expect, named
from lablib.lab.grading import outcome


def exercises():
    """Every exercise of every module, by "module.name"."""
    modules = [found.name for found in pkgutil.iter_modules(lablib.exercises.__path__)]
    return {
        f"{module}.{name}": exercise
        for module in modules
        for name, exercise in named(
            importlib.import_module(f"lablib.exercises.{module}")
        ).items()
    }  # fmt: skip


EXERCISES = exercises()


def each(change, value):
    """`value` with `change` applied to each number, array or tensor in it."""
    if isinstance(value, (tuple, list)):
        return type(value)(each(change, item) for item in value)
    return change(value)


def whole(value):
    """Whether it holds integers, truth values or text: nothing to round."""
    if isinstance(value, (tuple, list)):
        return all(whole(item) for item in value)
    if torch.is_tensor(value):
        return not value.is_floating_point()
    return not np.issubdtype(np.asarray(value).dtype, np.floating)


def numbers(value):
    if isinstance(value, (tuple, list)):
        return bool(value) and all(numbers(item) for item in value)
    if torch.is_tensor(value):
        return value.dtype != torch.bool
    return np.issubdtype(np.asarray(value).dtype, np.number)


def rounded(value):
    return value.round() if torch.is_tensor(value) else np.round(value)


def floored(value):
    return value.floor() if torch.is_tensor(value) else np.floor(value)


def two_decimals(value):
    return torch.round(value, decimals=2) if torch.is_tensor(value) else np.round(value, 2)


def more(value):
    return value + 1 if whole(value) else value * 1.01


def less(value):
    return value - 1 if whole(value) else value * 0.99


def full_of_42(value):
    if torch.is_tensor(value):
        return torch.full_like(value, 42)
    return np.full_like(value, 42) if isinstance(value, np.ndarray) else type(value)(42)


def last_wrong(value):
    if isinstance(value, (tuple, list)):
        return type(value)([*value[:-1], each(more, value[-1])])
    changed = value.clone() if torch.is_tensor(value) else value.copy()
    changed[(-1,) * changed.ndim] += 1
    return changed


def other_shape(value):
    if isinstance(value, (tuple, list)):
        return type(value)([*value, value[-1]])
    return value[None] if getattr(value, "ndim", 0) else [value]


def other_dtype(value):
    if torch.is_tensor(value):
        return value.double() if value.dtype != torch.float64 else value.float()
    if isinstance(value, np.ndarray):
        return value.astype(np.float64 if value.dtype != np.float64 else np.float32)
    return float(value) if whole(value) else complex(value)


def spoil(argument):
    """Change the data in an argument in place."""
    if torch.is_tensor(argument):
        argument.data = argument.data.clone()
        with torch.no_grad():
            argument.logical_not_() if argument.dtype == torch.bool else argument.add_(1)
    elif isinstance(argument, np.ndarray):
        np.logical_not(argument, argument) if argument.dtype == bool else argument.__iadd__(1)
    else:
        argument.append(argument[0])


def is_data(argument):
    return torch.is_tensor(argument) or isinstance(argument, (np.ndarray, list))


def calls(exercise):
    """The arguments and results of the reference, as its own test calls it."""
    seen = []

    @functools.wraps(exercise.reference)
    def recorded(*arguments):
        seen.append((arguments, exercise.reference(*arguments)))
        return seen[-1][1]

    exercise.test(recorded)
    return seen


def mutants(exercise):
    """Wrong answers by name: those that the reference's own results leave room for."""
    reference, seen = exercise.reference, calls(exercise)
    results = [result for _, result in seen]
    changes = {}
    if all(map(numbers, results)):
        changes |= {"one more": more, "one less": less, "42 of its kind": full_of_42}
        changes |= {"other dtype": other_dtype}
    if not any(map(whole, results)):
        changes |= {"rounded": rounded, "floored": floored, "two decimals": two_decimals}
    made = {
        name: lambda *given, change=change: each(change, reference(*given))
        for name, change in changes.items()
    }
    made["other shape"] = lambda *given: other_shape(reference(*given))
    if all(np.ndim(result) or isinstance(result, (tuple, list)) for result in results):
        made["last wrong"] = lambda *given: last_wrong(reference(*given))
    if any(is_data(argument) for arguments, _ in seen for argument in arguments):
        made["changes its input"] = lambda *given: spoiling(reference, given)
    return made | {"prints": lambda *given: None, "42": lambda *given: 42, "stub": stub}


def spoiling(reference, given):
    result = reference(*given)
    spoil(next(argument for argument in given if is_data(argument)))
    return result


def stub(*given):
    raise NotImplementedError


def passes(exercise, answer):
    """Whether an answer passes, and not by the luck of one draw of random inputs.

    One random result in a few hundred lies within tolerance of itself rounded. A test that is
    too lax lets the same mutant through again.
    """
    if outcome(exercise, answer)[0] != "correct":
        return False
    return sum(outcome(exercise, answer)[0] == "correct" for _ in range(20)) > 1


def survivors(exercise):
    """Names of the mutants that pass."""
    return [name for name, answer in mutants(exercise).items() if passes(exercise, answer)]


@pytest.mark.parametrize("name", EXERCISES)
def test_no_mutant_of_the_reference_passes(name):
    exercise = EXERCISES[name]
    assert len(mutants(exercise)) >= 6
    for _ in range(5):  # inputs are random
        assert outcome(exercise, exercise.reference) == ("correct", "Correct.")
        assert survivors(exercise) == []


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_has_a_question_a_hint_and_readable_names(name):
    exercise = EXERCISES[name]
    assert exercise.question.endswith("?") and exercise.hint and exercise.minutes > 0
    assert not exercise.reference.__name__.startswith("<")
    assert inspect.getsource(exercise.reference)


def test_a_mutant_that_gets_lucky_once_does_not_survive_and_one_that_often_passes_does():
    def passing(*results):
        draws = iter(results)

        def test(answer):
            expect(answer(next(draws)), 1)

        exercise = replace(EXERCISES["dress.leak"], reference=abs, test=test)
        return passes(exercise, abs)

    assert not passing(0)
    assert not passing(1, *[0] * 20)
    assert not passing(1, 1, *[0] * 19)
    assert passing(1, *[0, 1] * 10)


def test_the_mutants_are_wrong():
    """Each rule changes what it is meant to change, so that none is refused for nothing."""
    assert (more(3), less(3), full_of_42(3), other_dtype(3)) == (4, 2, 42, 3.0)
    assert last_wrong((1.0, 2.0)) == (1.0, 2.02) and other_shape((1,)) == (1, 1)
    assert floored(2.7) == 2 and rounded(2.7) == 3 and math.isclose(two_decimals(0.126), 0.13)
    assert last_wrong(np.zeros((2, 2))).tolist() == [[0, 0], [0, 1]]
    for argument in (torch.zeros(2), np.zeros(2), [0]):
        before = list(argument)
        spoil(argument)
        assert list(argument) != before


OPTIMIZED = """
import runpy, sys
scope = runpy.run_path(sys.argv[1])
exercises, outcome = scope["EXERCISES"], scope["outcome"]
passed = {name: scope["survivors"](exercise) for name, exercise in exercises.items()}
right = {outcome(exercise, exercise.reference)[0] for exercise in exercises.values()}
print(sys.flags.optimize, {name: wrong for name, wrong in passed.items() if wrong}, *right)
"""


def test_the_grader_grades_alike_without_asserts():
    command = [sys.executable, "-O", "-c", OPTIMIZED, str(Path(__file__))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.stdout.split("\n")[0] == "1 {} correct", ran.stdout + ran.stderr
