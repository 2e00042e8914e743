"""A JupyterHub of this machine, started from binder/jupyterhub_config.py and stopped again."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lablib.hub.publish import publish
from lablib.paths import cache_dir, project_dir

PROXY = "build/chp/node_modules/.bin"  # where make installs the hub's proxy
PATIENCE = 120  # seconds for a hub to answer; it needs about 5


@dataclass(frozen=True)
class Hub:
    """A running hub. process: of the hub itself, parent of all it starts."""

    url: str
    password: str
    state: Path
    process: subprocess.Popen

    @property
    def log(self) -> Path:
        """What the hub and the students' servers say."""
        return self.state / "hub.log"

    @property
    def labs(self) -> str:
        """Address of the repository that students' copies are pulled from."""
        return f"file://{self.state}/labs.git"

    def server(self, student: str) -> psutil.Process:
        """The process of a student's server. Raises LookupError when none runs."""
        for process in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                if process.environ().get("JUPYTERHUB_USER") == student:
                    return process
        raise LookupError(f"no server of {student} runs")


@contextmanager
def hub(state: Path, port: int = 0, config: Path | None = None) -> Iterator[Hub]:
    """Publish the labs, start a hub on loopback, and stop it and all its servers at the end.

    state: its folder. port: 0 for any that is free. config: in place of the house's.
    Raises RuntimeError, with the hub's own last words, when it does not start.
    """
    root = project_dir()
    if root is None:
        raise FileNotFoundError("a hub is started in a checkout: the wheel has no labs")
    state = state.resolve()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    publish(root / "labs", state / "labs.git", root / ".gitignore")
    url = f"http://127.0.0.1:{port or free_port()}"
    password = os.environ.get("LABLIB_HUB_PASSWORD") or secrets.token_urlsafe(9)
    words = [
        f"--config={config or root / 'binder' / 'jupyterhub_config.py'}",
        f"--JupyterHub.bind_url={url}",
        f"--JupyterHub.hub_port={free_port()}",
        f"--ConfigurableHTTPProxy.api_url=http://127.0.0.1:{free_port()}",
    ]
    with _process(state, words, password) as process:
        found = Hub(url, password, state, process)
        _wait(found)
        yield found


@contextmanager
def _process(state: Path, words: Sequence[str], password: str) -> Iterator[subprocess.Popen]:
    """The hub's process; asked to stop at the end, which stops its proxy and servers."""
    environment = {
        **os.environ,
        "LABLIB_HOME": str(cache_dir()),
        "LABLIB_HUB": str(state),
        "LABLIB_HUB_PASSWORD": password,
        "PATH": os.pathsep.join([str(project_dir() / PROXY), os.environ.get("PATH", "")]),
    }
    with open(state / "hub.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterhub", *words],
            cwd=state,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: the hub is then asked to stop
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(hub: Hub) -> None:
    """Until the hub answers through its proxy."""
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        if hub.process.poll() is not None:
            lines = hub.log.read_text("utf-8").strip().splitlines()
            raise RuntimeError("\n".join(["JupyterHub did not start:", *lines[-5:]]))
        try:
            urllib.request.urlopen(f"{hub.url}/hub/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterHub did not answer within {PATIENCE} s: see {hub.log}")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
