"""`make hub-figures`: what a hub takes of its machine, and how long a student waits.

Measures on this machine, writes data/measured/hub.json, and renders it into binder/README.md.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

from lablib.evidence.coverage import states
from lablib.files import atomic_write, write_json
from lablib.hub.client import Student
from lablib.hub.page import chromium, first_picture, log_in
from lablib.hub.running import Hub, hub
from lablib.paths import data_dir, project_dir

BEGIN, END = "<!-- hub: begin -->", "<!-- hub: end -->"
STUDENTS = ("ada", "alan", "emmy", "grace", "kurt")
START = "labs/00-start-here.ipynb"


def main() -> None:
    """Measure, store, render; prints the table."""
    with tempfile.TemporaryDirectory(prefix="hub-") as folder, hub(Path(folder)) as running:
        measured = {"cores": os.cpu_count(), **waits(running), **memory(running)}
    write_json(data_dir() / "measured" / "hub.json", measured)
    readme = project_dir() / "binder" / "README.md"
    with atomic_write(readme) as new:
        new.write_text(between_markers(readme.read_text("utf-8"), table(measured)), "utf-8")
    print(table(measured))


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


def table(measured: dict[str, Any]) -> str:
    """What was measured, in Markdown; the labs' kernels from their own results."""
    peaks = [row.result["peak_gb"] for row in states() if row.result]
    student = measured["server_mb"] / 1000
    most = student + max(peaks)
    rows = {
        "hub, proxy and culler together": f"{measured['hub_mb']:.0f} MB",
        "a student's server, no notebook running": f"{measured['server_mb']:.0f} MB",
        "a kernel that has imported lablib": f"{measured['kernel_mb']:.0f} MB",
        "a kernel after lab 00": f"{measured['start_page_mb']:.0f} MB",
        "a kernel in a lab with a paper, at its peak": f"{min(peaks):.1f} to {max(peaks):.1f} GB",
        "so a student with one lab open, at most": f"{most:.1f} GB",
        "from the login to the first picture, first time": _times(measured["first"]),
        "the same, when the student's server runs": _times(measured["again"]),
    }
    lines = [f"| on {measured['cores']} cores | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {what} | {figure} |" for what, figure in rows.items())])


def _times(seconds: list[float]) -> str:
    return f"{median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"


def between_markers(text: str, made: str) -> str:
    """The text with a table between the hub's markers. Raises ValueError without them."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"binder/README.md lacks {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{made}\n{END}{rest.split(END, 1)[1]}"


def stored() -> dict[str, Any]:
    """What was measured last."""
    return json.loads((data_dir() / "measured" / "hub.json").read_text("utf-8"))


if __name__ == "__main__":
    main()
