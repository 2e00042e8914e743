"""Where things are: the project's own files, and the cache for what set-up fetches."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def project_dir() -> Path | None:
    """The checkout that this package lies in, or None when lablib is installed from a wheel."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "labs").is_dir() else None


def data_dir() -> Path:
    """The project's own small inputs: `data/` of the checkout, else the wheel's copy."""
    root = project_dir()
    return root / "data" if root else PACKAGE / "_data"


def cache_dir() -> Path:
    """What set-up fetches and converts: `$LABLIB_HOME`, else the user's cache folder."""
    home = os.environ.get("LABLIB_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lablib"
