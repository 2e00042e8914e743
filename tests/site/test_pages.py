"""Pages of the site as their readers meet them, at a phone's and a desk's width, light and dark."""

import pytest

from lablib.papers import papers
from lablib.papers.scaffold import repository
from lablib.site import frames

pytestmark = pytest.mark.site

FRONT, THEME = "index.html", "labs/03-experts/index.html"
LAB = "labs/03-experts/302-switch-transformers.html"
PAGES = [FRONT, THEME, LAB, "labs/00-start-here.html", "code/lablib/experts/moe.html"]
BATCH = "labs/04-scaling/405-batch-size-law.html"
SHOWN = """box => {
    const plot = box.querySelector('.js-plotly-plot');
    return plot ? JSON.stringify([plot.data, plot.layout.title]) : box.innerText;
}"""

# Moves a control to another of its stops, half of the way along, and tells the page.
MOVE = """node => {
    const tick = node.type === 'checkbox', menu = node.options;
    const stops = tick ? 2 : menu ? menu.length : +node.max + 1;
    const start = tick ? +node.checked : menu ? node.selectedIndex : +node.value;
    const to = (start + Math.ceil(stops / 2)) % stops;
    if (tick) node.checked = to;
    else if (menu) node.selectedIndex = to;
    else node.value = to;
    node.dispatchEvent(new Event('input', {bubbles: true}));
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_and_draws_its_figures(path, width, theme, reader):
    one = reader(width, theme)
    one.open(path)
    drawn = one.draw()
    assert drawn >= {FRONT: 1, LAB: 5, "labs/00-start-here.html": 3}.get(path, 0)
    traces = one.page.locator(".lab-plot .trace, .lab-plot .hm").count()
    assert traces >= drawn, "a picture has something in it"
    scroll = one.page.evaluate("() => document.documentElement.scrollWidth")
    assert scroll <= width, "the page scrolls sideways"
    one.page.evaluate("() => scrollTo(0, 0)")
    one.shoot(f"{path.replace('/', '-').removesuffix('.html')}-{width}-{theme}")
    dark = one.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, dark.strip("rgba()").split(",")[:3])) < 60) == (theme == "dark")


def test_every_lab_has_a_page_that_its_rows_lead_to(site, reader):
    labs = {row.lab: row for row in papers() if row.present}
    one = reader()
    one.open(FRONT)
    links = one.page.locator("#the-labs table a").evaluate_all("all => all.map(a => a.href)")
    assert len(links) == len(labs)
    assert [link for link in links if not (site / link.removeprefix(one.address)).is_file()] == []
    one.open("labs/00-start-here.html")
    listed = one.page.locator(".cell_output li a").evaluate_all("all => all.map(a => a.href)")
    assert len(listed) >= len(labs) - 1 and all(link.endswith(".html") for link in listed)
    one.page.locator(".cell_output li a").first.click()
    one.page.wait_for_url("**/101-one-billion-word.html")


def test_a_lab_can_be_launched(reader):
    one = reader()
    one.open(LAB)
    links = one.page.locator(".dropdown-launch-buttons a").evaluate_all("a => a.map(a => a.href)")
    place = LAB.replace(".html", ".ipynb")
    owner = repository().removeprefix("https://github.com/")
    assert f"https://colab.research.google.com/github/{owner}/blob/main/{place}" in links
    assert f"https://mybinder.org/v2/gh/{owner}/main?urlpath=lab/tree/{place}" in links


def test_search_finds_a_word(reader):
    one = reader()
    one.open("search.html?q=Kneser")
    found = one.page.locator("#search-results li a").first
    found.wait_for(timeout=20_000)
    titles = one.page.locator("#search-results li").all_inner_texts()
    assert any("101" in title for title in titles), titles


def test_code_is_linked_and_arrives_at_its_line(site, reader):
    one = reader()
    one.open(LAB)
    links = one.page.locator("a.lab-code").evaluate_all("all => all.map(a => a.href)")
    missing = [a for a in links if not (site / a.split("#")[0].removeprefix(one.address)).exists()]
    assert len(links) > 10 and missing == []
    one.page.locator("a.lab-code", has_text="switch_transformers.py").first.click()
    one.page.wait_for_url("**/code/lablib/experts/switch_transformers.html#L*")
    line = one.page.locator(f"[id='{one.page.url.split('#')[1]}']")
    assert line.count() == 1
    assert 0 <= line.first.bounding_box()["y"] < 900, "the line is on the screen"


def test_no_reference_solution_is_on_the_site(site):
    assert not (site / "code/lablib/exercises").exists()
    wanted = "reference="  # as every exercise names its solution
    pages = [path for path in (site / "labs").rglob("*.html") if wanted in path.read_text("utf-8")]
    assert pages == []


def test_stored_frames_fit_their_labs():
    stored = [row for row in papers() if frames.path_of(row).is_file()]
    assert stored, "some labs have frames"
    assert [row.slug for row in stored if not frames.load(row)] == [], "record them again"
    assert all(frames.path_of(row).stat().st_size <= frames.LIMIT for row in stored)


def test_a_slider_replays_from_the_keyboard(reader):
    one = reader(390)
    one.open(BATCH)
    box = one.page.locator(".lab-replay").first
    box.scroll_into_view_if_needed()
    box.locator(".main-svg").first.wait_for(timeout=30_000)
    slider = box.get_by_role("slider", name="your batch, power of 2")
    seen, words = [box.evaluate(SHOWN)], [slider.get_attribute("aria-valuetext")]
    slider.focus()
    for key in ("ArrowLeft", "ArrowLeft", "Home", "End"):
        one.page.keyboard.press(key)
        assert _changed(one.page, box, seen[-1]), key
        seen.append(box.evaluate(SHOWN))
        words.append(slider.get_attribute("aria-valuetext"))
    assert len(set(seen[1:])) == len(set(words[1:])) == 4
    assert words[0] == words[-1], "it started at the end"
    said = box.get_by_role("status").inner_text()
    assert "bytes" in said and said in box.locator(".lab-plot").get_attribute("aria-label")


@pytest.mark.parametrize(
    "row", [r for r in papers() if frames.path_of(r).is_file()], ids=lambda r: r.slug
)
def test_every_control_that_is_replayed_moves_something(row, reader):
    one = reader()
    one.open(f"labs/{row.paths['lab'].parent.name}/{row.lab_name.replace('.ipynb', '.html')}")
    one.draw()
    boxes = one.page.locator(".lab-replay")
    assert boxes.count() == len(frames.load(row))
    for place in range(boxes.count()):
        box = boxes.nth(place)
        controls = box.locator("input, select")
        for at in range(controls.count()):
            before = box.evaluate(SHOWN)
            controls.nth(at).evaluate(MOVE)
            assert _changed(one.page, box, before), f"control {at} of explorer {place}"


def _changed(page, box, before):
    for _ in range(100):
        if box.evaluate(SHOWN) != before:
            return True
        page.wait_for_timeout(100)
    return False


def test_a_lab_without_frames_says_where_its_controls_move(reader):
    one = reader()
    one.open("labs/03-experts/303-glam.html")
    assert one.page.locator(".lab-replay").count() == 0
    assert one.page.get_by_text("Open the lab to move:").count() >= 1
    assert one.page.get_by_text("Run this cell to move:").count() == 0


def test_the_site_reads_from_a_disk_too(site, browser):
    page = browser.new_page()
    page.goto((site / BATCH).as_uri())
    box = page.locator(".lab-replay").first
    box.scroll_into_view_if_needed()
    box.locator(".main-svg").first.wait_for(timeout=30_000)
    before = box.evaluate(SHOWN)
    box.get_by_role("slider").first.press("ArrowLeft")
    assert _changed(page, box, before)
    page.close()
