"""`make hub-figures`: what a hub takes of its machine, and how long a student waits.

Measures on this machine, writes data/measured/hub.json, and renders it into binder/README.md.
"""

import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import psutil

from lablib.chromium import chromium
from lablib.evidence.coverage import update
from lablib.files import write_json
from lablib.hub.client import Student
from lablib.hub.page import first_picture, log_in
from lablib.hub.running import Hub, hub
from lablib.hub.table import STORED

STUDENTS = ("ada", "alan", "emmy", "grace", "kurt")
START = "labs/00-start-here.ipynb"


def main() -> None:
    """Measure, store, render."""
    with tempfile.TemporaryDirectory(prefix="hub-") as folder, hub(Path(folder)) as running:
        measured = {"cores": os.cpu_count(), **waits(running), **memory(running)}
    write_json(STORED, measured)
    for path in update():
        print(f"{path.name} in {path.parent.name} updated")


def waits(running: Hub) -> dict[str, list[float]]:
    """Seconds from the login form to the start page's first picture, in a browser without cache.

    first: the server is started and the labs are copied; again: the server runs, the labs are
    updated. One of each a student, one student after the other.
    """
    found: dict[str, list[float]] = {"first": [], "again": []}
    with chromium() as browser:
        for name in STUDENTS:
            for seconds in found.values():
                context = browser.new_context(viewport={"width": 1280, "height": 900})
                page = context.new_page()
                start = time.monotonic()
                log_in(page, running, name)
                first_picture(page)
                seconds.append(round(time.monotonic() - start, 2))
                context.close()
            Student(running.url, name, running.password).stop()
    return found


def memory(running: Hub) -> dict[str, float]:
    """Megabytes: the hub with its proxy, a student's server, a kernel, one after the start page."""
    found: dict[str, list[float]] = {"server_mb": [], "kernel_mb": [], "start_page_mb": []}
    for name in STUDENTS[:3]:
        student = Student(running.url, name, running.password)
        student.start()
        student.pull(running.labs)
        server = running.server(name)
        found["server_mb"].append(_own([server]))
        book = student.read(START)
        with student.kernel(START) as run:
            run("import lablib")
            found["kernel_mb"].append(_own(server.children()))
            for cell in (cell for cell in book.cells if cell.cell_type == "code"):
                run(cell.source)
            found["start_page_mb"].append(_own(server.children()))
    rest = psutil.Process(running.process.pid)
    servers = {running.server(name) for name in STUDENTS[:3]}
    around = [rest, *(process for process in rest.children() if process not in servers)]
    return {"hub_mb": _own(around), **{name: round(mean(row), 1) for name, row in found.items()}}


def _own(processes: Iterable[psutil.Process]) -> float:
    """Megabytes that nothing else has, of processes together: what one more of them adds."""
    return round(sum(process.memory_full_info().uss for process in processes) / 1e6, 1)


if __name__ == "__main__":
    main()
