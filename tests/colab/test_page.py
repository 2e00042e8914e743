"""What a reader sees: widgets of Colab's ipywidgets in a real page, and Plotly as Colab loads it.

Colab's own page is not to be had. The classic Notebook, which Colab ships, has the same ipywidgets
with an Output widget of their own; and a bare page puts in an output's HTML as Colab's does.
"""

import contextlib
import json
import secrets
import socket
import subprocess
import urllib.request

import nbformat
import pytest

from lablib.lab import colab, figures
from lablib.paths import project_dir

pytestmark = pytest.mark.colab

SHOTS = project_dir() / "build/screenshots"
CELL = """
from lablib.lab import explore, figures

def growing(order, kind):
    if order == 4:
        raise ValueError("order 4 is too much")
    fig = figures.figure(f"{kind} up to {order}", x="x", y="y")
    return figures.line(fig, range(5), [[x**order for x in range(5)]], kind)

explore(growing, order=(1, 5), kind=["squares", "cubes"])"""
READY = "() => window.Jupyter?.notebook?.kernel?.comm_manager.targets['jupyter.widget']"
TITLE = "() => document.querySelector('.output_area .js-plotly-plot .gtitle')?.textContent"
# As Colab's output frame does: scripts are made anew, those with an address come when they come.
INSERT = """html => {
    const area = document.body.appendChild(document.createElement('div'));
    area.innerHTML = html;
    for (const old of area.querySelectorAll('script')) {
        const made = document.createElement('script');
        if (old.src) made.src = old.src; else made.textContent = old.textContent;
        old.replaceWith(made);
    }
}"""


@pytest.fixture
def page(browser):
    """A page of headless Chromium that has no network but Plotly's script, from the package."""
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.route("https://cdn.plot.ly/**", lambda route: route.fulfill(body=plotly()))
    yield page
    page.close()


def plotly():
    """Plotly's script; the classic Notebook's module loader, which Colab lacks, is kept from it."""
    from plotly.offline import get_plotlyjs

    return f"(() => {{ let define, module, exports;\n{get_plotlyjs()}\n}})()"


@contextlib.contextmanager
def classic(machine, book):
    """A notebook's address in a classic Notebook of that machine, and its server, stopped after."""
    kernel = machine.folder / "share/kernels/python3"
    kernel.mkdir(parents=True)
    argv = [machine.python, "-m", "colab_kernel_launcher", "-f", "{connection_file}"]
    about = {"argv": argv, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(about))
    nbformat.write(book, machine.content / "lab.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [machine.python, "-m", "notebook", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--allow-root", f"--notebook-dir={machine.content}"]
    shared = project_dir() / "build/colab-env/share/jupyter"
    extra = {"JUPYTER_TOKEN": token, "JUPYTER_PATH": f"{machine.folder / 'share'}:{shared}"}
    extra["JUPYTER_CONFIG_PATH"] = str(project_dir() / "build/colab-env/etc/jupyter")
    with open(machine.folder / "server.log", "w") as log:
        variables = machine.variables | extra
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}/notebooks/lab.ipynb?token={token}", server
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(address, server, page):
    for _ in range(300):
        assert server.poll() is None, "the server stopped before it was ready"
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(address, timeout=5).close()
        page.wait_for_timeout(300)
    raise AssertionError("no answer in 90 s")


def test_an_explorer_redraws_within_its_output_widget(fresh, page):
    book = nbformat.v4.new_notebook()
    setup = nbformat.read(project_dir() / "labs/00-start-here.ipynb", as_version=4).cells[1].source
    book.cells = [nbformat.v4.new_code_cell(text) for text in (setup, CELL)]
    with classic(fresh, book) as (address, server):
        wait_for(address, server, page)
        page.goto(address)
        page.wait_for_function(READY, timeout=60_000)
        page.wait_for_timeout(4000)  # the widgets' script then meets the kernel
        page.evaluate("() => Jupyter.notebook.execute_all_cells()")
        page.wait_for_function(f"{TITLE} === 'squares up to 1'", timeout=180_000)
        inside = "() => !!document.querySelector('.jupyter-widgets-output-area .js-plotly-plot')"
        assert page.evaluate(inside)
        page.locator(".ui-slider-handle").first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"({TITLE})() === 'squares up to 2'")
        page.locator(".widget-dropdown select").first.select_option("cubes")
        page.wait_for_function(f"({TITLE})() === 'cubes up to 2'")
        assert page.locator(".js-plotly-plot").count() == 1, "one picture, not one more"
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / "colab-explorer.png")
        page.locator(".ui-slider-handle").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.get_by_text("ValueError: order 4 is too much").wait_for()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"({TITLE})() === 'cubes up to 5'")


def test_plotly_draws_although_its_script_comes_late(page):
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    fig = figures.figure("drawn").add_scatter(y=[1, 2])
    page.goto("about:blank")
    page.evaluate(INSERT, colab.page(fig))
    page.locator(".gtitle", has_text="drawn").wait_for(timeout=30_000)
    page.evaluate(INSERT, colab.page(figures.figure("drawn again").add_scatter(y=[1, 2])))
    page.locator(".gtitle", has_text="drawn again").wait_for(timeout=30_000)
    assert errors == []


def test_plotlys_own_html_would_not(page):
    import plotly.io as pio

    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto("about:blank")
    own = pio.to_html(figures.figure("drawn").add_scatter(y=[1, 2]), include_plotlyjs="cdn")
    page.evaluate(INSERT, own)
    page.wait_for_timeout(3000)
    assert "Plotly is not defined" in errors[0] and page.locator(".gtitle").count() == 0
