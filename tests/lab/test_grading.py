import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import lablib.exercises
from lablib.evidence import tiers
from lablib.exercises import Exercise, Wrong, expect, load, same_kind
from lablib.lab import grading
from lablib.lab.grading import check, outcome

UNTRIED = "Not tried yet (easy, about 2 minutes). Replace the `raise` in the cell above, then run"


def twice(values):
    return [2 * value for value in values if value < 1e9]


def doubled(candidate):
    values = np.random.default_rng().uniform(1, 2, size=3).tolist()
    expect(candidate(values), twice(values), "Every value is doubled")


TWICE = Exercise(
    reference=twice,
    test=doubled,
    question="Is 2 < 3?",
    hint="Think of <b>two</b>.",
    minutes=2,
    difficulty="easy",
)


@pytest.fixture(autouse=True)
def no_grading(monkeypatch):
    for name in tiers.GRADING:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: one dictionary a card."""
    cards = []
    monkeypatch.setattr(grading, "display", lambda card, raw: cards.append(card))
    monkeypatch.setattr(grading, "load", lambda module, name: TWICE)
    return cards


def untried(values):
    raise NotImplementedError


def prints(values):
    print([2 * value for value in values])


def in_place(values):
    for at in range(len(values)):
        values[at] *= 2
    return values


def sloppy(values):
    return [2 * value / 0 for value in values]


def test_a_right_answer_shows_the_reference_and_a_question_escaped(shown):
    check("any", twice)
    assert shown[0]["text/plain"] == "Correct."
    page = shown[0]["text/html"]
    assert "<details><summary>One way" in page and "def twice(values):" in page
    assert "if value &lt; 1e9" in page and "Is 2 &lt; 3?" in page and "Think of &lt;" not in page


@pytest.mark.parametrize("attempt", [untried, prints, in_place, sloppy])
def test_anything_else_shows_a_folded_hint_and_never_the_reference(attempt, shown):
    check("any", attempt)
    page = shown[0]["text/html"]
    assert "<details><summary>Hint</summary>Think of &lt;b&gt;two" in page
    assert "def twice" not in page


@pytest.mark.parametrize(
    ("attempt", "kind", "text"),
    [
        (untried, "untried", UNTRIED),
        (prints, "wrong", "it returned None: `return` the result"),
        (in_place, "wrong", "`values` was changed in place"),
        (lambda values: 42, "wrong", "expected a tuple of 3, yours is a whole number"),
        (lambda values: values[:2], "wrong", "expected a tuple of shape (3,), yours has"),
        (lambda values: [4.0, 4.0, 0.0], "wrong", "Every value is doubled"),
        (lambda: 3, "wrong", "takes 0 positional arguments but 1 was given"),
        (lambda values: sys.exit(3), "wrong", "raised SystemExit"),
    ],
)
def test_each_way_of_being_wrong_is_named(attempt, kind, text):
    found, said = outcome(TWICE, attempt)
    assert found == kind and text in said


def test_an_error_is_blamed_on_the_readers_own_line():
    line = sloppy.__code__.co_firstlineno + 1
    text = outcome(TWICE, sloppy)[1]
    assert f"line {line} of your code, `return [2 * value / 0 for value in values]`" in text
    assert text.endswith("raised ZeroDivisionError: float division by zero")
    library = outcome(TWICE, lambda values: np.stack(["a", values]))[1]
    assert "np.stack" in library and "lablib" not in library


def test_an_error_in_the_tests_callback_is_blamed_on_who_called_it():
    exercise = load("learning_to_skip", "skip_layer")
    text = outcome(exercise, lambda x, mask, layer: layer(x[:, :2]))[1]
    assert "layer(x[:, :2])" in text and "RuntimeError" in text


def test_what_torch_has_not_implemented_is_no_untried_exercise():
    def attempt(values):
        raise NotImplementedError("could not run aten::x")

    assert outcome(TWICE, attempt)[0] == "wrong"


def loops(values):
    while True:
        pass


def sleeps(values):
    time.sleep(60)


def swallows(values):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


@pytest.mark.parametrize("attempt", [loops, sleeps, swallows])
@pytest.mark.parametrize("main", [True, False])
def test_time_is_limited_on_the_main_thread_and_on_others(attempt, main):
    found, start = [], time.monotonic()
    if main:
        found.append(outcome(TWICE, attempt, 0.2))
    else:
        target = lambda: found.append(outcome(TWICE, attempt, 0.2))  # noqa: E731
        thread = threading.Thread(target=target)
        thread.start()
        thread.join(20)
    assert time.monotonic() - start < 5
    assert found[0][0] == "wrong" and "stopped after 0.2 s" in found[0][1]


def test_another_thread_passes_answers_and_errors_on():
    found = []
    for attempt in (twice, sloppy, untried):
        thread = threading.Thread(target=lambda a=attempt: found.append(outcome(TWICE, a)))
        thread.start()
        thread.join()
    assert [kind for kind, _ in found] == ["correct", "wrong", "untried"]
    assert "line" in found[1][1] and "float division by zero" in found[1][1]


def test_an_alarm_that_was_set_before_still_rings():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert outcome(TWICE, twice)[0] == "correct"
        time.sleep(0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rang == [signal.SIGALRM]


def test_random_numbers_go_on_as_if_nothing_was_drawn():
    exercise = load("switch_transformers", "balance_gradient")
    torch.manual_seed(0)
    first = torch.rand(3)
    torch.manual_seed(0)
    assert outcome(exercise, exercise.reference)[0] == "correct"
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    ("found", "wanted", "text"),
    [
        (1.0, 1, "expected a whole number, yours is a number"),
        (True, 1, "expected a whole number, yours is True or False"),
        ("a", 1.0, "expected a number, yours is of type str"),
        (11, 12, "expected 12, yours 11"),
        (2**60, 2**60 + 1, "yours 1152921504606846976"),
        (0.12341, 0.1234, "expected 0.1234, yours 0.12341"),
        (float("nan"), 1.0, "expected 1, yours nan"),
        ([1.0], np.ones(1), "expected an array of shape (1,) and dtype float64, yours is a tuple"),
        (np.ones((4, 1)), np.ones(4), "expected an array of shape (4,), yours has shape (4, 1)"),
        (np.ones(2, int), np.ones(2), "expected an array of dtype float64, yours has dtype int64"),
        (np.ones(2), torch.ones(2), "expected a tensor of shape (2,) and dtype float32"),
        (torch.ones(2, 2), torch.eye(2), "largest difference at [0, 1]: expected 0, yours 1"),
        (torch.tensor([[1.5, 2.0]]), torch.tensor([[1.25, 2.0]]), "[0, 0]: expected 1.25, yours 1"),
        ((1, (2, 4)), (1, (2, 3)), "at [1]: at [1]: expected 3, yours 4"),
        ((1.0, None), (1.0, 2.0), "at [1]: expected a number, yours is of type NoneType"),
        ({"a": 1}, {"b": 1}, "expected the keys ['b'], yours are ['a']"),
        ("cat", "dog", "expected dog, yours cat"),
    ],
)
def test_expect_says_what_was_expected(found, wanted, text):
    with pytest.raises(Wrong) as caught:
        expect(found, wanted)
    assert text in str(caught.value)
    expect(wanted, wanted)


def test_expect_allows_what_is_no_mistake():
    expect(1, 1.0)
    expect(np.int64(3), 3)
    expect(torch.tensor(3), 3)
    expect(np.float32(0.5), 0.5)
    expect([1.0, 2.0], (1.0, 2.0))
    expect(np.array([np.nan, np.inf]), np.array([np.nan, np.inf]))
    expect(torch.ones(3, requires_grad=True), torch.ones(3))
    expect(np.empty(0), np.empty(0))
    expect(1.05, 1.0, atol=0.1)


def test_expect_gives_the_hint_for_values_and_a_known_cause_in_its_place():
    known = [(2.0, "that is the double")]
    with pytest.raises(Wrong, match="^that is the double$"):
        expect(2.0, 1.0, "Look again", known=known)
    with pytest.raises(Wrong, match=r"^expected 1, yours 3\. Look again$"):
        expect(3.0, 1.0, "Look again", known=known)
    with pytest.raises(Wrong, match="yours is of type str$"):
        same_kind("3", 1.0)


def test_exercises_are_found_by_name_or_refused_in_a_sentence():
    with pytest.raises(LookupError, match="'drop' is no exercise .* one of dropped, balance"):
        load("switch_transformers", "drop")
    with pytest.raises(TypeError, match="takes the function itself; 3 is what it returns"):
        check("switch_transformers", 3)
    with pytest.raises(ValueError, match="'hard' is none of easy, medium, open"):
        Exercise(reference=twice, test=doubled, question="?", hint="", minutes=1, difficulty="hard")


@pytest.mark.parametrize("name", tiers.GRADING)
def test_under_grading_wrong_and_missing_answers_raise(name, monkeypatch, shown):
    monkeypatch.setenv(name, "autograde")
    check("any", twice)
    assert shown[0]["text/plain"] == "Correct." and "def twice" not in shown[0]["text/html"]
    for attempt in (untried, prints, sloppy):
        with pytest.raises(AssertionError) as caught:
            check("any", attempt)
        assert caught.value._render_traceback_() == [str(caught.value)]


def test_under_grading_the_tier_is_smoke_unless_it_is_set(monkeypatch):
    monkeypatch.delenv("LABLIB_TIER", raising=False)
    assert tiers.current() != "smoke"
    monkeypatch.setenv("LABLIB_GRADE", "1")
    assert tiers.current() == "smoke"
    monkeypatch.setenv("LABLIB_TIER", "cpu")
    assert tiers.current() == "cpu"


CHEAT = """
import sys
from lablib.lab import grading

def perplexity(bits):
    {body}

for _ in range(2):
    try:
        {cheat}
    except ImportError as error:
        print(error)
    try:
        grading.check("start_here", perplexity)
    except AssertionError as error:
        print(error)
"""
IMPORTS = [
    "import lablib.exercises.start_here",
    "from lablib.exercises import start_here",
    "from lablib.exercises.start_here import _perplexity",
    "__import__('lablib.exercises.start_here')",
]


def graded(**parts):
    script = CHEAT.format(**parts)
    env = {**os.environ, "LABLIB_GRADE": "1"}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("cheat", IMPORTS)
def test_under_grading_references_are_not_imported(cheat):
    said = graded(body="return 2.0**bits", cheat=cheat)
    assert said.count("exercises cannot be imported while they are graded") == 2
    assert said.count("'text/plain': 'Correct.'") == 2


def test_nor_within_the_answer():
    body = "from lablib.exercises import start_here as s; return s._perplexity(bits)"
    said = graded(body=body, cheat="print('lablib.exercises.start_here' in sys.modules)")
    assert said.count("ImportError: exercises cannot be imported") == 2
    assert said.count("False") == 2 and "Correct" not in said


def test_the_package_is_left_as_it_was():
    assert lablib.exercises._closed.opened is False
