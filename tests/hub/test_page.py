"""In a browser: from the login to the first picture, and a clean copy in one click."""

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell

from lablib.chromium import chromium
from lablib.hub.page import first_picture, log_in
from lablib.paths import project_dir

pytestmark = pytest.mark.hub
SCREENSHOTS = project_dir() / "build" / "screenshots"
LAB = "labs/04-scaling/405-batch-size-law.ipynb"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


def test_a_login_ends_at_the_start_page_with_its_picture(running, page):
    log_in(page, running, "vera")
    first_picture(page)
    assert page.url.endswith("/user/vera/lab/tree/labs/00-start-here.ipynb")
    page.wait_for_timeout(2000)
    assert page.get_by_text("get notified about official").count() == 0, "no question first"
    page.screenshot(path=SCREENSHOTS / "hub-start.png")


def test_a_link_to_a_lab_leads_there_through_the_login(running, page):
    place = f"hub/user-redirect/git-pull?repo={running.labs}&branch=main&targetpath=labs"
    log_in(page, running, "vera", f"{place}&urlpath=lab/tree/{LAB}")
    # The start page, open at the last visit, comes back beside it, sometimes for a moment in front.
    page.locator("[role=tab][aria-selected=true]", has_text="405-batch-size-law").wait_for()
    first_picture(page)
    page.wait_for_url(f"**/user/vera/lab/tree/{LAB}")


def test_a_clean_copy_is_one_click(running, student, page):
    wilma = student("wilma")
    mine = wilma.read(LAB)
    mine.cells.insert(0, new_markdown_cell("My own words.", id="mine"))
    wilma.save(LAB, mine)
    log_in(page, running, "wilma", f"user/wilma/lab/tree/{LAB}")
    page.get_by_role("paragraph").filter(has_text="My own words.").wait_for(timeout=120_000)
    page.get_by_text("Clean copy").click()
    tab = page.get_by_role("tab", name="405-batch-size-law-clean.ipynb")
    tab.wait_for(timeout=60_000)
    assert tab.get_attribute("aria-selected") == "true"
    first_picture(page)
    page.screenshot(path=SCREENSHOTS / "hub-clean-copy.png")
    kept = running.state / "users" / "wilma" / LAB
    course = project_dir() / LAB
    clean = kept.with_stem(f"{kept.stem}-clean")
    sources = [[c.source for c in nbformat.read(p, 4).cells] for p in (kept, clean, course)]
    assert sources[0][0] == "My own words." and sources[1] == sources[2] == sources[0][1:]


def test_what_is_no_lab_says_so_and_offers_none(running, student, page):
    xenia = student("xenia")
    xenia.save("own.ipynb", xenia.read(LAB))
    log_in(page, running, "xenia", "user/xenia/lab/tree/own.ipynb")
    page.get_by_text("Clean copy").click(timeout=120_000)
    page.get_by_text("own.ipynb is no lab of this course").wait_for(timeout=30_000)
    page.screenshot(path=SCREENSHOTS / "hub-no-lab.png")
