"""A saved notebook keeps its pictures; while a kernel is there, its controls move them quickly."""

import os

import nbformat
import pytest
from driving import (
    SHOWN,
    make_guess,
    open_lab,
    restart,
    run_all,
    save,
    shoot,
    shoot_all,
    wait_for_change,
)

pytestmark = pytest.mark.browser

CELLS = [
    """
from lablib.lab import explore, figures, predict

guess = predict("Which is larger?", options=["one", "two"])
""",
    """
def growing(order, kind):
    fig = figures.figure(f"{kind} up to {order}", x="x, steps", y="y, nats")
    runs = [[(x + seed) ** 2 / 10 for x in range(order + 1)] for seed in range(3)]
    figures.line(fig, range(order + 1), runs, kind)
    return figures.fixed(fig, x=(0, 9), y=(0, 15))

explore(growing, labels={"order": "largest x, steps"}, order=(1, 8, 1, 3), kind=["a", "b"])
""",
    """
explore(lambda text: figures.painted(text, ["rgba(0,114,178,.4)"] * len(text)), text="painted")
""",
    """
pair = figures.paired([3.9, 3.8, 3.85, 4.0], [4.0, 4.1, 4.0, 4.05], ("switch", "dense"), "nats")
guess.reveal("two", meaning="Two is larger than one.", figure=pair)
""",
    """
fig = figures.figure("Held-out loss", y="loss, nats")
figures.bars(fig, ["dense", "8 experts"], [[3.0, 3.4, 3.1, 3.3], [2.0, 2.9, 2.3, 2.7]])
figures.show(fig, alt="Numbers stand under the bars; <b>this</b> is text.")
""",
    """
rows = {"4 experts": [-.1, -.12, -.05, -.2], "8 experts": [-.2, -.22, -.15, -.3]}
figures.show(figures.differences(rows, baseline="dense", unit="nats"))
""",
]


def pictures(page):
    """Plots and stored images of plots that can be seen, by width in pixels."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.jp-RenderedPlotly')].map(node => {
            const shown = node.querySelector('.main-svg, img.plot-img[src]');
            return shown ? shown.getBoundingClientRect().width : 0;
        })"""
    )


def text(page):
    return "\n".join(page.locator(".jp-OutputArea").all_inner_texts())


def test_pictures_stay_when_the_kernel_goes(jupyter, notebook, page):
    open_lab(page, jupyter, notebook)
    run_all(page)
    assert "Two is larger" not in text(page), "no answer before a guess"
    assert len(pictures(page)) == 3 and all(pictures(page))
    make_guess(page, page.locator(".lablib-predict"))
    page.get_by_text("measured: two. Two is larger than one.").wait_for(timeout=15_000)
    box = page.locator(".lablib-explore").first
    before = box.evaluate(SHOWN)
    box.locator("select").select_option(index=1)
    assert wait_for_change(page, box, before)
    page.wait_for_timeout(1500)
    shoot_all(page, "saved-live")
    save(page)
    restart(page)
    open_lab(page, jupyter, notebook)
    page.wait_for_timeout(4000)
    shoot_all(page, "saved-reopened")
    assert len(pictures(page)) == 4 and all(pictures(page))
    stored = nbformat.read(jupyter.root / notebook, as_version=4)
    plots = [o.data for c in stored.cells for o in c.outputs if "plotly" in str(o.get("data"))]
    assert "b up to 3" in str(plots), "as it was when it was saved"
    for words in ("Which is larger?", "Your guess: one", "Two is larger", "painted"):
        assert words in text(page)
    dead = page.get_by_text("model not found")
    assert dead.count() == 3, "of predict and of two explorers"
    for place in range(dead.count()):
        size, line = dead.nth(place).evaluate(
            "node => [getComputedStyle(node).fontSize, getComputedStyle(node, '::before').content]"
        )
        assert size == "0px" and "Run this cell" in line, "the line stands in its place"


def test_a_page_loaded_again_says_what_to_do(jupyter, notebook, page):
    open_lab(page, jupyter, notebook)
    run_all(page)
    advice = page.get_by_text("run this cell again")
    assert advice.count() == 0
    save(page)
    open_lab(page, jupyter, notebook)
    page.wait_for_selector(".lablib-explore", timeout=30_000)
    advice.first.wait_for(timeout=15_000)
    assert advice.count() == 4 and len(pictures(page)) == 3 and all(pictures(page))


def test_a_move_redraws_within_150_ms(jupyter, notebook, page):
    open_lab(page, jupyter, notebook)
    run_all(page)
    box = page.locator(".lablib-explore").first
    box.scroll_into_view_if_needed()
    times = []
    for step in range(10):
        times.append(page.evaluate(MOVE, step))
        page.wait_for_timeout(400)  # the renderer then makes its stored image
    print("ms from a key to the new picture:", [round(time) for time in times])
    crowd = max(1, os.getloadavg()[0] / os.cpu_count())  # processes that wait for each core
    assert min(times) < 150 * crowd, "the fastest: others wait for whatever else runs here"


# Presses an arrow key on the slider and waits for the title of the next picture.
MOVE = """async step => {
    const box = document.querySelector('.lablib-explore');
    const area = box.closest('.jp-OutputArea');
    const title = () => area.querySelector('.js-plotly-plot .gtitle')?.textContent;
    const before = title(), start = performance.now();
    const key = step < 5 ? 'ArrowRight' : 'ArrowLeft';
    const handle = box.querySelector('.noUi-handle');
    handle.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
    while (!title() || title() === before) {
        if (performance.now() - start > 10000) return 10000;
        await new Promise(done => setTimeout(done, 2));
    }
    return performance.now() - start;
}"""


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_pictures_are_readable_in_both_themes_and_at_700_pixels(theme, jupyter, notebook, page):
    open_lab(page, jupyter, notebook)
    set_theme(page, theme)
    run_all(page)
    shade = theme.split()[-1].lower()
    shoot_all(page, f"theme-{shade}")
    page.set_viewport_size({"width": 700, "height": 900})
    page.get_by_role("tab", name="File Browser").first.click()  # folds it away
    page.wait_for_timeout(1500)
    view = page.locator(".jp-Notebook").first.bounding_box()["width"]
    assert all(0 < width <= view for width in pictures(page))
    shoot(page, f"theme-{shade}-700")
    texts = page.evaluate(COLORS)
    assert {"Held-out loss", "x, steps", "kind", "Which is larger?"} <= {
        row["text"].removeprefix("Your guess? ") for row in texts
    }
    assert [row for row in texts if row["ratio"] < 4.5] == []


def set_theme(page, theme):
    page.evaluate("() => document.activeElement?.blur()")
    page.get_by_role("menuitem", name="Settings", exact=True).first.click()
    page.get_by_text("Theme", exact=True).first.hover()
    page.get_by_text(theme, exact=True).first.click()
    page.wait_for_function(
        "dark => (document.body.dataset.jpThemeLight === 'false') === dark",
        arg=theme.endswith("Dark"),
    )


# Contrast of each text in lablib's outputs with the first opaque ground behind it.
COLORS = """() => {
    const channels = text => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = rgb => rgb.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const over = (top, below) => { const a = top[3] ?? 1;
        return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]); };
    const ground = node => {
        const layers = [];
        for (let at = node; at; at = at.parentElement) {
            const plot = at.querySelector?.(':scope > .main-svg');
            const color = channels(plot ? plot.style.background
                                        : getComputedStyle(at).backgroundColor);
            if (color.length) layers.push(color);
            if (color.length && (color[3] ?? 1) === 1) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
    };
    const found = [];
    for (const node of document.querySelectorAll(
            '.jp-OutputArea-output svg text, .jp-OutputArea-output span,'
            + '.jp-OutputArea-output p, .jp-OutputArea-output i, .jp-OutputArea-output label')) {
        if (!node.textContent.trim() || !node.getClientRects().length) continue;
        if (node.closest('.modebar, .jp-CodeMirrorEditor')) continue;
        const look = getComputedStyle(node), below = ground(node);
        const ink = over(channels(node.tagName === 'text' ? look.fill : look.color), below);
        const [low, high] = [light(ink), light(below)].sort((a, b) => a - b);
        found.push({text: node.textContent, ratio: (high + 0.05) / (low + 0.05)});
    }
    return found;
}"""
