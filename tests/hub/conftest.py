"""A JupyterHub on loopback, from the configuration file that instructors carry away."""

import pytest

from lablib.paths import project_dir

CONFIG = project_dir() / "binder" / "jupyterhub_config.py"
SMOKE = f"""
load_subconfig({CONFIG.name!r}, path={str(CONFIG.parent)!r})
c = get_config()
c.Spawner.environment["LABLIB_TIER"] = "smoke"
"""


@pytest.fixture(scope="session")
def overlay(tmp_path_factory):
    """Write a configuration: the house's at the smoke tier, and more lines."""

    def write(more=""):
        path = tmp_path_factory.mktemp("config") / "jupyterhub_config.py"
        path.write_text(SMOKE + more)
        return path

    return write


@pytest.fixture(scope="session")
def running(overlay, tmp_path_factory):
    """One hub for all tests; stopped at the end."""
    from lablib.hub.running import hub

    with hub(tmp_path_factory.mktemp("hub"), config=overlay()) as found:
        yield found


@pytest.fixture(scope="session")
def student(running):
    """A student by name, logged in, server started, labs there; each once."""
    from lablib.hub.client import Student

    known = {}

    def enter(name):
        if name not in known:
            known[name] = Student(running.url, name, running.password)
            known[name].start()
            known[name].pull(running.labs)
        return known[name]

    return enter
