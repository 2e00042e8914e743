"""Shared by all tests."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Before anything imports triton: its own library is compiled or interpreted as a whole.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def tells_right_from_wrong():
    """Check an exercise: its reference passes; the untouched stub and wrong answers fail.

    A wrong answer must return something: one that raises would fail any test.
    """
    from lablib.lab.grading import outcome

    def stub(*arguments, **options):
        raise NotImplementedError

    def check(exercise, wrong):
        assert len(wrong) >= 2, "at least two plausible wrong answers"
        assert outcome(exercise, exercise.reference) == ("correct", "Correct.")
        assert outcome(exercise, stub)[0] == "untried"
        for candidate in wrong:
            kind, text = outcome(exercise, candidate)
            assert kind == "wrong" and "raised" not in text, text

    return check
