"""What a student does in a browser: headless Chromium logs in and waits for a picture."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lablib.hub.running import Hub

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
PICTURE = ".jp-RenderedPlotly .main-svg, .jp-RenderedPlotly img.plot-img[src]"


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium, headless. Raises FileNotFoundError where there is none."""
    from playwright.sync_api import sync_playwright

    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        raise FileNotFoundError("no Chromium on this machine: install the system's package")
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


def log_in(page: Any, hub: Hub, name: str, place: str = "") -> None:
    """Fill in the login form. place: what to open after it, the course's start page without."""
    page.goto(f"{hub.url}/{place}")
    page.fill("#username_input", name)
    page.fill("#password_input", hub.password)
    page.click("#login_submit")


def first_picture(page: Any, seconds: float = 180) -> Any:
    """Wait until the notebook that is opening shows its first picture."""
    picture = page.locator(PICTURE).filter(visible=True).first
    picture.wait_for(timeout=1000 * seconds)
    return picture
