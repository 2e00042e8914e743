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


def labs_dir() -> Path:
    """The notebooks: `labs/` of the checkout, else the wheel's copy."""
    root = project_dir()
    return root / "labs" if root else PACKAGE / "_labs"


def cache_dir() -> Path:
    """What set-up fetches and converts: `$LABLIB_HOME`, else the user's cache folder.

    Raises ValueError for a relative LABLIB_HOME, which each lab, run in its own folder, would take
    for another place.
    """
    if home := os.environ.get("LABLIB_HOME"):
        path = Path(home).expanduser()
        if not path.is_absolute():
            raise ValueError(
                f"LABLIB_HOME is {home!r}, another place from each folder that labs run in: "
                f"give a whole path, such as {path.absolute()}"
            )
        return path
    user = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its standard: ignored when relative
    return (user if user.is_absolute() else Path.home() / ".cache") / "lablib"


def notebooks() -> list[Path]:
    """The labs' files, sorted; what Jupyter keeps beside them in hidden folders is none."""
    labs = project_dir() / "labs"
    found = (path.relative_to(labs) for path in labs.rglob("*.ipynb"))
    return sorted(labs / path for path in found if not any(p.startswith(".") for p in path.parts))
