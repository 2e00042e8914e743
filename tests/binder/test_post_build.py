"""The image's steps in a new environment: repo2docker's packages, ours, postBuild, and start.

Instead of conda, pip installs what environment.yml and repo2docker name: the versions are theirs.
"""

import importlib.resources
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

from lablib.paths import project_dir

pytestmark = pytest.mark.binder

ROOT = project_dir()
LABS = ("302", "701", "1001")  # a corpus; a task and SmolLM2; the largest model
BASE = ["ipywidgets", "jupyter-resource-usage", "jupyter_server", "jupyterhub", "jupyterlab"]
BASE += ["notebook", "setuptools"]


def python_of_the_image():
    """The Python that environment.yml names."""
    (version,) = re.findall(r"python=([\d.]+)", (ROOT / "binder/environment.yml").read_text())
    path = shutil.which(f"python{version}")
    assert path, f"environment.yml has Python {version}: install it, and put it on the PATH"
    return path, version


def packages_of_repo2docker(version):
    """What it puts into every image, from its own list, as pip names it."""
    folder = importlib.resources.files("repo2docker") / "buildpacks/conda"
    lock = (folder / f"environment.py-{version}-linux-64.lock").read_text()
    lock = lock.replace("/jupyterhub-base-", "/jupyterhub-")
    versions = {name: re.search(rf"/{name}-([\d.]+)-", lock) for name in BASE}
    return [f"{name}=={found[1]}" for name, found in versions.items()]


def packages_of_the_environment():
    """What pip calls the packages that environment.yml takes from conda, Python apart."""
    (torch,) = re.findall(r"pytorch-cpu=([\d.]+)", (ROOT / "binder/environment.yml").read_text())
    return [f"torch=={torch}"]


def size(*folders):
    """In GB."""
    files = (path for folder in folders for path in folder.rglob("*") if not path.is_symlink())
    return sum(path.stat().st_size for path in files if path.is_file()) / 1e9


class Image:
    """A folder for each of the image's: environment, home with the project in it."""

    def __init__(self, folder):
        self.environment, self.home = folder / "environment", folder / "home"
        self.figures = {}
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("LABLIB_", "JUPYTER"))}
        path = f"{self.environment / 'bin'}:{os.environ['PATH']}"
        self.variables = {**keep, "PATH": path, "HOME": str(self.home), "PYTHONUNBUFFERED": "1"}

    def run(self, *command, what=""):
        """Run to the end in the project's folder; `what` notes the minutes."""
        start = time.perf_counter()
        ran = subprocess.run(
            command, cwd=self.home, env=self.variables, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"
        if what:
            self.figures[f"{what}, minutes"] = round((time.perf_counter() - start) / 60, 1)
        return ran.stdout

    def offline(self, *command):
        """Run as a reader's container would, with no network but its own loopback."""
        alone = 'ip link set lo up && exec "$@"'
        return self.run("unshare", "--net", "--map-root-user", "bash", "-c", alone, "-", *command)


@pytest.fixture(scope="module")
def image(tmp_path_factory, copy_project):
    made = Image(tmp_path_factory.mktemp("image"))
    copy_project(made.home)
    shutil.rmtree(made.home / "tests")
    python, version = python_of_the_image()
    subprocess.run([python, "-m", "venv", made.environment], check=True)
    install = ["pip", "install", "--quiet", "--no-cache-dir"]
    made.run(*install, *packages_of_repo2docker(version))
    base = size(made.environment)
    made.run(*install, *packages_of_the_environment(), what="environment.yml")
    made.figures["environment.yml, GB"] = size(made.environment) - base
    print(made.run("binder/postBuild", what="postBuild"))
    made.figures["postBuild's packages, GB"] = (
        size(made.environment) - base - made.figures["environment.yml, GB"]
    )
    cache = made.home / ".cache"
    made.figures["corpora, tasks and models, GB"] = size(cache)
    made.figures["all that we add, GB"] = size(made.environment, made.home) - base
    yield made
    lines = [f"{what:34} {figure:.1f}" for what, figure in made.figures.items()]
    print("\n".join(lines))
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build/binder.json").write_text(json.dumps(made.figures, indent=1))


def test_nothing_is_left_that_was_only_for_building(image):
    cache = image.home / ".cache"
    assert not (cache / "pip").exists() and not (cache / "lablib/packages").exists()
    assert [path.name for path in cache.iterdir()] == ["lablib"]


def test_packages_fit_each_other(image):
    image.run("pip", "check")
    have = dict(re.findall(r"^(\S+)==(\S+)$", image.run("pip", "freeze"), re.MULTILINE))
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    for name in ("jupyterlab", "jupyterhub", "nbgitpuller", "numpy", "plotly", "transformers"):
        assert re.search(rf"^{name}=={re.escape(have[name])}\b", constraints, re.MULTILINE), name
    assert have["torch"].endswith("+cpu") and not any("nvidia" in name for name in have)


@pytest.mark.parametrize("lab", LABS)
def test_a_lab_runs_without_a_network(lab, image):
    image.variables["LABLIB_TIER"] = "smoke"
    command = ["binder/start", "python", "-m", "lablib", "verify", lab, "--tier", "smoke"]
    print(image.offline(*command).splitlines()[-1])


def test_setup_finds_everything_there(image):
    out = image.offline("binder/start", "python", "-m", "lablib", "setup")
    assert re.fullmatch(r"\d+ corpora, tasks and models are ready\n", out)


def test_a_hub_can_start_it(image):
    server = image.run("binder/start", "jupyterhub-singleuser", "--version").strip()
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    assert f"jupyterhub=={server}" in constraints.splitlines(), "as the hub's own"
    image.run("python", "-c", "import nbgitpuller, jupyterhub")


def test_start_opens_the_labs(image):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = ["binder/start", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--allow-root"]
    variables = image.variables | {"JUPYTER_TOKEN": token}
    start = time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=image.home, env=variables, **quiet)
    try:
        address = f"http://127.0.0.1:{port}/api/contents/labs/00-start-here.ipynb?token={token}"
        found = json.loads(answer(address, server))
        assert found["type"] == "notebook"
        image.figures["start, seconds"] = time.perf_counter() - start
    finally:
        server.terminate()
        server.wait(timeout=30)


def answer(address, server, seconds=120):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        assert server.poll() is None, "JupyterLab stopped before it was ready"
        try:
            return urllib.request.urlopen(address, timeout=10).read()
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no answer in {seconds} s")
