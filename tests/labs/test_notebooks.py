"""What every stored lab must be: short, with its outputs, graded, comparable, honest."""

import ast
import json
import re
import statistics

import nbformat
import pytest

from lablib.evidence import tiers
from lablib.evidence.coverage import State
from lablib.papers import papers
from lablib.paths import notebooks

LABS = notebooks()
PAPER_LABS = [row for row in papers() if row.present]


@pytest.fixture(params=LABS, ids=lambda path: path.stem)
def book(request):
    return nbformat.read(request.param, as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_it_is_short(book):
    lines = [len(cell.source.splitlines()) for cell in code(book)]
    words = sum(len(c.source.split()) for c in book.cells if c.cell_type == "markdown")
    assert sum(lines) <= 300 and max(lines) <= 40 and statistics.median(lines) <= 8
    assert words <= 2200


def test_it_stores_outputs_without_errors_or_widget_state(book):
    assert "widgets" not in book.metadata
    assert len(json.dumps(book)) < 300_000
    outputs = [output for cell in code(book) for output in cell.outputs]
    assert len(outputs) > 5, "outputs of the cpu tier are stored"
    assert not [output for output in outputs if output.output_type == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in kinds
    assert not any("widget-view" in kind or kind.startswith("image/") for kind in kinds)


def test_what_an_explorer_reads_stays_as_it_was(book):
    """A reader moves it after all cells have run; a name that was given away since breaks it."""
    trees = [ast.parse(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", cell.source)) for cell in code(book)]
    functions = {node.name: node for tree in trees for node in tree.body if _is_function(node)}
    for place, tree in enumerate(trees):
        later = set().union(*map(_assigned, trees[place + 1 :]))
        for node in ast.walk(tree):
            if getattr(getattr(node, "func", None), "id", "") == "explore":
                read = _read_by(getattr(node.args[0], "id", ""), functions)
                assert not read & later, f"{ast.unparse(node)} reads what is changed below it"


def _is_function(node):
    return isinstance(node, ast.FunctionDef)


def _read_by(name, functions):
    """Names that a function of the notebook reads from it, its own and those of what it calls."""
    read, open_names = set(), {name}
    while open_names:
        name = open_names.pop()
        read.add(name)
        if name in functions:
            names = [node for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
            own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            own |= {node.arg for node in ast.walk(functions[name]) if isinstance(node, ast.arg)}
            open_names |= {node.id for node in names} - own - read
    return read


def _assigned(tree):
    """Names that a cell gives a value, those inside of functions and comprehensions aside."""
    if isinstance(tree, (ast.FunctionDef, ast.ClassDef)):
        return {tree.name}
    inside = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    if isinstance(tree, inside):
        return set()
    own = {tree.id} if isinstance(tree, ast.Name) and isinstance(tree.ctx, ast.Store) else set()
    return own.union(*map(_assigned, ast.iter_child_nodes(tree)))


def test_figures_have_a_text_alternative(book):
    for cell in code(book):
        for output in cell.outputs:
            if output.get("data", {}).get("application/vnd.plotly.v1+json"):
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
    assert all(cell.source.startswith("lab.check(") for cell in checks)
    ids = [cell.metadata.nbgrader.grade_id for cell in graded]
    assert len(set(ids)) == len(ids)


NOT_PROSE = r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|<[^>]+>"
DECIMAL = r"(?<![\w.])\d+\.\d+(?!\.\d)"
RESULT = (
    r"\b(?:beats?|wins?|loses?|faster|slower|better|worse|lower|higher|cheaper|fewer|gains?)\b"
    r"(?:[^\w.?!]+\w+){0,4}?[^\w.?!]+\d|\d\S*(?:[^\w.?!]+\w+){0,2}?[^\w.?!]+"
    r"(?:faster|slower|better|worse|lower|higher|cheaper|fewer)\b"
)


def measured_numbers(text):
    """What looks like a measured result in prose."""
    prose = re.sub(NOT_PROSE, " ", text, flags=re.DOTALL)
    return re.findall(DECIMAL, prose) + [match.group() for match in re.finditer(RESULT, prose)]


@pytest.mark.parametrize(
    ("text", "flagged"),
    [
        ("The router reaches 2.31 nats.", True),
        ("Eight experts are 3 times faster.", True),
        ("It beats the dense model by 7 %.", True),
        ("A temperature of $0.5$, `lr=1e-2`, [a link](https://arxiv.org/abs/2101.03961).", False),
        ("The vocabulary has 1,024 pieces, the model 2 layers.", False),
        ("Is it better? See section 2 of the paper.", False),
    ],
)
def test_measured_numbers_are_told_from_others(text, flagged):
    assert bool(measured_numbers(text)) == flagged


def test_no_measured_number_stands_in_markdown(book):
    cells = [c for c in book.cells if c.cell_type == "markdown"]
    cells = [c for c in cells if "paper" not in c.metadata.get("tags", [])]
    found = {n: c.source[:80] for c in cells for n in measured_numbers(c.source)}
    assert found == {}, "compute it (lab.say), or tag the cell `paper` if it is the paper's own"


def test_an_explorer_ends_its_cell(book):
    """JupyterLab shows what a cell's last line gives; any other explorer is never seen."""
    for cell in code(book):
        lines = [line for line in cell.source.splitlines() if not line.startswith(("%", "!"))]
        if any(line.startswith("explore(") for line in lines):
            last = ast.parse("\n".join(lines)).body[-1]
            assert isinstance(last, ast.Expr) and ast.unparse(last).startswith("explore("), cell.id


@pytest.mark.parametrize("row", PAPER_LABS, ids=lambda row: row.slug)
def test_a_result_is_within_its_budget(row):
    result = State(row).result
    seconds, memory = tiers.BUDGETS["cpu"]
    assert result["tier"] == "cpu"
    assert result["seconds"] <= seconds and result["peak_gb"] <= memory
