"""Students of the demonstration: what each can't reach, and what the limits do."""

import os
import re
import time
from pathlib import Path

import psutil
import pytest
import requests

from lablib.course import fence
from lablib.hub.client import Student
from lablib.hub.running import hub
from lablib.paths import cache_dir, project_dir

pytestmark = pytest.mark.hub
NOTEBOOK = "labs/00-start-here.ipynb"
FENCED = pytest.mark.skipif(not fence.available(), reason="this system has no Landlock")


@pytest.fixture(scope="module")
def run(student):
    """Ada's kernel."""
    with student("ada").kernel(NOTEBOOK) as function:
        yield lambda code: "".join(output.get("text", "") for output in function(code))


@pytest.fixture(scope="module")
def places(running, student):
    """What is not Ada's: names for the code below."""
    student("alan").save("secret.ipynb", student("alan").read(NOTEBOOK))
    names = {
        "state": running.state,
        "alan": running.state / "users" / "alan",
        "cache": cache_dir(),
        "project": project_dir(),
        "hub": running.process.pid,
        "his": running.server("alan").pid,
    }
    assert Path(f"/proc/{names['his']}/environ").read_text(), "who runs the hub can"
    return "; ".join(f"{name} = {str(value)!r}" for name, value in names.items())


WAYS = {
    "another's notebook": "open(alan + '/secret.ipynb').read()",
    "through a shell": "from subprocess import *; run(['cat', f'{alan}/secret.ipynb'], check=True)",
    "writing there": "open(alan + '/x', 'w')",
    "the hub's secret": "open(state + '/cookie_secret', 'rb').read()",
    "its database": "open(state + '/hub.sqlite', 'rb').read()",
    "its log": "open(state + '/hub.log').read()",
    "its environment, with the password": "open('/proc/' + hub + '/environ').read()",
    "another's, with his token": "open('/proc/' + his + '/environ').read()",
    "another's memory": "open('/proc/' + his + '/mem', 'rb').read()",
    "ending his server": "import os; os.kill(int(his), 9)",
    "the shared cache": "open(cache + '/models/x', 'w')",
    "the package": "open(project + '/lablib/x.py', 'w')",
    "the labs of the course": "open(project + '/labs/00-start-here.ipynb', 'a')",
    "publishing": "open(state + '/labs.git/HEAD', 'a')",
}  # fmt: skip


@FENCED
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_no_way_leads_out_of_ones_own_home(way, run, places):
    with pytest.raises(
        RuntimeError, match=r"Permission ?Error|Operation not permitted|CalledProcess"
    ):
        run(f"{places}\n{way}")


def test_another_students_server_asks_for_their_token(running, student):
    ada = student("ada")
    with pytest.raises(requests.HTTPError) as refused:
        ada._ask("GET", f"{running.url}/user/alan/api/contents/secret.ipynb")
    assert refused.value.response.status_code in (403, 404)
    assert student("alan").read("secret.ipynb").cells


def test_a_wrong_password_is_refused(running):
    with pytest.raises(requests.HTTPError, match="ada was not let in"):
        Student(running.url, "ada", "a wrong one")


@pytest.mark.parametrize("name", ["../ada", "a/b", "..", "-x", "a b"])
def test_a_name_that_would_leave_the_folder_is_refused(name, running):
    with pytest.raises(requests.HTTPError):
        Student(running.url, name, running.password)


def test_a_lab_sees_the_course_from_the_students_copy(run, running):
    home = running.state / "users" / "ada"
    assert run("import os; print(os.getcwd(), os.environ['HF_HUB_OFFLINE'])") == f"{home}/labs 1\n"
    said = run(
        "from lablib.paths import cache_dir, project_dir\n"
        "from lablib.evidence.studies import study\n"
        "from lablib.papers import paper\n"
        "print(cache_dir(), project_dir(), len(study('switch-transformers').runs()) > 10)"
    )
    assert said == f"{home}/.cache/lablib {project_dir()} True\n"


def test_memory_beyond_the_limit_is_an_error_of_that_cell_alone(run):
    with pytest.raises(RuntimeError, match="MemoryError"):
        run("kept = 1; big = bytearray(3 * 2**30)")
    assert run("print(kept)") == "1\n"
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run("import torch; torch.ones(2**30)")
    assert run("print(torch.ones(2).sum().item())") == "2.0\n"


QUICK = """
c.JupyterHub.services[0]["command"] = [
    *c.JupyterHub.services[0]["command"][:-1], "--timeout=5", "--cull-every=1"
]
"""


def test_an_idle_server_is_culled_and_its_files_stay(overlay, tmp_path):
    with hub(tmp_path, config=overlay(QUICK)) as quick:
        ada = Student(quick.url, "ada", quick.password)
        ada.start()
        ada.pull(quick.labs)
        process, limit = quick.server("ada"), time.monotonic() + 60
        while ada.hub("GET", "users/ada").json()["servers"] and time.monotonic() < limit:
            time.sleep(0.5)
        assert not process.is_running(), "its server was stopped"
        assert "Culling server ada" in quick.log.read_text(), "by the culler"
        assert (tmp_path / "users" / "ada" / NOTEBOOK).is_file()
        ada.start()
        assert ada.read(NOTEBOOK).cells
    assert quick.process.returncode == 0


def test_when_the_hub_stops_nothing_of_it_runs_on(overlay, tmp_path):
    with hub(tmp_path, config=overlay()) as short:
        Student(short.url, "ada", short.password).start()
        tree = psutil.Process(short.process.pid).children(recursive=True)
        listening = [row for p in tree for row in p.net_connections() if row.status == "LISTEN"]
        assert len(tree) >= 3 and {row.laddr.ip for row in listening} == {"127.0.0.1"}
        assert not re.search(short.password, " ".join(word for p in tree for word in p.cmdline()))
        assert not os.stat(tmp_path / "cookie_secret").st_mode & 0o77
    assert [process for process in tree if process.is_running()] == []
