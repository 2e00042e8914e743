"""Which labs the browser drives: those that changed, else a tenth that rotates with the commit."""

import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from lablib.papers import papers
from lablib.paths import project_dir

TENTHS = 10
START = "labs/00-start-here.ipynb"


def choose(
    labs: Mapping[str, Collection[str]],
    environment: Mapping[str, str],
    changed: Collection[str] = (),
    commit: str = "",
) -> list[str]:
    """The labs to drive, the start page first.

    labs: each paper's notebook -> its files, all relative to the repository. changed: files that
    differ from the merge base with $LABLIB_BASE. commit: its hash, or "" where there is no git.
    """
    if environment.get("LABLIB_BASE"):
        picked = [lab for lab, files in labs.items() if {lab, *files} & set(changed)]
    elif environment.get("ALL") == "1":
        picked = list(labs)
    else:
        picked = list(labs)[int(commit or "0", 16) % TENTHS :: TENTHS]
    return [START, *picked]


def chosen(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """The notebooks to drive in this checkout. Raises CalledProcessError for an unknown base."""
    root, base = project_dir(), environment.get("LABLIB_BASE")
    labs = {
        _relative(row.paths["lab"], root): [_relative(path, root) for path in row.paths.values()]
        for row in papers()
        if row.present
    }
    changed = _changed(root, base) if base else []
    return [root / lab for lab in choose(labs, environment, changed, _commit(root))]


def _relative(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _changed(root: Path, base: str) -> Sequence[str]:
    """Files that differ from where this branch left `base`, uncommitted and new ones too."""
    fork = _git(root, "merge-base", base, "HEAD").strip()
    new = _git(root, "ls-files", "--others", "--exclude-standard")
    return [*_git(root, "diff", "--name-only", fork).splitlines(), *new.splitlines()]


def _commit(root: Path) -> str:
    try:
        return _git(root, "rev-parse", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(root: Path, *words: str) -> str:
    run = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return run.stdout
