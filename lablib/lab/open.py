"""`make lab`: JupyterLab on loopback, token on, at the start page."""

import os
import sys

from lablib.paths import project_dir


def has_display() -> bool:
    """Whether a browser window can be opened here."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def command() -> list[str]:
    """JupyterLab's command line; without a display it prints the address and opens nothing."""
    start = "labs/00-start-here.ipynb"
    line = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--ip=127.0.0.1",
        f"--LabApp.default_url=/lab/tree/{start}",
    ]
    line += [
        f"--ServerApp.root_dir={project_dir()}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    if os.name == "posix" and os.geteuid() == 0:
        line.append("--allow-root")
    return line if has_display() else [*line, "--no-browser"]


if __name__ == "__main__":
    os.execv(sys.executable, command())
