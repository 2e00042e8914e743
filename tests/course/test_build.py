"""A course's sources, without nbgrader: what is chosen, what students could see, what counts."""

import importlib
import inspect
import re

import nbformat
import pytest

from lablib.course import build
from lablib.evidence.coverage import points
from lablib.papers import papers
from lablib.paths import notebooks, project_dir

ROOT = project_dir()
LABS = notebooks()


def test_labs_and_themes_are_chosen_once_and_in_order():
    names = [path.stem for path in build.chosen(["switch-transformers", "00"], ["experts"])]
    assert names[0] == "00-start-here" and names == sorted(set(names))
    assert "302-switch-transformers" in names and len(names) == 1 + sum(
        row.theme == "experts" and row.present for row in papers()
    )
    assert [path.stem for path in build.chosen(["302"])] == ["302-switch-transformers"]


def test_what_is_not_there_is_said():
    with pytest.raises(ValueError, match="--labs 302 701, or --themes experts"):
        build.chosen()
    planned = next(row for row in papers() if not row.present)
    with pytest.raises(FileNotFoundError, match=f"{planned.slug} has no lab yet"):
        build.chosen([planned.slug])


def test_without_nbgrader_the_way_to_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"make course.*pip install .* -e '\.\[grading\]'"):
        build.build([LABS[0]], tmp_path)
    assert list(tmp_path.iterdir()) == []


def body(function):
    """A function's statements, each a line without blanks."""
    lines = re.sub(r'""".*?"""', "", inspect.getsource(function), flags=re.DOTALL).splitlines()[1:]
    lines = ["".join(line.split("#")[0].split()) for line in lines]
    return [line for line in lines if line]


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_sources_have_no_outputs_and_no_solution(path, tmp_path):
    build.write_sources([path], tmp_path)
    book = nbformat.read(tmp_path / "source" / path.stem / path.name, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if cell.outputs or cell.execution_count] == []
    shown = "".join("".join(cell.source.split()) for cell in book.cells)
    from lablib.exercises import named

    name = path.stem.partition("-")[2].replace("-", "_")
    for exercise in named(importlib.import_module(f"lablib.exercises.{name}")).values():
        assert not all(line in shown for line in body(exercise.reference))


def test_points_are_one_a_check():
    assert points(ROOT / "labs" / "00-start-here.ipynb") == 2
    assert points(ROOT / "labs" / "03-experts" / "302-switch-transformers.ipynb") == 3


def test_the_configuration_is_python_and_names_the_judge(tmp_path):
    build.write_sources([LABS[0]], tmp_path / "my course")
    text = (tmp_path / "my course" / "nbgrader_config.py").read_text("utf-8")
    compile(text, "nbgrader_config.py", "exec")
    assert "lablib.course.execute.JudgedExecute" in text and '"my course"' in text
