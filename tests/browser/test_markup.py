"""Text stays text: markup that a reader or an author writes into any field of a lab never runs."""

import ast
import os

import nbformat
import pytest
from driving import ERRORS, make_guess, menu, open_lab, run_all, shoot_all

from lablib.paths import notebooks, project_dir

pytestmark = pytest.mark.browser

ROOT = project_dir()
EVIL = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>'
    '<a href="javascript:window.hacked=3">go</a><svg onload="window.hacked=4"></svg>'
)
CELLS = [
    f"""
evil = {EVIL!r}
from lablib.lab import Lab, explore, figures, predict, source
lab = Lab("switch-transformers")
""",
    "lab.say('say ' + evil)",
    "for _ in lab.progress(range(2), 'progress ' + evil): pass",
    "lab.claim('parameters', 1.0, note='note ' + evil)",
    """
def dropped(*given):
    raise ValueError('check ' + evil)
lab.check(dropped)
""",
    """
guess = predict("question " + evil, options=["option " + evil, "b"])
number = predict("b", low=0, high=1, unit="unit " + evil)
""",
    """
guess.reveal("actual " + evil, meaning="meaning " + evil, figure=figures.figure("reveal " + evil))
number.reveal(0.5, meaning=evil)
""",
    """
fig = figures.figure("title " + evil, x="x " + evil, y="y " + evil)
figures.line(fig, [1, 2], [1.0, 2.0], "line " + evil)
fig.add_scatter(x=[1], y=[2], text=["hover " + evil], name=evil, mode="markers+text")
fig.add_annotation(x=1, y=1, text="annotation " + evil, hovertext=evil)
figures.show(fig, alt="alt " + evil)
""",
    """
rows = {"row " + evil: [0.1, 0.2, 0.3]}
figures.show(figures.differences(rows, baseline="base " + evil, unit=evil))
bar = figures.bars(figures.figure("bars"), ["bar " + evil], [[1.0, 2.0]])
figures.show(bar.update_traces(hovertemplate="over " + evil))
""",
    """
from IPython.display import HTML, display
display(HTML(figures.painted(["painted " + evil], ['"><script>window.hacked=5</script>'], [evil])))
display(HTML(figures.key(["key " + evil], ["#ffffff"])))
""",
    """
def told(text, kind, part):
    if part:
        return [text, kind]
    raise ValueError("raised " + text + kind)
explore(told, labels={"text": "label " + evil, "kind": evil}, text=evil, kind=["menu " + evil, "b"],
        part=True)
""",
    """
def plotted(text):
    return figures.figure("plotted " + text, x=text)
explore(plotted, text=evil)
""",
    """
import types, lablib.lab.paint
source(lablib.lab.paint)
""",
]
SEEN = ("say", "note", "check", "question", "option", "alt", "painted", "key", "label")


def harm(page):
    """What ran, and what could: elements that the markup would have made."""
    return page.evaluate(
        """() => [window.hacked ?? null, document.querySelectorAll(
            'img[src="x"], [onerror], svg[onload], [href^="javascript" i]').length,
            [...document.querySelectorAll('*')].filter(node =>
                /^javascript/i.test(node.getAttribute('xlink:href') || '')).length]"""
    )


SAFE = [None, 0, 0]


def touch(page):
    """Point at what shows words under the pointer, and follow what looks like a link in a plot."""
    for plot in page.locator(".js-plotly-plot .nsewdrag").all():
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        for across in (0.02, 0.5, 0.98):
            page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] / 2)
            page.wait_for_timeout(150)
    page.evaluate(
        """() => document.querySelectorAll('.js-plotly-plot a').forEach(link =>
            link.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true})))"""
    )


def test_no_field_of_a_lab_runs_markup_live_saved_or_from_elsewhere(jupyter, notebook, page):
    open_lab(page, jupyter, notebook)
    run_all(page)
    assert page.evaluate("() => !!document.querySelector('.jp-OutputArea-error')") is False
    words = "\n".join(page.locator(".jp-OutputArea, .lablib-predict").all_inner_texts())
    assert [name for name in SEEN if f"{name} <img src=x onerror" not in words] == []
    for guess in page.locator(".lablib-predict").all():
        make_guess(page, guess)
    page.get_by_text("You guessed option <img").wait_for(timeout=15_000)
    page.locator(".lablib-explore input[type=checkbox]").uncheck()
    page.get_by_text("ValueError: raised <img").wait_for(timeout=15_000)
    for field in page.locator(".lablib-explore input[type=text]").all():
        field.fill(f"typed {EVIL}")
        field.press("Enter")
    page.get_by_text("ValueError: raised typed <img").wait_for(timeout=15_000)
    touch(page)
    shoot_all(page, "markup")
    assert harm(page) == SAFE
    menu(page, "File", "docmanager:save")
    page.wait_for_selector(".lm-TabBar-tab.jp-mod-current:not(.jp-mod-dirty)", timeout=30_000)
    open_lab(page, jupyter, notebook)
    page.wait_for_timeout(2000)
    touch(page)
    assert harm(page) == SAFE
    book = nbformat.read(jupyter.root / notebook, as_version=4)
    book.cells[0].outputs.append(nbformat.v4.new_output("stream", text="from elsewhere"))
    nbformat.write(book, jupyter.root / "markup-elsewhere.ipynb")
    open_lab(page, jupyter, "markup-elsewhere.ipynb")
    page.wait_for_timeout(2000)
    assert harm(page) == SAFE


def test_markup_runs_where_nothing_escapes_it(jupyter, page):
    """Else the tests above would pass whatever lablib did."""
    cell = f"from IPython.display import HTML, display\ndisplay(HTML({EVIL!r}))"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(book, jupyter.root / "control.ipynb")
    open_lab(page, jupyter, "control.ipynb")
    run_all(page)
    page.wait_for_function("() => window.hacked", timeout=15_000)
    assert harm(page)[1] > 0


def typed_into():
    """The labs with a text box in an explorer; a third of them unless ALL=1."""
    labs = [path for path in notebooks() if _has_text_box(path)]
    return labs if os.environ.get("ALL") == "1" else labs[::3]


def _has_text_box(path):
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(c.source for c in cells if c.cell_type == "code" and "explore(" in c.source)
    lines = [line for line in code.splitlines() if not line.lstrip().startswith(("%", "!"))]
    calls = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Call)]
    return any(
        isinstance(word.value, ast.Constant) and isinstance(word.value.value, str)
        for call in calls
        if getattr(call.func, "id", "") == "explore"
        for word in call.keywords
    )


@pytest.mark.parametrize("lab", typed_into(), ids=lambda path: path.stem)
def test_what_is_typed_into_a_lab_stays_text(lab, jupyter, page):
    open_lab(page, jupyter, lab.relative_to(ROOT).as_posix())
    run_all(page)
    assert page.evaluate(ERRORS) == []
    fields = page.locator(".lablib-explore input[type=text]")
    fields.first.wait_for(timeout=15_000)
    for field in fields.all():
        field.fill(EVIL)
        field.press("Enter")
        page.wait_for_timeout(1000)
    page.wait_for_timeout(2000)
    touch(page)
    assert harm(page) == SAFE
