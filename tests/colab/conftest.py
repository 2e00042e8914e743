"""A machine of Colab's: its packages without lablib, its kernel, and the project's repository.

`build/colab-env` has Colab's packages alone. Each worker gets an environment on top of it, which is
what a setup cell writes to. The project's address leads to a repository made from this checkout,
through git's own settings, so that the cell runs as it stands in the notebook.
"""

import json
import os
import subprocess
import time

import pytest
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget

from lablib.papers.scaffold import repository
from lablib.paths import project_dir

HERE = project_dir() / "tests/colab"
ENVIRONMENT = project_dir() / "build/colab-env"
VERSIONS = """
import importlib.metadata as m, json
print(json.dumps({d.name.lower(): m.version(d.name) for d in m.distributions()}))
"""
SITE = 'import sysconfig; print(sysconfig.get_path("purelib"))'


class Output(OutputWidget):
    """An Output widget whose kernel isn't told what it holds: lablib never asks.

    nbclient tells it while it waits for a cell's reply, which a busy machine then makes it miss.
    """

    def send(self, *what, **more):
        pass


class Client(NotebookClient):
    """Runs a notebook in Colab's kernel, whatever kernel it asks for."""

    def __init__(self, *what, **more):
        super().__init__(*what, **more)
        self.widget_registry = {"@jupyter-widgets/output": {"OutputModel": Output}}

    def create_kernel_manager(self):
        manager = super().create_kernel_manager()
        launcher = [self.python, "-m", "colab_kernel_launcher", "-f", "{connection_file}"]
        manager.kernel_spec.argv = launcher
        return manager


class Colab:
    """An environment on top of Colab's packages, and the variables that its kernels run with."""

    def __init__(self, folder, project):
        self.folder, self.project, self.content = folder, project, folder / "content"
        self.content.mkdir(parents=True)
        self.python = str(folder / "environment/bin/python")
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("LABLIB_", "PYTHON"))}
        self.variables = keep | {
            "PATH": f"{folder / 'environment/bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(HERE / "standin"),
            "LABLIB_TIER": "smoke",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{project}.insteadOf",
            "GIT_CONFIG_VALUE_0": repository(),
        }
        base = str(ENVIRONMENT / "bin/python")
        subprocess.run([base, "-m", "venv", folder / "environment"], check=True)
        below, own = (output(python, "-c", SITE).strip() for python in (base, self.python))
        with open(f"{own}/below.pth", "w") as file:
            file.write(f"import site; site.addsitedir({below!r})\n")
        self.shipped = json.loads(output(base, "-c", VERSIONS))

    def bare(self):
        """Another machine whose disk has what this one downloaded: archives, corpora, models."""
        made = Colab(self.folder.with_name("warm"), self.project)
        made.variables |= {
            k: v for k, v in self.variables.items() if k in ("PIP_CACHE_DIR", "LABLIB_HOME")
        }
        return made

    def forget(self):
        """Remove lablib, as Colab starts without it; what it needs stays on the disk."""
        subprocess.run(
            [self.python, "-m", "pip", "uninstall", "--quiet", "--yes", "lablib"],
            check=True,
            capture_output=True,
        )

    def versions(self):
        """Version by package, as a kernel finds them."""
        return json.loads(output(self.python, "-c", VERSIONS))

    def replaced(self):
        """Which of Colab's packages have another version now: none should."""
        now = self.versions()
        return {name: (v, now[name]) for name, v in self.shipped.items() if now[name] != v}

    def execute(self, book, **variables):
        """Run a notebook's cells in a new kernel; the client, which has the widgets' state."""
        where = {"metadata": {"path": str(self.content)}}
        client = Client(book, timeout=300, resources=where)
        client.python = self.python
        client.execute(env=self.variables | variables, stderr=subprocess.DEVNULL)
        return client


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def project(tmp_path_factory, copy_project):
    """A git repository with this checkout as its one commit."""
    folder = tmp_path_factory.mktemp("repository")
    copy_project(folder)
    who = ["-c", "user.name=lablib", "-c", "user.email=lablib@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture
def fresh(tmp_path, project):
    """Colab as a reader meets it."""
    return Colab(tmp_path / "colab", project)


@pytest.fixture(scope="session")
def colab(tmp_path_factory, project):
    """One that several labs run on, one after the other."""
    return Colab(tmp_path_factory.mktemp("colab"), project)


@pytest.fixture
def crowd():
    """How many processes wait for each core: what else runs here makes all slower."""
    return max(1, os.getloadavg()[0] / os.cpu_count())


@pytest.fixture
def stopwatch():
    """Seconds since the last call."""
    last = time.perf_counter()

    def lap():
        nonlocal last
        last, before = time.perf_counter(), last
        return last - before

    return lap


def pytest_terminal_summary(terminalreporter):
    """What was measured, from all workers."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    rows = sorted(row for report in reports for row in report.user_properties)
    for name, value in rows:
        terminalreporter.write_line(f"{name:38} {value}")
