"""What a reader does in JupyterLab: open, run, save, restart, move controls, and look."""

import time

from lablib.paths import project_dir

SHOTS = project_dir() / "build" / "screenshots"

# What an explorer shows now: the data and title of its figure, else its text.
SHOWN = """box => {
    const outputs = [...box.closest('.jp-OutputArea').children];
    const own = outputs.findIndex(node => node.contains(box));
    const area = outputs[own + 1];
    const plot = area.querySelector('.js-plotly-plot');
    if (!plot || !plot.data) return area.innerText;
    const title = plot.layout.title ? plot.layout.title.text : '';
    return JSON.stringify([plot.data, title, plot.layout.shapes, plot.layout.annotations]);
}"""
ERRORS = """() => [...document.querySelectorAll(
    '[data-mime-type="application/vnd.jupyter.error"], .jp-OutputArea-output pre')]
    .map(node => node.innerText)
    .filter(text => /^[A-Za-z.]*(Error|Exception)\\b|Traceback/.test(text))
"""
NOTEBOOK = ".jp-NotebookPanel:not(.lm-mod-hidden)"


def open_lab(page, jupyter, path):
    """Open a notebook, its path relative to the server's root, in a workspace of its own."""
    page.goto(f"{jupyter.address}/lab/tree/{path}?reset&token={jupyter.token}", wait_until="load")
    page.wait_for_selector(f"{NOTEBOOK} .jp-Cell", timeout=90_000)
    wait_idle(page, 90)


def wait_idle(page, seconds):
    page.wait_for_function(
        "() => /Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText || '')",
        timeout=seconds * 1000,
    )


def menu(page, name, command):
    page.evaluate("() => document.activeElement?.blur()")
    page.get_by_role("menuitem", name=name, exact=True).first.click()
    page.locator(f".lm-Menu [data-command='{command}']").first.click()


def run_all(page, seconds=240):
    """Run every cell from the menu, and wait until the last one has its number."""
    menu(page, "Edit", "editmenu:clear-all")  # stored numbers, too
    page.wait_for_function(
        "() => ![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
        ".some(node => /\\d/.test(node.innerText))"
    )
    menu(page, "Run", "runmenu:run-all")
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


def save(page):
    menu(page, "File", "docmanager:save")
    page.wait_for_selector(".lm-TabBar-tab.jp-mod-current:not(.jp-mod-dirty)", timeout=30_000)
    page.wait_for_timeout(500)


def restart(page):
    """Restart the kernel from the menu."""
    menu(page, "Kernel", "kernelmenu:restart")
    page.locator(".jp-Dialog .jp-mod-accept").click()
    wait_idle(page, 90)


def move_all(page, box):
    """Move every control of one explorer; each must change what is shown. How many there were."""
    box.scroll_into_view_if_needed()
    moves = [
        (".noUi-handle", move_slider),
        ("select", move_menu),
        ("input[type=checkbox], .widget-toggle-button", lambda page, node: node.click()),
        ("input[type=text]:not([readonly])", type_text),
    ]
    done = 0
    for selector, move in moves:
        controls = box.locator(selector)
        many = range(controls.count())
        for place in many if len(many) < 20 else (many[0], many[-1]):  # of a pad, two corners
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
        if box.evaluate(SHOWN) not in (before, ""):
            return True
        page.wait_for_timeout(100)
    return False


def make_guess(page, box):
    """Pick an answer and commit to it; the reply below it must say so."""
    box.scroll_into_view_if_needed()
    radios = box.locator("input[type=radio]")
    if radios.count():
        radios.first.click()
    else:
        box.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
    box.get_by_role("button", name="This is my guess").click()
    page.wait_for_function(
        "box => /Your guess: /.test(box.closest('.jp-OutputArea').innerText)",
        arg=box.element_handle(),
        timeout=15_000,
    )


def shoot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


def shoot_all(page, name, width=1280):
    """The whole notebook in pieces of about two screens: name-1.png, name-2.png, ..."""
    find = "document.querySelector('.jp-WindowedPanel-outer')"
    page.set_viewport_size({"width": width, "height": 1800})
    page.wait_for_timeout(500)
    view = page.evaluate(f"() => {find}.clientHeight")
    height = page.evaluate(f"() => {find}.scrollHeight")
    for number, top in enumerate(range(0, height, view), start=1):
        page.evaluate(f"() => {{ {find}.scrollTop = {top}; }}")
        page.wait_for_timeout(300)
        shoot(page, f"{name}-{number}")
    page.set_viewport_size({"width": 1280, "height": 900})
