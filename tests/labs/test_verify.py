"""`verify`, `coverage` and the wheel, on small stand-ins."""

import subprocess
import sys
import zipfile
from dataclasses import replace

import nbformat
import pytest

from lablib.lab import coverage, verify
from lablib.papers import paper, papers
from lablib.paths import project_dir


def notebook(path, *sources):
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(book, path)
    return path


def test_run_reports_what_was_seen(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb",
        "import os, sys, lablib.data.text\nprint(os.environ['LABLIB_TIER'])",
        "print(1, file=sys.stderr)",
    )
    book, seen = verify.run(path, "smoke")
    assert book.cells[0].outputs[0].text == "smoke\n" and len(book.cells) == 2
    assert 0 < seen["peak_gb"] < 1 and seen["seconds"] < 60 and seen["verdicts"] == []
    assert "lablib.data.text" in seen["modules"]
    verify.write_notebook(path, book)
    stored = nbformat.read(path, as_version=4)
    assert [output.name for c in stored.cells for output in c.outputs] == ["stdout"]


def test_a_failing_cell_is_named(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "x = 1", "raise ValueError('no such luck')")
    with pytest.raises(verify.LabFailed, match=r"a\.ipynb failed(.|\n)*no such luck"):
        verify.run(path, "smoke")


def test_a_result_goes_stale_with_its_code_and_its_claims(monkeypatch, tmp_path):
    row = next(row for row in papers() if row.present and coverage.result_of(row))
    result = coverage.result_of(row)
    changed = replace(row, claims=(replace(row.claims[0], text="another"), *row.claims[1:]))
    assert verify.fingerprint(row, result["modules"]) != verify.fingerprint(
        changed, result["modules"]
    )
    assert coverage.is_stale(row, {**result, "hash": "0" * 16})
    fewer = result["modules"][:-1]
    assert verify.fingerprint(row, fewer) != verify.fingerprint(row, result["modules"])


def test_stored_results_are_current():
    stale = [row.slug for row in papers() if row.present and _stale(row)]
    assert stale == [], "run `python -m lablib verify SLUG --tier cpu --save`"


def _stale(row):
    result = coverage.result_of(row)
    return result is None or coverage.is_stale(row, result)


def test_coverage_renders_and_finds_a_stale_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# x\n{coverage.BEGIN}\nold\n{coverage.END}\ntail\n")
    assert "README.md's table is stale" in coverage.problems(readme)[0]
    assert coverage.update_readme(readme) and not coverage.update_readme(readme)
    text = readme.read_text()
    assert text.endswith("tail\n") and "old" not in text
    for row in papers():
        assert (row.title in text) == row.present
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks"):
        coverage.update_readme(readme)


def test_papers_without_a_lab_say_so():
    assert coverage.status(paper("glam")) == "planned"
    assert "reproduced" in coverage.status(paper("markov-chains"))


def test_a_budget_line_tells_when_it_is_over():
    assert verify.budget_line("x", "smoke", 10, 1.0).startswith("ok")
    assert verify.budget_line("x", "smoke", 16, 1.0).startswith("OVER")
    assert verify.budget_line("x", "smoke", 10, 1.3).startswith("OVER")


def test_the_wheel_carries_data_and_catalogue(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(tmp_path), "."]
    ran = subprocess.run(command, cwd=project_dir(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "lablib/papers.toml" in names
    assert "lablib/_data/results/markov-chains.json" in names
    assert any(name.startswith("lablib/_data/models/tiny-1m/") for name in names)
