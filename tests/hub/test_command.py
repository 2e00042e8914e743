"""`make hub`: what it prints, and that Ctrl-C ends all of it."""

import re
import signal
import subprocess
import sys

import psutil
import pytest

from lablib.hub.client import Student
from lablib.hub.running import free_port

pytestmark = pytest.mark.hub


def test_it_says_how_to_get_in_and_ends_with_ctrl_c(tmp_path):
    port = free_port()
    words = [sys.executable, "-m", "lablib.hub", "--port", str(port), "--state", str(tmp_path)]
    command = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    said = "".join(command.stdout.readline() for _ in range(5))
    try:
        name, password = (re.search(rf"{word}: +(\S+)", said)[1] for word in ("user", "password"))
        assert f"http://127.0.0.1:{port}\n" in said and "Ctrl-C" in said, said
        Student(f"http://127.0.0.1:{port}", name, password).start()
        again = subprocess.run(words, capture_output=True, text=True)
        assert again.returncode == 2 and again.stderr.startswith(f"port {port} is in use")
        tree = psutil.Process(command.pid).children(recursive=True)
        assert len(tree) >= 4, "the hub, its proxy, its culler and the student's server"
    finally:
        command.send_signal(signal.SIGINT)
    assert command.wait(timeout=120) == 0
    assert command.stdout.read().startswith("stopped; students' files stay in")
    assert [process for process in tree if process.is_running()] == []
