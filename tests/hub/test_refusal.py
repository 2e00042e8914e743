"""A hub with the demonstration's login does not start where others could reach it."""

import socket
import subprocess
import sys

import pytest

from lablib.paths import project_dir

pytestmark = pytest.mark.hub
CONFIG = project_dir() / "binder" / "jupyterhub_config.py"
PLACES = {
    "all addresses": ["--JupyterHub.bind_url=http://0.0.0.0:{port}"],
    "all of version 6": ["--JupyterHub.bind_url=http://[::]:{port}"],
    "the hub itself": ["--JupyterHub.hub_ip=0.0.0.0"],
    "the hub's other name": ["--JupyterHub.hub_bind_url=http://0.0.0.0:{port}"],
    "the proxy's commands": ["--ConfigurableHTTPProxy.api_url=http://0.0.0.0:{port}"],
    "students' servers": ["--SimpleLocalProcessSpawner.ip=::"],
    "students' servers, by argument": ["--Spawner.args=--ServerApp.ip=0.0.0.0"],
}
LINE = 'c.JupyterHub.bind_url = "http://127.0.0.1:8000"'


def refused(folder, config, words):
    """Start a hub; the one sentence that it says."""
    command = [sys.executable, "-m", "jupyterhub", f"--config={config}", *words]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90)
    assert ran.returncode == 2, ran.stderr
    (said,) = [line for line in ran.stderr.splitlines() if not line.startswith("[")]
    assert "protect nobody on a network" in said and "listen on 127.0.0.1, or" in said
    assert "listening on" not in ran.stderr.lower()
    return said


@pytest.mark.parametrize("words", PLACES.values(), ids=list(PLACES))
def test_it_ends_with_one_sentence_before_it_listens(words, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    refused(tmp_path, CONFIG, [word.format(port=port) for word in words])


@pytest.mark.parametrize("line", ["", 'c.JupyterHub.ip = "0.0.0.0"'], ids=["none", "the old name"])
def test_what_jupyterhub_would_take_without_our_line_is_refused(line, tmp_path):
    text = CONFIG.read_text("utf-8")
    assert text.count(LINE) == 1
    (tmp_path / "config.py").write_text(text.replace(LINE, line))
    assert "c.JupyterHub.bind_url is 'http://" in refused(tmp_path, tmp_path / "config.py", [])
