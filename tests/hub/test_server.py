"""What a student's server of the demonstration does before it starts."""

import os
import subprocess
import sys

import pytest

from lablib.hub.server import link_cache


@pytest.fixture
def shared(tmp_path):
    """A cache as set-up leaves it, and one encoded mixture."""
    for name in ("corpora/bible.jsonl", "models/tiny/config.json", "mixtures/a.npz"):
        path = tmp_path / "shared" / name
        path.parent.mkdir(parents=True)
        path.write_text(name)
    return tmp_path / "shared"


def test_a_students_cache_reads_the_shared_one_and_writes_its_own(shared, tmp_path):
    own = tmp_path / "own"
    link_cache(shared, own)
    assert (own / "corpora/bible.jsonl").read_text() == "corpora/bible.jsonl"
    assert (own / "mixtures/a.npz").read_text() == "mixtures/a.npz"
    (own / "mixtures/b.npz").write_text("mine")
    (shared / "mixtures/c.npz").write_text("new")
    link_cache(shared, own)
    assert sorted(path.name for path in (own / "mixtures").iterdir()) == ["a.npz", "b.npz", "c.npz"]
    assert sorted(path.name for path in (shared / "mixtures").iterdir()) == ["a.npz", "c.npz"]


def test_a_cache_that_moved_is_found_again(shared, tmp_path):
    link_cache(shared, tmp_path / "own")
    moved = shared.rename(tmp_path / "moved")
    link_cache(moved, tmp_path / "own")
    assert (tmp_path / "own/models/tiny/config.json").is_file()


def ran(code):
    command = [sys.executable, "-c", f"from lablib.hub.server import *\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere systems do not hold to it")
def test_memory_beyond_the_limit_is_an_error_that_python_survives():
    code = "limit_memory(2**29)\ntry: bytearray(2**30)\nexcept MemoryError: print('goes on')"
    assert ran(code).stdout == "goes on\n"
    assert ran("limit_memory(0); print(len(bytearray(2**29)))").stdout == f"{2**29}\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="for Linux")
def test_cores_are_limited():
    count = "print(len(os.sched_getaffinity(0)))"
    assert ran(f"limit_cores(1.0); {count}").stdout == "1\n"
    there = f"{len(os.sched_getaffinity(0))}\n"
    assert (
        ran(f"limit_cores(0); {count}").stdout == there == ran(f"limit_cores(999); {count}").stdout
    )
