"""Every lab as a reader runs it on Colab: its setup cell, once more, and the rest."""

import copy
import datetime
import json

import nbformat
import pytest

from lablib.paths import notebooks, project_dir

pytestmark = pytest.mark.colab

LABS = notebooks()
# In a namespace of its own: the lab's functions look up theirs.
PROBE = f"import runpy; runpy.run_path({str(project_dir() / 'tests/colab/probe.py')!r})"
VIEW = "application/vnd.jupyter.widget-view+json"


def seconds(cell):
    """From the kernel's first to its last word on a cell."""
    times = cell.metadata.execution
    start, end = (times[f"iopub.status.{state}"] for state in ("busy", "idle"))
    return (when(end) - when(start)).total_seconds()


def when(text):
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_a_lab_runs(path, colab, crowd, tmp_path, record_property):
    colab.forget()
    book = nbformat.read(path, as_version=4)
    setup = book.cells[1]
    again = copy.deepcopy(setup)
    book.cells.insert(2, again)
    book.cells.append(nbformat.v4.new_code_cell(PROBE))
    for number, cell in enumerate(book.cells):
        cell.id, cell.outputs = f"cell-{number}", []
    client = colab.execute(book, COLAB_PROBE=str(tmp_path / "probe.json"))
    first, second = seconds(setup), seconds(again)
    whole = sum(seconds(cell) for cell in book.cells if cell.cell_type == "code")
    figures = f"set up {first:5.1f} s, again {second:4.2f} s, whole lab {whole:5.1f} s"
    record_property(path.stem, figures)
    assert colab.replaced() == {}
    assert first < 60 * crowd and second < 1 * crowd
    assert again.outputs == []
    assert_drawn_in_outputs(book, client, json.loads((tmp_path / "probe.json").read_text()))


def assert_drawn_in_outputs(book, client, moved):
    """Each explorer's Output holds what its controls ask for; beside it lies what it began with."""
    begun = {
        output["data"][VIEW]["model_id"]: output["data"].get("text/html")
        for cell in book.cells
        for output in cell.get("outputs", ())
        if VIEW in output.get("data", {})
    }
    assert bool(moved) == any("explore(" in cell.source for cell in book.cells)
    for row in moved:
        (now,) = client.widget_state[row["output"]]["outputs"]
        assert now["data"]["text/html"] == row["after"] != row["before"]
        assert begun[row["output"]] == row["before"]
