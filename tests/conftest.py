"""Shared by all tests."""

import os
import shutil
import subprocess

import pytest
import torch

from lablib.chromium import chromium
from lablib.paths import project_dir

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Before anything imports triton: its own library is compiled or interpreted as a whole.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _as_many_threads_as_before():
    """A test leaves torch's threads as they were.

    Importing quantecon brings numba's, which raises their number for the whole process; whatever
    is timed after that, with more threads than cores are free, takes ten times as long.
    """
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture
def tells_right_from_wrong():
    """Check an exercise: its reference passes; the untouched stub and wrong answers fail.

    A wrong answer must return something: one that raises would fail any test. Inputs are random: an
    answer that passes once in a few hundred draws, and not in the twenty after that, is told.
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
            if kind == "correct":  # by the luck of one draw? Then the next ones tell
                again = [outcome(exercise, candidate) for _ in range(20)]
                kind, text = max(again, key=lambda one: one[0] == "correct")
            assert kind == "wrong" and "raised" not in text, text

    return check


@pytest.fixture(scope="session")
def copy_project():
    """Copies the project into a folder as git would hand it on: no ignored file, new ones too."""
    root = project_dir()
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, capture_output=True, check=True).stdout.decode()

    def copy(folder):
        for name in filter(None, names.split("\0")):
            if (root / name).is_file():  # one that is deleted and not yet committed is still listed
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)

    return copy


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium of the system."""
    pytest.importorskip("playwright.sync_api")
    with chromium() as found:
        yield found
