"""Labs by keyboard and by ear: every control is reached, named and moved; every figure is told."""

import json

import nbformat
import pytest
from driving import SHOWN, menu, open_lab, run_all, shoot, wait_for_change

pytestmark = pytest.mark.browser

CELLS = [
    """
from lablib.lab import explore, figures, predict

which = predict("Which is larger?", options=["one", "two", "three"])
""",
    """
many = predict("How many?", low=0, high=10, unit="nats")
""",
    """
def growing(order, kind, steep, words, flag):
    fig = figures.figure(f"{words}: {kind} up to {order}, {steep:g}, {flag}", x="steps", y="nats")
    figures.line(fig, range(order + 1), [steep * x for x in range(order + 1)], kind)
    return figures.fixed(fig, x=(0, 9), y=(0, 15))

explore(
    growing, labels={"order": "largest x, steps"},
    order=(1, 8, 1, 3), kind=["rising", "falling"], steep=(0.0, 1.0), words="seen", flag=True,
)
""",
    """
which.reveal("two", meaning="Two is larger than one.")
""",
]
# (role and name as a screen reader has them), in the order in which Tab comes to them.
STOPS = [
    'radio "one"',
    'slider "nats"',
    'textbox "nats, as a number"',
    'button "This is my guess"',
    'slider "largest x, steps"',
    'textbox "largest x, steps, as a number"',
    'combobox "kind"',
    'slider "steep"',
    'textbox "steep, as a number"',
    'textbox "words"',
    'checkbox "flag"',
    'button "Show me"',
]
# Whether what a screen reader reads out of itself begins so.
SAID = """told => [...document.querySelectorAll('[role=status]')]
    .some(node => node.textContent.startsWith(told))"""
OURS = ".lablib-explore, .lablib-predict, .lablib-show-me"
OUTPUTS = ".jp-OutputArea, .jp-MarkdownOutput"


@pytest.fixture
def opened(jupyter, notebook, page):
    """A page with that notebook, run."""
    open_lab(page, jupyter, notebook)
    run_all(page)
    page.locator(".lablib-explore [role=slider][aria-label]").first.wait_for(timeout=15_000)
    return page


def focused(page):
    """Role and name of what has the focus, as the browser tells them to a screen reader."""
    line = page.locator(":focus").aria_snapshot().splitlines()[0]
    role, _, name = line.removeprefix("- ").partition('"')
    return f'{role.strip()} "{name.partition(chr(34))[0]}"'


def tab_to(page, stop):
    """Go on by Tab until a control of ours has the focus, and it is the one that is asked for."""
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("ours => !!document.activeElement.closest(ours)", OURS):
            assert focused(page) == stop
            return
    raise AssertionError(f"twelve times Tab, and no control; {stop} was to come")


def commit(page, nth):
    """The button of the nth guess. It is enabled once the kernel has heard of a choice."""
    return page.locator(".lablib-predict").nth(nth).get_by_role("button")


def wait_enabled(page, nth):
    button = commit(page, nth).element_handle()
    page.wait_for_function("button => !button.disabled", arg=button, timeout=15_000)


def press(page, *keys):
    """Press keys on an explorer's control; the picture must change."""
    box = page.locator(".lablib-explore")
    before = box.evaluate(SHOWN)
    for key in keys:
        page.keyboard.press(key)
    assert wait_for_change(page, box, before, 15), f"{keys} changed nothing"


def test_tab_comes_to_every_control_each_with_its_name_and_in_sight(opened):
    assert commit(opened, 1).is_disabled(), "where a slider stands is no guess"
    opened.locator(".lablib-predict [role=slider]").focus()
    opened.keyboard.press("ArrowRight")
    wait_enabled(opened, 1)
    opened.locator(".lablib-predict input[type=radio]").first.focus()
    assert focused(opened) == STOPS[0]
    for stop in STOPS[1:]:
        tab_to(opened, stop)
        width, style = opened.evaluate(
            """() => { const look = getComputedStyle(document.activeElement);
                       return [parseFloat(look.outlineWidth), look.outlineStyle]; }"""
        )
        assert width >= 2 and style == "solid", f"{stop}: the focus can be seen"
        if stop == STOPS[4]:
            shoot(opened, "access-focus")
    for stop in STOPS[-2::-1]:
        opened.keyboard.press("Shift+Tab")
        while not opened.evaluate("ours => !!document.activeElement.closest(ours)", OURS):
            opened.keyboard.press("Shift+Tab")
        if stop != STOPS[0]:  # going back, Tab enters a group of radio buttons at its other end
            assert focused(opened) == stop


def test_a_guess_is_made_by_keys(opened):
    group = opened.locator(".lablib-predict [role=radiogroup]")
    assert "Which is larger?" in group.get_attribute("aria-label")
    opened.locator(".lablib-predict input[type=radio]").first.focus()
    opened.keyboard.press("ArrowDown")
    assert focused(opened) == 'radio "two"'
    wait_enabled(opened, 0)
    tab_to(opened, 'button "This is my guess"')
    opened.keyboard.press("Enter")
    opened.get_by_text("Your guess: two. Now run on.").wait_for(timeout=15_000)
    opened.get_by_text("You guessed two; measured: two (right).").wait_for(timeout=15_000)


def test_every_control_moves_its_picture_by_keys_and_the_news_is_read_out(opened):
    slider = opened.locator(".lablib-explore [role=slider]").first
    slider.focus()
    for key, value in (
        ("ArrowRight", 4),
        ("ArrowUp", 5),
        ("ArrowDown", 4),
        ("End", 8),
        ("Home", 1),
    ):
        press(opened, key)
        assert float(slider.get_attribute("aria-valuenow")) == value and focused(opened) == STOPS[4]
    tab_to(opened, 'textbox "largest x, steps, as a number"')
    press(opened, "Control+a", "6", "Enter")
    tab_to(opened, 'combobox "kind"')
    press(opened, "ArrowDown")
    tab_to(opened, 'slider "steep"')
    press(opened, "PageUp")
    tab_to(opened, 'textbox "steep, as a number"')
    tab_to(opened, 'textbox "words"')
    press(opened, "Control+a", "s", "Enter")
    tab_to(opened, 'checkbox "flag"')
    press(opened, "Space")
    steep = float(
        opened.locator(".lablib-explore [role=slider]").last.get_attribute("aria-valuenow")
    )
    title = json.loads(opened.locator(".lablib-explore").evaluate(SHOWN))[1]
    assert title == f"s: falling up to 6, {steep:g}, False" and steep > 0
    told = f"{title}. Line chart. x axis: steps, 0 to 6."
    opened.wait_for_function(SAID, arg=told, timeout=15_000)
    tab_to(opened, 'button "Show me"')
    opened.keyboard.press("Space")
    opened.get_by_text("Measured: two. Two is larger than one.").wait_for(timeout=15_000)


def test_letters_and_arrows_on_a_control_are_no_shortcuts(opened):
    """In JupyterLab `x` cuts the cell that has the focus, and an arrow leaves it."""
    count = opened.locator(".jp-Cell").count()
    opened.locator(".lablib-explore input[type=checkbox]").focus()
    for key in ("x", "d", "d", "ArrowUp", "j"):
        opened.keyboard.press(key)
    opened.wait_for_timeout(500)
    assert opened.locator(".jp-Cell").count() == count
    assert focused(opened) == 'checkbox "flag"'
    assert opened.locator(".lm-TabBar-tab.jp-mod-current.jp-mod-dirty").count() == 1
    opened.keyboard.press("Control+s")
    opened.wait_for_selector(".lm-TabBar-tab.jp-mod-current:not(.jp-mod-dirty)", timeout=15_000)


def test_a_figure_is_told_live_stored_and_saved(jupyter, opened):
    told = "seen: rising up to 3, 0, True. Line chart. x axis: steps, 0 to 3. y axis: nats, 0."
    live = opened.get_by_role("img", name=told)
    live.wait_for(timeout=15_000)
    menu(opened, "File", "docmanager:save")
    opened.wait_for_selector(".lm-TabBar-tab.jp-mod-current:not(.jp-mod-dirty)", timeout=30_000)
    open_lab(opened, jupyter, "access.ipynb")  # JupyterLab has stored an image beside the plot
    opened.get_by_role("img", name=told).wait_for(timeout=15_000)
    book = nbformat.read(jupyter.root / "access.ipynb", as_version=4)
    for output in [output for cell in book.cells for output in cell.get("outputs", [])]:
        output.get("data", {}).pop("image/png", None)
    book.cells[0].source += "\n# changed by another hand, so that nothing in it is trusted"
    book.metadata.pop("signature", None)
    stranger = [cell for cell in book.cells if "plotly" in str(cell.get("outputs"))]
    stranger[0].outputs.append(nbformat.v4.new_output("stream", text="from elsewhere"))
    nbformat.write(book, jupyter.root / "stranger.ipynb")
    open_lab(opened, jupyter, "stranger.ipynb")
    opened.wait_for_selector(".js-plotly-plot .main-svg", timeout=15_000)
    assert opened.evaluate("() => window.lablibAccess") is None, "no script of ours ran"
    assert any(name.startswith(told) for name in texts(opened))


def texts(page):
    """The texts that the browser gives to screen readers."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [node.get("name", {}).get("value", "") for node in nodes if not node["ignored"]]


def test_axe_finds_nothing_serious_in_an_open_lab(jupyter, page):
    from axe_playwright_python.sync_playwright import Axe

    open_lab(page, jupyter, "labs/03-experts/302-switch-transformers.ipynb")
    page.wait_for_timeout(2000)
    stored = findings(page, Axe())
    run_all(page)
    page.locator(".lablib-explore [role=slider][aria-label]").first.wait_for(timeout=15_000)
    assert page.locator(OUTPUTS).count() > 20 and page.locator(".js-plotly-plot").count() > 3
    live = findings(page, Axe())
    assert [row for row in stored + live if row["ours"]] == []


def findings(page, axe):
    """Axe's serious and critical findings, a row an element: of JupyterLab's own page or ours."""
    rows = []
    for rule in axe.run(page).response["violations"]:
        if rule["impact"] not in ("serious", "critical"):
            continue
        for node in rule["nodes"]:
            inside = "([where, ours]) => !!document.querySelector(where)?.closest(ours)"
            ours = page.evaluate(inside, [node["target"][-1], OUTPUTS])
            rows.append({"rule": rule["id"], "ours": ours, "html": node["html"][:200]})
    frame = sorted({row["rule"] for row in rows if not row["ours"]})
    print("in JupyterLab's own page:", ", ".join(frame) or "nothing")
    return rows
