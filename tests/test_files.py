"""Files and folders are whole or not there, whoever writes and whatever happens."""

import os
import subprocess
import sys
import threading

import pytest

from lablib import files
from lablib.files import alone, atomic_write, scratch

NAMES = [f"part-{i}" for i in range(20)]


def write(folder, text):
    with atomic_write(folder) as new:
        new.mkdir()
        for name in NAMES:
            (new / name).write_text(text)


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)])


@pytest.mark.parametrize("exchanges", [True, False])
def test_two_writers_of_a_folder_leave_it_whole(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda new, path: False)
    folder = tmp_path / "model"
    write(folder, "0")
    workers = [
        threading.Thread(target=lambda text=text: [write(folder, text) for _ in range(40)])
        for text in "12"
    ]
    for worker in workers:
        worker.start()
    looks = []
    while any(worker.is_alive() for worker in workers):
        looks.append((folder / NAMES[0]).exists() and (folder / NAMES[-1]).exists())
    for worker in workers:
        worker.join()
    assert len(looks) > 20
    if exchanges and sys.platform == "linux":
        assert all(looks), f"{looks.count(False)} of {len(looks)} looks met no whole folder"
    assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
    assert len({path.read_text() for path in folder.iterdir()}) == 1, "of one writer alone"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_leaves_what_was_there(tmp_path):
    for kind in ("file", "folder"):
        path = tmp_path / kind
        write(path, "old") if kind == "folder" else path.write_text("old")
        with pytest.raises(FileNotFoundError), atomic_write(path) as new:
            (new / "half").write_text("of a folder that was not made")
        kept = path / NAMES[3] if kind == "folder" else path
        assert kept.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_folder_behind_a_link_is_replaced(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / NAMES[0]).read_text() == "new"


KILLED = """
import os, sys, pathlib
from lablib.files import atomic_write
with atomic_write(pathlib.Path(sys.argv[1]) / "step-1") as new:
    new.mkdir()
    (new / "weights").write_bytes(bytes(1000))
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_the_next_run_clears_what_a_killed_one_left(tmp_path):
    assert python(KILLED, tmp_path).returncode == -9
    (left,) = tmp_path.iterdir()
    assert (left / "weights").is_file()
    with scratch(tmp_path / "mine") as going_on:
        going_on.mkdir()
        code = "import sys; from lablib.files import write_json; write_json(sys.argv[1], 1)"
        assert python(code, tmp_path / "step-2").returncode == 0
        assert going_on.is_dir(), "this process still writes"
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "numbers").write_text("old")

    def write_to_a_full_disk():
        with atomic_write(tmp_path / "numbers"), open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    with pytest.raises(OSError, match=r"the disk is full: \S+ has no room for numbers"):
        write_to_a_full_disk()
    assert (tmp_path / "numbers").read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_others_can_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "folder") as new:
            new.mkdir()
            for name in ("private", "open"):
                (new / name).write_text("weights")
            (new / "private").chmod(0o600)
        with atomic_write(tmp_path / "file") as new:
            new.write_text("weights")
            new.chmod(0o600)
    finally:
        os.umask(before)
    found = [tmp_path / "folder" / "private", tmp_path / "folder" / "open", tmp_path / "file"]
    assert [oct(path.stat().st_mode & 0o777) for path in found] == ["0o640"] * 3


def test_one_thread_at_a_time_prepares(tmp_path):
    order = []

    def work():
        with alone(tmp_path / "x"):
            order.append("in")
            threading.Event().wait(0.02)
            order.append("out")

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert order == ["in", "out"] * 4
