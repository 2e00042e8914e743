"""The labs as a git repository of their own, which students' copies are pulled from."""

import os
import subprocess
from pathlib import Path

IDENTITY = ("-c", "user.name=lablib", "-c", "user.email=lablib@localhost")


def publish(labs: Path, repository: Path, ignored: Path | None = None) -> bool:
    """Commit the labs, as they are now, to branch main of a bare repository; whether any changed.

    labs: the folder whose content becomes the repository's. ignored: a .gitignore for it. The
    repository is made when it is not there. Raises RuntimeError with git's words when git fails.
    """
    if not (repository / "HEAD").exists():
        repository.parent.mkdir(parents=True, exist_ok=True)
        git("init", "--quiet", "--bare", "--initial-branch=main", str(repository))
    places = {"GIT_DIR": str(repository), "GIT_WORK_TREE": str(labs)}
    exclude = ["-c", f"core.excludesFile={ignored}"] if ignored else []
    git(*exclude, "add", "--all", ".", folder=labs, **places)
    if not git("status", "--porcelain", "--untracked-files=no", folder=labs, **places):
        return False
    git(*IDENTITY, "commit", "--quiet", "-m", "The labs of the course", folder=labs, **places)
    return True


def git(*arguments: str, folder: Path | None = None, **environment: str) -> str:
    """What git prints. Raises RuntimeError with its words when it fails."""
    command = ["git", *arguments]
    variables = {**os.environ, **environment}
    ran = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"git {arguments[0]} failed: {ran.stderr.strip()}")
    return ran.stdout
