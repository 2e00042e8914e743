"""What every stored lab must be: short, with its outputs, graded, comparable."""

import json
import statistics

import nbformat
import pytest

from lablib.lab import tiers
from lablib.lab.coverage import result_of
from lablib.papers import paper, papers
from lablib.paths import project_dir

LABS = sorted((project_dir() / "labs").rglob("*.ipynb"))
PAPER_LABS = [row for row in papers() if row.present]


@pytest.fixture(params=LABS, ids=lambda path: path.stem)
def book(request):
    return nbformat.read(request.param, as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_it_is_short(book):
    lines = [len(cell.source.splitlines()) for cell in code(book)]
    words = sum(len(c.source.split()) for c in book.cells if c.cell_type == "markdown")
    assert sum(lines) <= 350 and max(lines) <= 40 and statistics.median(lines) <= 12
    assert words <= 2300


def test_it_stores_outputs_without_errors_or_widget_state(book):
    assert "widgets" not in book.metadata
    assert len(json.dumps(book)) < 300_000
    outputs = [output for cell in code(book) for output in cell.outputs]
    assert len(outputs) > 5, "outputs of the cpu tier are stored"
    assert not [output for output in outputs if output.output_type == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds
    assert not any("widget-view" in kind or kind.startswith("image/") for kind in kinds)


def test_figures_have_axes_and_a_text_alternative(book):
    for cell in code(book):
        for output in cell.outputs:
            plot = output.get("data", {}).get("application/vnd.plotly.v1+json")
            if plot:
                assert output["data"]["text/plain"].strip()


def test_nbval_compares_three_cells_at_least(book):
    marked = [c for c in code(book) if "nbval-check-output" in c.metadata.get("tags", [])]
    assert len(marked) >= 3 and all(cell.outputs for cell in marked)


def test_each_exercise_is_a_stub_and_a_check_below_it(book):
    graded = [c for c in code(book) if c.metadata.get("nbgrader")]
    stubs = [c for c in graded if c.metadata.nbgrader.solution]
    checks = [c for c in graded if c.metadata.nbgrader.grade]
    assert 2 <= len(stubs) == len(checks) <= 4
    # nbgrader keeps the lines around these marks and clears what is between them.
    body = "### BEGIN SOLUTION\n    raise NotImplementedError\n    ### END SOLUTION"
    assert all(body in cell.source for cell in stubs)
    assert all("check(" in cell.source and cell.metadata.nbgrader.locked for cell in checks)
    ids = [cell.metadata.nbgrader.grade_id for cell in graded]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("row", PAPER_LABS, ids=lambda row: row.slug)
def test_a_result_is_whole_and_within_its_budget(row):
    result = result_of(row)
    seconds, memory = tiers.BUDGETS["cpu"]
    assert result["tier"] == "cpu"
    assert {claim["claim"] for claim in result["claims"]} == {claim.id for claim in row.claims}
    assert result["seconds"] <= seconds and result["peak_gb"] <= memory
    for claim in result["claims"]:
        if claim["kind"] == "direction":
            values = claim["values"]
            runs = values if isinstance(values[0], list) else [values]
            assert all(len(run) >= 3 for run in runs), "three seeds at least"


@pytest.mark.parametrize("row", PAPER_LABS, ids=lambda row: row.slug)
def test_a_stored_verdict_follows_from_its_stored_values(row):
    from lablib.lab.claims import judge

    for stored in result_of(row)["claims"]:
        if stored["values"] is not None:
            again = judge(paper(row.slug).claim(stored["claim"]), stored["values"], stored["tier"])
            assert (again.verdict, again.summary) == (stored["verdict"], stored["summary"])
