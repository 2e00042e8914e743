"""The table of what a hub takes, as binder/README.md has it: `lablib.hub.figures` measures it."""

import json
from statistics import median
from typing import Any

from lablib.paths import data_dir

STORED = data_dir() / "measured" / "hub.json"


def stored() -> dict[str, Any]:
    """What was measured last."""
    return json.loads(STORED.read_text("utf-8"))


def table(measured: dict[str, Any], peaks: list[float]) -> str:
    """What was measured, in Markdown. peaks: of each lab's kernel in GB, from its own result."""
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
