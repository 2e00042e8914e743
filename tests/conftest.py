"""Shared by all tests."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def tells_right_from_wrong():
    """Check an exercise: its reference passes; the untouched stub and wrong answers fail."""

    def stub(*arguments, **options):
        raise NotImplementedError

    def check(exercise, wrong):
        assert len(wrong) >= 2, "at least two plausible wrong answers"
        exercise.test(exercise.reference)
        with pytest.raises(NotImplementedError):
            exercise.test(stub)
        for candidate in wrong:
            with pytest.raises(AssertionError):
                exercise.test(candidate)

    return check
