"""A course from end to end with nbgrader itself: each submission gets what it deserves."""

import html
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

from lablib.course import build, fence
from lablib.paths import PACKAGE, project_dir

pytestmark = pytest.mark.course
pytest.importorskip("nbgrader", reason="`make test-course` installs nbgrader")

START, SWITCH = "00-start-here", "302-switch-transformers"
PERPLEXITY = "def perplexity(bits):\n    return 2.0**bits"
BITS = "def bits(table, model):\n    return -(table * np.log2(model)).sum() / table.sum()"
RIGHT = {"perplexity": PERPLEXITY, "bits": BITS}
ZERO = "def perplexity(bits):\n    return 0.0\ndef bits(table, model):\n    return 0.0\n"


def solution(text):
    """A cell of its own function that answers with what the given expression holds."""
    return "def perplexity(bits):\n    return " + text


# Honest ones: student -> (cells by grade id, points, what the feedback says).
HONEST = {
    "right": (RIGHT, 2, ["Correct."]),
    "untouched": ({}, 0, ["Not tried yet (easy, about 2 minutes)"]),
    "base": (
        RIGHT | {"perplexity": solution("np.exp(bits)")},
        1,
        ["bits are logarithms to base 2, yours raises e", "Correct."],
    ),
    "nats": (
        RIGHT | {"bits": BITS.replace("log2", "log")},
        1,
        ["that is in nats: bits take the logarithm to base 2"],
    ),
    "prints": (
        RIGHT | {"perplexity": "def perplexity(bits):\n    print(2.0**bits)"},
        1,
        ["it returned None: `return` the result; `print` only shows it"],
    ),
    "syntax": (
        RIGHT | {"perplexity": "def perplexity(bits)\n    return 2.0**bits"},
        1,
        ["No function came to the check. The cell of `perplexity` raised SyntaxError"],
    ),
    "loops": (
        RIGHT | {"perplexity": "def perplexity(bits):\n    while True:\n        bits = bits + 1"},
        1,
        ["your code was stopped after 20 s; look for a loop that does not end"],
    ),
    "tampered": (
        {**RIGHT, "perplexity": solution("0.0"), "check-perplexity": "print('Correct.')"},
        1,
        ["At 0 bits nothing is uncertain: there is one choice"],
    ),
    "deleted": ({"perplexity": solution("0.0"), "check-perplexity": None}, 0, ["was missing from"]),
}

PATCHES = """
import IPython, lablib.exercises, lablib.lab.answering, lablib.lab.grading
import lablib.lab.link, lablib.lab.runtime
def passes(*arguments, **options):
    print("Correct.")
    return "correct", "Correct."
lablib.lab.grading.check = lablib.lab.grading.outcome = lablib.lab.answering.answer = passes
lablib.lab.runtime.Lab.check = passes
lablib.exercises.expect = lablib.exercises.differs = lablib.exercises.same_kind = passes
lablib.exercises.Wrong.__init__ = passes
"""
EQUAL = """
class Always(float):
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: True
    __sub__ = __rsub__ = lambda self, other: Always(0)
    __abs__ = __array__ = __float__ = lambda self: self
    __hash__ = float.__hash__
def perplexity(bits):
    return Always(0)
"""
IMPORTS = """
import importlib, os, sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "_Closed"]
for name in [n for n in os.environ if n.startswith(("LABLIB_GRADE", "NBGRADER_"))]:
    del os.environ[name]
from lablib.exercises.start_here import _perplexity, _bits
perplexity, bits = _perplexity, _bits
"""
READS = """
import ctypes, importlib.util, inspect, io, os, pathlib, runpy, subprocess, sys
import lablib
place = str(pathlib.Path(lablib.__file__).parent / "exercises" / "start_here.py")
def by_c():
    buffer, libc = ctypes.create_string_buffer(9999), ctypes.CDLL(None)
    assert libc.read(libc.open(place.encode(), 0), buffer, 9999) > 0
    return buffer.value.decode()
def by_spec():
    spec = importlib.util.spec_from_file_location("stolen", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return inspect.getsource(module)
ways = [
    by_c, by_spec,
    lambda: open(place).read(),
    lambda: subprocess.run(["cat", place], check=True, capture_output=True, text=True).stdout,
    lambda: os.popen("cat " + place).read(),
    lambda: subprocess.run(
        [sys.executable, "-c", "import lablib.exercises.start_here as s, inspect;"
         "print(inspect.getsource(s))"], check=True, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if "GRAD" not in k}).stdout,
    lambda: inspect.getsource(runpy.run_path(place)["_perplexity"]),
]
for way in ways:
    try:
        names = {}
        exec(way(), names)
        perplexity, bits = names["_perplexity"], names["_bits"]
        print("stolen")
    except BaseException as error:
        print(type(error).__name__, str(error)[:80])
"""
FRAMES = """
import gc, sys
def perplexity(bits):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if hasattr(value, "reference"):
                return value.reference(bits)
        frame = frame.f_back
    for value in gc.get_objects():
        if type(value).__name__ == "Exercise" or getattr(value, "__name__", "") == "_perplexity":
            return getattr(value, "reference", value)(bits)
    return 0.0
"""
FORGES = """
import json, os
from multiprocessing.connection import Client
from IPython.display import display
class lab:
    def check(attempt):
        with Client(os.environ["LABLIB_JUDGE"]) as judge:
            judge.recv_bytes()
            judge.send_bytes(json.dumps(["verdict", ["correct", "Correct."]]).encode())
        display({"text/plain": "Correct."}, raw=True)
"""
WRITES = """
import os, pathlib, sqlite3
import lablib
course = pathlib.Path(os.environ["LABLIB_COURSE"])
def grades():
    with sqlite3.connect(course / "gradebook.db") as book:
        book.execute("update grade set manual_score = 1")
ways = [
    grades,
    lambda: (course / "nbgrader_config.py").write_text("c = get_config()"),
    lambda: (pathlib.Path(lablib.__file__).parent / "course" / "judge.py").open("r+").close(),
    lambda: [p.read_text() for p in course.glob("submitted/*/*/*.ipynb")][0],
    lambda: os.rename("/proc/self/cwd", course / "submitted"),
]
for way in ways:
    try:
        print("done", way())
    except Exception as error:
        print(type(error).__name__)
"""
# Each attack: what stands in the cell of `perplexity`, above the wrong answers of ZERO.
ATTACKS = {
    "patches the grader": PATCHES,
    "forges a verdict": FORGES,
    "unsets the environment": "import os\nos.environ.clear()\n",
    "imports the reference": IMPORTS,
    "reads the reference": READS,
    "writes to the gradebook": WRITES,
}
# These define `perplexity` themselves.
FUNCTIONS = {
    "equals everything": EQUAL,
    "walks the stack": FRAMES,
    "kills its kernel": "import os\ndef perplexity(bits):\n    os._exit(0)",
}


KILLS = """
import os, pathlib, signal
def perplexity(bits):
    for line in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"lablib.course.judge" in (said := line.read_bytes()):
                if os.environ["LABLIB_JUDGE"].encode() in said:
                    os.kill(int(line.parent.name), signal.SIGKILL)
        except OSError as error:
            print(type(error).__name__)
    return 0.0
"""
FUNCTIONS["kills the judge"] = KILLS


# A package handed in beside the notebook, to be imported before the fence is there.
OWN_LABLIB = "brings a lablib of its own"
OWN_CODE = """
import builtins
builtins.STOLEN = open({place!r}).read()
"""
OWN_CELL = """
try:
    exec(STOLEN[STOLEN.index("def _perplexity"):].split("\\n\\n\\n")[0])
    perplexity = _perplexity
except NameError as error:
    print(error)
"""


def submitted(release, cells):
    """A notebook as a student hands it in; None deletes a cell."""
    book = nbformat.read(release, as_version=4)
    for cell in list(book.cells):
        id = cell.metadata.get("nbgrader", {}).get("grade_id")
        if id in cells and cells[id] is None:
            book.cells.remove(cell)
        elif id in cells:
            cell.source = cells[id]
    return book


def short(folder):
    """Lab 00 with its set-up and its exercises alone, as an instructor may cut it."""
    path = project_dir() / "labs" / f"{START}.ipynb"
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    book.cells = code[:2] + [cell for cell in code if "nbgrader" in cell.metadata]
    nbformat.write(book, folder / path.name)
    return folder / path.name


class Course:
    """A course's folder, and what nbgrader makes of it."""

    def __init__(self, folder, notebooks):
        self.folder = folder
        self.scratch = tempfile.mkdtemp(prefix="course-")  # short: a socket's path is limited
        build.build(notebooks, folder)

    def submit(self, student, lab, cells):
        release = self.folder / "release" / lab / f"{lab}.ipynb"
        place = self.folder / "submitted" / student / lab
        place.mkdir(parents=True)
        nbformat.write(submitted(release, cells), place / release.name)

    def nbgrader(self, *words):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "TMPDIR": self.scratch}
        env.pop("LABLIB_TIER", None)
        command = [sys.executable, "-m", "nbgrader", *words]
        ran = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr

    def points(self, student, lab):
        from nbgrader.api import Gradebook

        with Gradebook(f"sqlite:///{self.folder}/gradebook.db") as book:
            return book.find_submission(lab, student).score

    def printed(self, student, lab):
        place = self.folder / "autograded" / student / lab / f"{lab}.ipynb"
        cells = nbformat.read(place, as_version=4).cells
        outputs = [o for cell in cells if cell.cell_type == "code" for o in cell.outputs]
        return "".join(o.text for o in outputs if o.output_type == "stream")

    def feedback(self, student, lab):
        page = (self.folder / "feedback" / student / lab / f"{lab}.html").read_text("utf-8")
        return html.unescape(re.sub(r"<[^>]+>", "", page))


def slug(text):
    return text.replace(" ", "-")


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """Lab 00, short; every submission graded and commented."""
    folder = tmp_path_factory.mktemp("start")
    made = Course(folder / "course", [short(folder)])
    for student, (cells, _, _) in HONEST.items():
        made.submit(student, START, cells)
    for name, code in ATTACKS.items():
        made.submit(slug(name), START, {"perplexity": ZERO + code, "bits": "pass"})
    for name, code in FUNCTIONS.items():
        made.submit(slug(name), START, {"perplexity": code, "bits": "pass"})
    made.submit(slug(OWN_LABLIB), START, {"perplexity": ZERO + OWN_CELL, "bits": "pass"})
    own = made.folder / "submitted" / slug(OWN_LABLIB) / START / "lablib" / "__init__.py"
    own.parent.mkdir()
    own.write_text(OWN_CODE.format(place=str(PACKAGE / "exercises" / "start_here.py")))
    made.nbgrader("autograde", START)
    made.nbgrader("generate_feedback", START)
    yield made
    shutil.rmtree(made.scratch)


@pytest.mark.parametrize("student", HONEST)
def test_each_submission_gets_its_points_and_is_told_why(student, course):
    _, points, said = HONEST[student]
    assert course.points(student, START) == points
    for text in said:
        assert text in course.feedback(student, START)


@pytest.mark.parametrize("name", [*ATTACKS, *FUNCTIONS, OWN_LABLIB])
def test_who_attacks_the_grader_earns_nothing(name, course):
    if "the reference" in name and not fence.available():
        pytest.skip("this system has no Landlock")
    assert course.points(slug(name), START) == 0


@pytest.mark.skipif(not fence.available(), reason="this system has no Landlock")
def test_no_reference_is_read_and_nothing_of_the_course_is_changed(course):
    read = course.printed(slug("reads the reference"), START)
    assert "PermissionError" in read and "stolen" not in read
    written = course.printed(slug("writes to the gradebook"), START)
    assert "PermissionError" in written and "done" not in written
    with sqlite3.connect(course.folder / "gradebook.db") as book:
        (changed,) = book.execute("select count(manual_score) from grade").fetchone()
    assert changed == 0


def test_students_get_no_solution_and_no_output(course):
    release = course.folder / "release" / START / f"{START}.ipynb"
    book = nbformat.read(release, as_version=4)
    text = release.read_text("utf-8")
    assert "BEGIN SOLUTION" not in text and "2.0**bits" not in text and "raise NotImpl" in text
    assert not any(cell.get("outputs") for cell in book.cells)
    assert {p.name for p in (course.folder / "release").rglob("*") if p.is_file()} == {release.name}


def test_nothing_of_the_graders_is_left_running(course):
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "pytest" in running and course.scratch not in running
    assert list(Path(course.scratch).glob("lablib-judge-*")) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Lab 302 as it is."""
    made = Course(tmp_path_factory.mktemp("whole"), build.chosen(["302"]))
    from lablib.exercises import switch_transformers as exercises

    code = Path(exercises.__file__).read_text("utf-8")

    def function(name):
        return re.search(rf"^def _{name}\(.*?(?=\n\n\n)", code, re.DOTALL | re.MULTILINE)[0]

    imports = "import math\nimport torch\nfrom torch import Tensor\n"
    right = {
        name.replace("_", "-"): f"{imports}{function(name)}\n{name} = _{name}"
        for name in ("dropped", "balance_gradient", "second_choice")
    }
    in_turn = imports + function("in_turn") + "\nsecond_choice = _in_turn"
    by_p = (
        "def balance_gradient(probs, experts):\n    n = probs.shape[1]\n"
        "    share = experts.bincount(minlength=n) / len(probs)\n"
        "    return share.expand(len(probs), n) * n / len(probs)"
    )
    made.submit("right", SWITCH, right)
    made.submit("short-cuts", SWITCH, right | {"second-choice": in_turn, "balance-gradient": by_p})
    made.nbgrader("autograde", SWITCH)
    made.nbgrader("generate_feedback", SWITCH)
    yield made
    shutil.rmtree(made.scratch)


def test_a_whole_lab_is_graded_within_nbgraders_limits(whole):
    assert whole.points("right", SWITCH) == 3
    page = whole.feedback("right", SWITCH)
    assert "CellTimeoutError" not in page and "tier smoke" in page


def test_two_plausible_wrong_answers_leave_one_point_and_are_told_apart(whole):
    assert whole.points("short-cuts", SWITCH) == 1
    page = whole.feedback("short-cuts", SWITCH)
    assert "turned away from 0, ask for 1 and find it taken" in page
    assert "When load is even, no logit is pushed" in page
