"""repo2docker takes binder/ as it is meant; it asks no Docker for that."""

import re
import subprocess
import sys

import pytest

from lablib.paths import project_dir

ROOT = project_dir()


@pytest.fixture(scope="module")
def project(tmp_path_factory, copy_project):
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    return folder


@pytest.fixture(scope="module")
def dockerfile(project):
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(project)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Building conda environment for python=3.11" in ran.stdout + ran.stderr
    return ran.stdout


def test_our_three_files_are_in_its_order(dockerfile):
    steps = [
        "COPY --chown=0:0 src/binder/environment.yml",  # this layer is kept while it is the same
        'env update -p ${NB_PYTHON_PREFIX} --file "binder/environment.yml"',
        "COPY --chown=0:0 src/ ${REPO_DIR}/",
        "RUN ./binder/postBuild",
        'ENV R2D_ENTRYPOINT="${REPO_DIR}/binder/start"',
    ]
    places = [dockerfile.index(step) for step in steps]
    assert places == sorted(places)


def test_the_image_takes_what_a_reader_needs(project):
    from docker.utils.build import exclude_paths  # as repo2docker does

    for folder in (".git", ".venv/bin", "build", "labs/.ipynb_checkpoints"):
        (project / folder).mkdir(parents=True)
        (project / folder / "file").touch()
    lines = (ROOT / "binder/.dockerignore").read_text("utf-8").splitlines()
    taken = exclude_paths(str(project), [line for line in lines if line and line[0] != "#"])
    tops = {name.partition("/")[0] for name in taken}
    assert {"binder", "constraints.txt", "data", "lablib", "labs", "pyproject.toml"} <= tops
    assert not tops & {".git", ".venv", "build", "tests"}
    assert not any(".ipynb_checkpoints" in name for name in taken)


def test_versions_are_exact_and_those_of_the_tests():
    environment = (ROOT / "binder/environment.yml").read_text("utf-8")
    (torch,) = re.findall(r"pytorch-cpu=([\d.]+)", environment)
    constraints = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert f"torch=={torch}" in constraints
    assert "-c constraints.txt" in (ROOT / "binder/postBuild").read_text("utf-8")


@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_bash_can_read_it(name):
    path = ROOT / "binder" / name
    assert path.stat().st_mode & 0o111, "repo2docker runs it"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
