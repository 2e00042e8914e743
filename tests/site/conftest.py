"""The site, built once, served on loopback below a secret folder, and read in headless Chromium."""

import secrets
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lablib.paths import project_dir

SHOTS = project_dir() / "build" / "screenshots"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of a site built from nothing, without a warning."""
    from lablib.site.__main__ import build

    folder = tmp_path_factory.mktemp("built") / "site"
    assert build(folder) == 0, "Sphinx warned"
    return folder


@pytest.fixture(scope="session")
def address(site):
    """Where the site is served; a folder of a server, as on GitHub Pages."""
    secret = f"/{secrets.token_hex(16)}/"

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(site))

        def translate_path(self, path):
            below = path.startswith(secret)
            return super().translate_path(path.removeprefix(secret) if below else "/nowhere")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{secret}"
        server.shutdown()


class Reader:
    """A page of the browser; `wrong` are errors, failures and requests to anywhere else."""

    def __init__(self, page, address):
        self.page, self.address, self.wrong = page, address, []
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("console", self._console)
        page.on("requestfailed", self._failed)
        page.on("request", self._request)

    def _console(self, message):
        if message.type in ("error", "warning"):
            self.wrong.append(f"console: {message.text}")

    def _failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # as is what a page still loads when it is left
            self.wrong.append(f"failed: {request.url}")

    def _request(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"left the site: {request.url}")

    def open(self, path):
        """Open a page of the site and wait until its math is set."""
        self.page.goto(self.address + path, wait_until="networkidle")
        self.page.evaluate("() => window.MathJax?.startup?.promise")

    def draw(self):
        """Scroll through the page until every figure that can be seen is drawn; how many."""
        figures = self.page.locator(".lab-figure:visible")
        for place in range(figures.count()):
            figures.nth(place).scroll_into_view_if_needed()
            figures.nth(place).locator(".main-svg").first.wait_for(timeout=30_000)
        self.page.wait_for_timeout(300)
        return figures.count()

    def shoot(self, name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"site-{name}.png")


@pytest.fixture
def reader(browser, address):
    """Open a Reader: width in pixels, theme "light" or "dark"; nothing may be wrong, in the end."""
    opened = []

    def start(width=1280, theme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900})
        context.add_init_script(f"localStorage.mode = localStorage.theme = '{theme}'")
        opened.append((context, Reader(context.new_page(), address)))
        return opened[-1][1]

    yield start
    for context, one in opened:
        context.close()
        assert one.wrong == []
