"""What a student does in a browser: headless Chromium logs in and waits for a picture."""

from typing import Any

from lablib.hub.running import Hub

PICTURE = ".jp-RenderedPlotly .main-svg, .jp-RenderedPlotly img.plot-img[src]"


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
