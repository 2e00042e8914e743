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
