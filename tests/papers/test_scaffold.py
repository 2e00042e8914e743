"""What follows from a slug is written by `new`, and stays as it was derived."""

import shutil

import nbformat
import pytest

from lablib.papers import paper, papers, scaffold
from lablib.paths import notebooks, project_dir

LABS = notebooks()
PRESENT = [row for row in papers() if row.present]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A project that has only what a new paper's places are written into."""
    shutil.copy(project_dir() / "pyproject.toml", tmp_path)
    (tmp_path / "labs").mkdir()
    for place in ("lablib.papers.project_dir", "lablib.papers.scaffold.project_dir"):
        monkeypatch.setattr(place, lambda: tmp_path)
    monkeypatch.setattr("lablib.papers.labs_dir", lambda: tmp_path / "labs")
    monkeypatch.setattr("lablib.papers.PACKAGE", tmp_path / "lablib")
    return tmp_path


def test_new_writes_what_is_missing_and_nothing_twice(elsewhere):
    row = next(row for row in papers() if not row.present)
    written = scaffold.write_missing(row)
    assert [path.relative_to(elsewhere).parts[0] for path in written].count("lablib") == 3
    assert scaffold.write_missing(row) == []
    book = nbformat.read(row.paths["lab"], as_version=4)
    nbformat.validate(book)
    assert book.cells[0].source.startswith(f"# {row.lab} · {row.title}\n\n[![Open in Colab]")
    assert f'Lab("{row.slug}")' in book.cells[2].source


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_badges_and_install_cell_are_as_derived(path):
    book = nbformat.read(path, as_version=4)
    place = path.relative_to(project_dir()).as_posix()
    assert scaffold.badges(place) in book.cells[0].source
    assert book.cells[1].source == scaffold.install_cell(path.name.partition("-")[0])
    assert book.cells[1].metadata["jupyter"]["source_hidden"]


@pytest.mark.parametrize("row", PRESENT, ids=lambda row: row.slug)
def test_exercise_cells_are_as_derived(row):
    cells = nbformat.read(row.paths["lab"], as_version=4).cells
    graded = {c.metadata.nbgrader.grade_id: c for c in cells if c.metadata.get("nbgrader")}
    names = scaffold.exercise_names(row)
    assert 2 <= len(names) <= 4 and len(graded) == 2 * len(names)
    for name in names:
        for checks in (False, True):
            derived = scaffold.grading(name, checks)
            assert graded[derived["grade_id"]].metadata.nbgrader == derived
        assert graded[f"check-{name.replace('_', '-')}"].source == f"lab.check({name})"


def test_the_catalogue_knows_every_lab():
    known = {row.paths["lab"] for row in papers()} | {project_dir() / "labs/00-start-here.ipynb"}
    assert set(LABS) <= known
    assert paper(302).lab_name == "302-switch-transformers.ipynb"
