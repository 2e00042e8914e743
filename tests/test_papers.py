import re
import subprocess
import sys

import pytest

from lablib.cli import main
from lablib.papers import Claim, UnknownPaper, nearest, paper, papers
from lablib.paths import PACKAGE, project_dir

SHARED = {"__init__", "bigram", "hub", "moe", "ngram", "parallel", "routing"}


def test_the_catalogue_is_whole():
    found = papers()
    assert len(found) == 120
    assert len({row.slug for row in found}) == len({row.lab for row in found}) == 120
    assert sorted(row.entry for row in found) == list(range(1, 121))
    assert {row.part for row in found} == set(range(1, 13))
    assert all(row.lab // 100 == row.part for row in found)
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", row.date) for row in found)


def test_every_path_follows_from_the_slug():
    root = project_dir()
    found = {key: path.relative_to(root).as_posix() for key, path in paper(302).paths.items()}
    assert found == {
        "catalogue": "lablib/papers.toml",
        "technique": "lablib/experts/switch_transformers.py",
        "lab": "labs/03-experts/302-switch-transformers.ipynb",
        "exercises": "lablib/exercises/switch_transformers.py",
        "tests": "tests/experts/test_switch_transformers.py",
        "result": "data/results/switch-transformers.json",
    }


@pytest.mark.parametrize("row", [row for row in papers() if row.present], ids=lambda row: row.slug)
def test_a_present_paper_has_all_six(row):
    assert [str(path) for path in row.paths.values() if not path.exists()] == []
    assert row.claims, "a lab measures at least one claim"


def test_no_file_belongs_to_no_paper():
    root = project_dir()
    expected = {path for row in papers() if row.present for path in row.paths.values()}
    themes = {row.theme for row in papers()}
    modules = [path for theme in themes for path in (PACKAGE / theme).glob("*.py")]
    strays = [path for path in modules if path not in expected and path.stem not in SHARED]
    strays += [path for path in (root / "labs").glob("*/*.ipynb") if path not in expected]
    strays += [path for path in (root / "data/results").glob("*.json") if path not in expected]
    others = {"__init__", "start_here"}
    exercises = (PACKAGE / "exercises").glob("*.py")
    strays += [path for path in exercises if path not in expected and path.stem not in others]
    assert strays == []


def test_unknown_papers_are_answered_with_the_nearest():
    assert nearest("swich-transformer")[0] == "switch-transformers"
    assert nearest("markov")[0] == "markov-chains"
    with pytest.raises(UnknownPaper, match="no paper is called 'lorra'; did you mean"):
        paper("lorra")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "guess"}, "none of number, formula, direction"),
        ({"kind": "number", "value": 1.0}, "a number needs tolerance"),
        ({"kind": "formula"}, "a formula needs tolerance"),
        ({"kind": "direction", "better": "smaller"}, "better = 'lower' or 'higher'"),
    ],
)
def test_a_malformed_claim_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Claim(id="x", text="t", paper="p", **row)


def test_commands_print_what_they_should(capsys):
    assert main(["papers", "--theme", "theory"]) == 0
    out = capsys.readouterr().out
    assert "201  markov-chains" in out and out.rstrip().endswith("6 papers")
    assert main(["where", "markov-chains"]) == 0
    assert "lablib/theory/markov_chains.py" in capsys.readouterr().out
    assert main(["where", "markof-chains"]) == 2
    assert "did you mean markov-chains" in capsys.readouterr().err
    assert main(["verify", "glam"]) == 2
    assert "glam has no lab yet" in capsys.readouterr().err


LIGHT = """
import sys, time
start = time.process_time()
import lablib
print(time.process_time() - start)
import lablib.data, lablib.lab, lablib.models, lablib.training
print("torch" in sys.modules)
"""


def test_importing_lablib_is_light():
    ran = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    seconds, torch = ran.stdout.split()
    assert float(seconds) < 0.3 and torch == "False"
