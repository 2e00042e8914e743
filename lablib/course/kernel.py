"""The kernel that a submission runs in: an ordinary one behind a fence."""

import os
import tempfile
from pathlib import Path

from lablib.course import fence
from lablib.lab import answering  # noqa: F401  imported before the exercises' folder is closed
from lablib.paths import PACKAGE, cache_dir, project_dir

COURSE = "LABLIB_COURSE"  # the course's folder, with its gradebook and the others' submissions


def closed(course: Path) -> list[Path]:
    """What a submission may not read: references and their history, and the course."""
    exercises = (PACKAGE / "exercises").iterdir()
    references = [path for path in exercises if path.name != "__init__.py"]
    root = project_dir()
    more = [root / ".git", root / "tests"] if root else []
    return [course, *references, *(path for path in more if path.exists())]


def main() -> None:
    """Start the kernel as its connection file, on the command line, says."""
    from ipykernel.kernelapp import launch_new_instance

    if fence.available():
        # The cache holds data, no code; a lab may add a tokenizer's encoding of a corpus to it.
        places = [Path(tempfile.gettempdir()), Path("/dev"), cache_dir()]
        fence.enclose(closed(Path(os.environ[COURSE])), places, [Path.cwd(), *places])
    launch_new_instance()
