"""`verify` and the wheel, on small stand-ins."""

import subprocess
import sys
import time
import zipfile

import nbformat
import pytest

from lablib.evidence import verify
from lablib.papers import paper
from lablib.paths import project_dir


def notebook(path, *sources):
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(book, path)
    return path


def test_run_reports_what_was_seen(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb",
        "import os, sys\nfrom lablib.data import load\nprint(os.environ['LABLIB_TIER'])",
        "text = load('bible')\nprint(1, file=sys.stderr)",
    )
    book, seen = verify.run(path, "smoke")
    assert book.cells[0].outputs[0].text == "smoke\n" and len(book.cells) == 2
    assert 0 < seen["peak_gb"] < 1 and seen["seconds"] < 60 and seen["verdicts"] == []
    assert len(seen["content"]["corpus bible"]) == 64
    verify.write_notebook(path, book)
    stored = nbformat.read(path, as_version=4)
    assert [output.name for c in stored.cells for output in c.outputs] == ["stdout"]


def test_a_failing_cell_is_named(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "x = 1", "raise ValueError('no such luck')")
    with pytest.raises(verify.LabFailed, match=r"a\.ipynb failed(.|\n)*no such luck"):
        verify.run(path, "smoke")


def test_every_claim_must_be_judged_once(tmp_path, monkeypatch):
    book = nbformat.v4.new_notebook()
    rows = [{"claim": claim.id} for claim in paper("markov-chains").claims]
    seen = {"seconds": 1.0, "peak_gb": 0.1, "device": None, "content": {}}
    monkeypatch.setattr(verify, "run", lambda path, tier: (book, seen | {"verdicts": rows[1:]}))
    with pytest.raises(verify.LabFailed, match=f"did not judge once each: {rows[0]['claim']}"):
        verify.verify(paper("markov-chains"), "smoke")


def test_a_budget_line_tells_when_it_is_over():
    assert verify.budget_line("x", "smoke", 10, 1.0).startswith("ok")
    assert verify.budget_line("x", "smoke", 21, 1.0).startswith("OVER")
    assert verify.budget_line("x", "smoke", 10, 1.3).startswith("OVER")


class Row:
    """One paper's state, as `verify --stale` asks for it."""

    def __init__(self, slug, present=True, result=None, stale=False):
        self.paper, self.present, self.result, self.stale = paper(slug), present, result, stale


def test_stale_labs_and_those_never_measured_are_run_two_at_a_time(monkeypatch, capsys):
    from lablib.cli import main

    rows = [
        Row("glam", result={}, stale=True),
        Row("olmoe"),
        Row("tomoe", result={}),
        Row("upcycling", present=False),
        Row("lorma", result={}, stale=True),
    ]
    monkeypatch.setattr("lablib.evidence.coverage.states", lambda: rows)
    running, most, seen = [], [], []

    def pretend(command):
        running.append(command)
        most.append(len(running))
        time.sleep(0.2)
        running.remove(command)
        seen.append(command[command.index("verify") + 1 :])
        return subprocess.CompletedProcess(command, int("olmoe" in command))

    monkeypatch.setattr(verify.subprocess, "run", pretend)
    assert main(["verify", "--stale", "--tier", "cpu"]) == 1
    assert sorted(seen) == [
        [slug, "--tier", "cpu", "--save"] for slug in ("glam", "lorma", "olmoe")
    ]
    assert max(most) == 2
    assert "3 labs were stale, 1 failed: olmoe" in capsys.readouterr().out


def test_the_wheel_carries_data_and_catalogue(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(tmp_path), "."]
    ran = subprocess.run(command, cwd=project_dir(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "lablib/papers/markov-chains.toml" in names
    assert "lablib/papers/_themes.toml" in names
    assert "lablib/_data/results/markov-chains.json" in names
    assert "lablib/_labs/02-theory/201-markov-chains.ipynb" in names
    assert any(name.startswith("lablib/_data/models/tiny-1m/") for name in names)
