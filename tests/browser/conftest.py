"""JupyterLab on loopback, over a copy of the labs, and headless Chromium."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

from lablib.paths import project_dir

sys.path.insert(0, str(Path(__file__).parent))  # `choice` and `driving` lie beside the tests

SETTINGS = '{"windowingMode": "none", "autoStartDefaultKernel": true}'


class Server(NamedTuple):
    """A running JupyterLab."""

    address: str
    token: str
    root: Path


@pytest.fixture(scope="session")
def jupyter(tmp_path_factory):
    """A JupyterLab over a scratch copy of labs/; stopped at the end."""
    root = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(project_dir() / "labs", root / "labs")
    settings = root / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # Only cells in view are drawn otherwise, and a test could not reach the rest.
    (settings / "tracker.jupyterlab-settings").write_text(SETTINGS)
    apputils = root / "settings" / "@jupyterlab" / "apputils-extension"
    apputils.mkdir(parents=True)
    (apputils / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {
        **os.environ,
        "LABLIB_TIER": "smoke",
        "JUPYTER_TOKEN": token,
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("LABLIB_STATIC", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", f"--ServerApp.root_dir={root}", "--allow-root"]
    with open(root / "jupyter.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/api/status?token={token}", server)
        yield Server(address, token, root)
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture
def notebook(jupyter, request):
    """Path of a notebook of the test module's CELLS, relative to the server's root."""
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in request.module.CELLS]
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    path = f"{request.path.stem.removeprefix('test_')}.ipynb"
    nbformat.write(book, jupyter.root / path)
    return path


def _wait_for(address, server, seconds=90):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        assert server.poll() is None, "JupyterLab stopped before it was ready"
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not answer in {seconds} s")


@pytest.fixture
def page(browser, jupyter):
    """A page of its own. Kernels that were started in it end with it, and give memory back."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()
    for kernel in _asked(jupyter, "api/kernels"):
        _asked(jupyter, f"api/kernels/{kernel['id']}", "DELETE")


def _asked(jupyter, path, method="GET"):
    """What the server's own interface answers."""
    head = {"Authorization": f"token {jupyter.token}"}
    request = urllib.request.Request(f"{jupyter.address}/{path}", headers=head, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or "null")
