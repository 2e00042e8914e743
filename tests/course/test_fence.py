"""The fence around a kernel: what stays readable and writable, and what does not."""

import os
import subprocess
import sys

import pytest

from lablib.course import fence
from lablib.course.fence import around
from lablib.course.kernel import closed
from lablib.paths import PACKAGE, project_dir

SECRET = PACKAGE / "exercises" / "start_here.py"


def test_what_is_around_holds_all_but_what_is_closed(tmp_path):
    for name in ("a/b/secret", "a/b/open", "a/c/open", "d/secret"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    found = set(around({tmp_path / "a/b/secret", tmp_path / "d"}, tmp_path))
    assert found == {tmp_path / "a/b/open", tmp_path / "a/c"}


def test_the_references_their_history_and_the_course_are_closed(tmp_path):
    found = closed(tmp_path)
    assert {tmp_path, SECRET} <= set(found)
    assert PACKAGE / "exercises" / "__init__.py" not in found
    assert project_dir() / "tests" in found


SCRIPT = """
import os, pathlib, tempfile
from lablib.course import fence, kernel
from lablib.paths import PACKAGE
course, own = pathlib.Path(os.environ["LABLIB_COURSE"]), pathlib.Path(tempfile.gettempdir())
fence.enclose(kernel.closed(course), [own, pathlib.Path("/dev")], [course / "mine", own])
SECRET = str(PACKAGE / "exercises" / "start_here.py")
"""
WAYS = {
    "open": "open(SECRET).read()",
    "a link": "os.symlink(SECRET, own / 'l'); open(own / 'l').read()",
    "a hard link": "os.link(SECRET, own / 'l'); open(own / 'l').read()",
    "a folder's number": "os.open('start_here.py', 0, dir_fd=os.open(PACKAGE / 'exercises', 0))",
    "numpy": "import numpy; numpy.fromfile(SECRET, 'u1')",
    "a library in C": "import torch; torch.from_file(SECRET, size=9, dtype=torch.uint8)",
    "a program": "import subprocess; subprocess.run(['cat', SECRET], check=True)",
    "a shell": "assert os.system(f'cat {SECRET}') == 0",
    "an import": "import lablib.exercises.start_here",
    "its history": "open(PACKAGE.parent / '.git' / 'HEAD').read()",
    "another's work": "open(course / 'submitted').read()",
    "writing the gradebook": "open(course / 'gradebook', 'w').write('100')",
    "writing one's own": "open(course / 'mine', 'w').write('100')",
    "removing the gradebook": "os.remove(course / 'gradebook')",
    "writing the package": "open(PACKAGE / 'lab' / 'grading.py', 'r+').read()",
    "a new module": "open(PACKAGE / 'patch_for_a_test.py', 'w').close()",
    "a file in its place": "os.rename(own / 'x', SECRET)",
    "writing at home": "open(pathlib.Path.home() / '.patch_for_a_test', 'w').close()",
}  # fmt: skip


@pytest.fixture
def fenced(tmp_path):
    """What a script behind the fence prints, and its exit status."""
    if not fence.available():
        pytest.skip("this system has no Landlock")
    course, own = tmp_path / "course", tmp_path / "own"
    course.mkdir()
    own.mkdir()
    (own / "x").write_text("mine")
    for name in ("gradebook", "submitted", "mine"):
        (course / name).write_text(name)

    def run(code):
        env = {**os.environ, "TMPDIR": str(own), "LABLIB_COURSE": str(course)}
        command = [sys.executable, "-c", SCRIPT + code]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_no_way_leads_through(way, fenced):
    ran = fenced(way)
    assert ran.returncode != 0 and "_perplexity" not in ran.stdout
    refused = ("Permission denied", "Operation not permitted", "AssertionError", "Invalid cross-")
    assert any(word in ran.stderr for word in refused), ran.stderr


@pytest.mark.skipif(fence.version() < fence.SIGNALS_SINCE, reason="an older Landlock")
def test_no_signal_reaches_the_grader(fenced):
    assert "PermissionError" in fenced("os.kill(os.getppid(), 0)").stderr


def test_work_goes_on_behind_it(fenced):
    ran = fenced(
        "import lablib.language_models.bigram, subprocess, sys\n"
        "(own / 'y').write_text('kept')\n"
        "print(open(course / 'mine').read(), open(own / 'y').read())\n"
        "subprocess.run([sys.executable, '-c', 'print(1 + 1)'], check=True)"
    )
    assert ran.stdout.split() == ["mine", "kept", "2"], ran.stderr
