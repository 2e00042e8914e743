"""The judge in its own process: what it asks, what it makes of answers, honest and not."""

import importlib
import json
import os
import pickle
import pkgutil
import random
import socket
import sys
import time
from multiprocessing.connection import Client

import numpy as np
import pytest
import torch

import lablib.exercises
from lablib.course.judge import Judge
from lablib.exercises import load, named
from lablib.lab import grading, wire
from lablib.lab.answering import answer

MODULES = [found.name for found in pkgutil.iter_modules(lablib.exercises.__path__)]


@pytest.fixture(scope="module")
def judge():
    found = Judge()
    yield found
    found.stop()


@pytest.fixture
def graded(judge):
    """An attempt's outcome as the judge has it; it tells the student the same."""

    def grade(module, name, attempt, limit=20.0):
        assert judge.open(module, name)
        said = answer(judge.address, attempt, limit)
        assert judge.close() == said
        return said

    return grade


@pytest.mark.parametrize("module", MODULES)
def test_every_reference_passes_from_another_process(module, graded):
    for name, exercise in named(importlib.import_module(f"lablib.exercises.{module}")).items():
        assert graded(module, name, exercise.reference) == ("correct", "Correct."), name


def test_no_gradient_is_missed_and_none_is_invented(graded):
    def hard(margin, noise):
        return (margin + noise > 0).float()

    def soft(margin, noise):
        return (margin + noise).sigmoid()

    assert (
        "no gradient reaches the margin" in graded("learning_to_skip", "straight_through", hard)[1]
    )
    assert "that is the soft gate" in graded("learning_to_skip", "straight_through", soft)[1]


def test_a_gradient_is_taken_through_the_judges_graph(graded):
    def without_weight(loss, weight, width):
        (g,) = torch.autograd.grad(loss, weight)
        return g.sum(0).unflatten(0, (-1, width)).sum(1).abs()

    text = graded("sensi_bert", "sensitivity", without_weight)[1]
    assert "by the chain rule each g comes with its w" in text


def test_the_judges_function_is_called_here_and_its_error_is_the_callers(graded):
    exercise = load("learning_to_skip", "skip_layer")
    calls = []

    def counts(x, mask, layer):
        return exercise.reference(x, mask, lambda rows: calls.append(len(rows)) or layer(rows))

    assert graded("learning_to_skip", "skip_layer", counts)[0] == "correct" and calls
    text = graded("learning_to_skip", "skip_layer", lambda x, mask, layer: layer(x[:, :2]))[1]
    assert "layer(x[:, :2])" in text and "RuntimeError" in text


def untried(bits):
    raise NotImplementedError()


def prints(bits):
    print(2.0**bits)


def loops(bits):
    while True:
        pass


NESTED = []
NESTED.append(NESTED)


class Always(float):
    __eq__ = __le__ = __ge__ = lambda self, other: True
    __sub__ = __rsub__ = lambda self, other: 0.0
    __hash__ = float.__hash__


@pytest.mark.parametrize(
    ("attempt", "kind", "text"),
    [
        (untried, "untried", "Not tried yet (easy, about 2 minutes)"),
        (prints, "wrong", "it returned None: `return` the result"),
        (lambda bits: np.exp(bits), "wrong", "bits are logarithms to base 2"),
        (lambda bits: Always(3), "wrong", "expected 1, yours 3"),
        (lambda bits: torch.nn.Identity(), "wrong", "yours is of type Identity"),
        (lambda bits: bits / 0, "wrong", "raised ZeroDivisionError"),
        (lambda: 1.0, "wrong", "takes 0 positional arguments but 1 was given"),
        (lambda bits: sys.exit(3), "wrong", "raised SystemExit"),
        (lambda bits: 10**5000, "wrong", "cannot read what your function returns"),
        (lambda bits: NESTED, "wrong", "cannot read what your function returns"),
    ],
)
def test_each_way_of_being_wrong_is_named(attempt, kind, text, graded):
    found, said = graded("start_here", "perplexity", attempt)
    assert found == kind and text in said


def test_a_change_in_place_is_wrong(graded):
    def in_place(table, model):
        table *= 2
        return 1.0

    assert "`table` was changed in place" in graded("start_here", "bits", in_place)[1]


def test_a_loop_is_cut(graded):
    start = time.monotonic()
    kind, said = graded("start_here", "perplexity", loops, limit=1.0)
    assert kind == "wrong" and "look for a loop that does not end" in said
    assert time.monotonic() - start < 10


def test_nobody_answering_is_no_outcome(judge):
    assert judge.open("start_here", "perplexity")
    assert judge.close() is None


def test_what_is_no_exercise_is_not_opened(judge):
    assert not judge.open("start_here", "sums")
    assert judge.close() is None


def replies(address, *messages):
    """Be a process that answers each of the judge's messages with the next of these bytes."""
    with Client(address) as connection:
        for message in messages:
            connection.recv_bytes()
            connection.send_bytes(message)
        return pickle.loads(connection.recv_bytes())


class Bomb:
    """Unpickled, it ends the process that does so."""

    def __reduce__(self):
        return os._exit, (7,)


NONSENSE = {
    "a pickle": pickle.dumps(Bomb()),
    "not even JSON": b"\xff\x00",
    "no message": b"3",
    "an empty message": b"[]",
    "a verdict of its own": b'["verdict", ["correct", "Correct."]]',
    "another kind of correct": b'["correct", "Correct."]',
    "an array that lies": json.dumps(
        ["returned", {"array": "float64", "shape": [10**9, 10**9], "data": ""}]
    ).encode(),
    "a pickled array": json.dumps(
        ["returned", {"array": "object", "shape": [1], "data": "AAAAAAAAAAA="}]
    ).encode(),
    "too deep": b'["returned", ' + b'{"list": [' * 50_000 + b"]}" * 50_000 + b"]",
    "a function that is not there": b'["call", 12, {"tuple": []}]',
    "a gradient that is not there": b'["gradients", 0, null]',
}


@pytest.mark.parametrize("message", NONSENSE.values(), ids=list(NONSENSE))
def test_nonsense_is_a_wrong_answer_and_the_judge_goes_on(message, judge, graded):
    assert judge.open("start_here", "perplexity")
    kind, found, _ = replies(judge.address, message)
    assert (kind, found) == ("verdict", "wrong")
    assert judge.close()[0] == "wrong"
    assert graded("start_here", "perplexity", lambda bits: 2.0**bits)[0] == "correct"


def test_one_who_leaves_has_no_points(judge):
    assert judge.open("start_here", "perplexity")
    with Client(judge.address) as connection:
        connection.recv_bytes()
    assert judge.close() == ("wrong", "Not yet: your code ended the process that it runs in")


def test_only_the_first_answer_counts(judge):
    assert judge.open("start_here", "perplexity")
    assert answer(judge.address, lambda bits: 1.0)[0] == "wrong"
    assert answer(judge.address, lambda bits: 2.0**bits)[1] == "Not yet: the judge gave no verdict"
    assert judge.close()[0] == "wrong"


def test_who_comes_before_its_turn_is_dismissed(judge, graded):
    with Client(judge.address) as early:
        assert graded("start_here", "perplexity", lambda bits: 2.0**bits)[0] == "correct"
        with pytest.raises((EOFError, ConnectionError)):
            early.recv_bytes()


def test_check_asks_the_judge_whom_the_environment_names(judge, monkeypatch):
    monkeypatch.setattr(grading, "load", lambda *names: pytest.fail("the reference was loaded"))
    monkeypatch.setenv("LABLIB_GRADE", "1")
    monkeypatch.setenv(grading.JUDGE, judge.address)
    assert judge.open("start_here", "perplexity")
    with pytest.raises(AssertionError, match="bits are logarithms"):
        grading.check("start_here", lambda bits: np.exp(bits))
    assert judge.close()[0] == "wrong"


def test_the_judge_takes_part_in_no_grading_and_stops_when_told(monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    judge = Judge()
    assert judge.open("start_here", "bits")
    assert judge.alive
    judge.stop()
    assert not judge.scratch.exists() and not judge.alive
    assert judge.close() is None and not judge.open("start_here", "bits")
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(OSError, match="No such file"):
        client.connect(judge.address)


VALUES = [
    None, True, 3, 2**70, 0.1, float("inf"), "é", [1, (2.5, "a")], {"a": [1], 2: None}, {1, 2},
    np.arange(6).reshape(2, 3), np.array(2.5), np.empty((0, 3)), np.array([True]),
    torch.randn(2, 3), torch.tensor(3), torch.empty(0, 2), torch.randn(3).bfloat16(),
    torch.randn(4, 3).t(), torch.randn(2, dtype=torch.complex64),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_arrive_as_they_were(value):
    arrived = wire.unpack(wire.loads(wire.dumps(wire.pack(value))))
    assert type(arrived) is type(value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        assert arrived.dtype == value.dtype and arrived.shape == value.shape
        assert bool((arrived == value).all())
    else:
        assert arrived == value


def test_random_generators_go_on_where_they_were():
    from lablib.lab.link import JudgesEnd, StudentsEnd

    draw = random.Random(3)
    draw.random()
    sent = JudgesEnd(None).dumps(((draw, np.random.default_rng(1)), {}))
    (mine, numpys), _ = StudentsEnd(None).arguments([], sent)
    assert mine.random() == draw.random()
    assert numpys.random() == np.random.default_rng(1).random()
