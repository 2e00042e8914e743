"""Every lab as its reader meets it: opened in JupyterLab, run, and each control moved."""

import json
import time

import pytest

from lablib.papers import papers
from lablib.paths import project_dir

pytestmark = pytest.mark.browser

ROOT = project_dir()
LABS = [ROOT / "labs" / "00-start-here.ipynb"]
LABS += [row.paths["lab"] for row in papers() if row.present]
SHOTS = ROOT / "build" / "screenshots"

# What an explorer shows now: the data and title of its figure, else its text.
SHOWN = """box => {
    const plot = box.querySelector('.js-plotly-plot');
    const area = box.querySelector('.jupyter-widgets-output-area, .widget-output');
    if (!plot || !plot.data) return area ? area.innerText : '';
    const title = plot.layout.title ? plot.layout.title.text : '';
    return JSON.stringify([plot.data, title, plot.layout.shapes, plot.layout.annotations]);
}"""
ERRORS = """() => [...document.querySelectorAll(
    '[data-mime-type="application/vnd.jupyter.error"], .jp-OutputArea-output pre')]
    .map(node => node.innerText)
    .filter(text => /^[A-Za-z.]*(Error|Exception)\\b|Traceback/.test(text))
"""


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


@pytest.mark.parametrize("lab", LABS, ids=lambda path: path.stem)
def test_a_lab_runs_and_each_control_moves_its_figure(lab, jupyter, page):
    open_lab(page, jupyter, lab)
    run_all(page)
    assert page.evaluate(ERRORS) == []
    shoot(page, f"{lab.stem}-top")
    shoot_all(page, lab.stem)
    boxes = page.locator(".lablib-explore")
    assert boxes.count() >= 1, "a lab has something to explore"
    moved = [move_all(page, boxes.nth(place)) for place in range(boxes.count())]
    assert all(moved), f"controls moved in each explorer: {moved}"
    guesses = page.locator(".lablib-predict")
    for place in range(guesses.count()):
        make_guess(page, guesses.nth(place))
    assert page.evaluate(ERRORS) == []
    shoot_all(page, f"{lab.stem}-moved")


def open_lab(page, jupyter, lab):
    address, token = jupyter
    path = lab.relative_to(ROOT).as_posix()
    page.goto(f"{address}/lab/tree/{path}?reset&token={token}", wait_until="load")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)
    wait_idle(page, 90)


def wait_idle(page, seconds):
    page.wait_for_function(
        "() => /Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText || '')",
        timeout=seconds * 1000,
    )


def run_all(page, seconds=240):
    """Run every cell from the menu, and wait until the last one has its number."""
    page.evaluate("() => document.activeElement?.blur()")
    page.get_by_role("menuitem", name="Edit", exact=True).first.click()
    page.locator("[data-command='editmenu:clear-all']").first.click()  # stored numbers, too
    page.wait_for_function(
        "() => ![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        ".some(node => /\\d/.test(node.innerText))"
    )
    page.get_by_role("menuitem", name="Run", exact=True).first.click()
    page.locator("[data-command='runmenu:run-all']").first.click()
    page.wait_for_function(
        """() => {
            const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
            // A cell whose source is folded away has no prompt to read.
            const texts = prompts.map(node => node.innerText.trim()).filter(text => text);
            const failed = '[data-mime-type="application/vnd.jupyter.error"]';
            const broken = document.querySelector(failed);
            return broken || (texts.length && texts.every(text => /\\[\\d+\\]/.test(text)));
        }""",
        timeout=seconds * 1000,
    )
    wait_idle(page, 60)
    page.wait_for_timeout(1500)


def move_all(page, box):
    """Move every control of one explorer; each must change what is shown. How many there were."""
    box.scroll_into_view_if_needed()
    moves = [
        (".noUi-handle", move_slider),
        ("select", move_menu),
        ("input[type=checkbox]", lambda page, node: node.click()),
        ("input[type=text]:not([readonly])", type_text),
    ]
    done = 0
    for selector, move in moves:
        controls = box.locator(selector)
        for place in range(controls.count()):
            before = box.evaluate(SHOWN)
            move(page, controls.nth(place))
            changed = wait_for_change(page, box, before)
            assert changed, f"{selector} {place} changed nothing in: {before[:200]}"
            done += 1
    return done


def move_slider(page, handle):
    handle.focus()
    at_end = handle.get_attribute("aria-valuenow") == handle.get_attribute("aria-valuemax")
    for _ in range(3):
        page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")


def move_menu(page, menu):
    options = menu.locator("option").all_inner_texts()
    chosen = menu.evaluate("node => node.selectedIndex")
    menu.select_option(index=(chosen + 1) % len(options))


def type_text(page, field):
    if field.evaluate("node => !!node.closest('.widget-readout')"):
        return
    field.fill("the king of")
    field.press("Enter")


def wait_for_change(page, box, before, seconds=30):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if box.evaluate(SHOWN) != before:
            return True
        page.wait_for_timeout(100)
    return False


def make_guess(page, box):
    """Pick an answer; the reply below it must say something."""
    box.scroll_into_view_if_needed()
    radios = box.locator("input[type=radio]")
    if radios.count():
        radios.first.click()
    else:
        box.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "box => /Noted|You guessed/.test(box.innerText)", arg=box.element_handle(), timeout=15_000
    )


def shoot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def shoot_all(page, name):
    """The whole notebook in pieces of about two screens: name-1.png, name-2.png, ..."""
    find = "document.querySelector('.jp-WindowedPanel-outer')"
    height, view = page.evaluate(f"() => [{find}.scrollHeight, {find}.clientHeight]")
    page.set_viewport_size({"width": 1280, "height": 1800})
    page.wait_for_timeout(500)
    view = page.evaluate(f"() => {find}.clientHeight")
    height = page.evaluate(f"() => {find}.scrollHeight")
    for number, top in enumerate(range(0, height, view), start=1):
        page.evaluate(f"() => {{ {find}.scrollTop = {top}; }}")
        page.wait_for_timeout(300)
        shoot(page, f"{name}-{number}")
    page.set_viewport_size({"width": 1280, "height": 900})


def test_every_lab_that_is_there_is_tested():
    found = {path.name for path in (ROOT / "labs").rglob("*.ipynb")}
    assert found == {path.name for path in LABS}, json.dumps(sorted(found))
