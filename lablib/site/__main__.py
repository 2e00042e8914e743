"""`make site`: stage the labs, have Sphinx build them, and say how long it took."""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lablib.papers import papers
from lablib.site.stage import stage

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the site; Sphinx's exit status, which is 1 after any warning."""
    parser = argparse.ArgumentParser(prog="python -m lablib.site", description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("build/site"), metavar="FOLDER")
    parser.add_argument("--jobs", default="auto", metavar="N", help="processes, or auto")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        status = build(options.to, options.jobs)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if status == 0:
        print(_told(options.to, time.perf_counter() - start))
    return status


def build(folder: Path, jobs: str = "auto") -> int:
    """Stage the labs beside `folder` and build them into it; Sphinx's exit status.

    jobs: processes to read and write with. Raises FileNotFoundError outside of a checkout, and
    RuntimeError without Sphinx.
    """
    if importlib.util.find_spec("sphinx") is None:
        raise RuntimeError(
            "Sphinx is missing: use `make site`, or, with Python 3.11 or later, "
            "pip install -c constraints.txt -e '.[site]'"
        )
    from sphinx.cmd.build import main as sphinx

    source, trees = (folder.with_name(f"{folder.name}-{what}") for what in ("source", "doctrees"))
    for slug in stage(source):
        print(f"the frames of {slug} are older than its lab: `python -m lablib frames {slug}`")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-j", jobs]
    return sphinx([*options, "-c", str(HERE), "-d", str(trees), str(source), str(folder)])


def _told(folder: Path, seconds: float) -> str:
    labs = sum(row.present for row in papers()) + 1
    pages = sum(1 for _ in folder.rglob("*.html"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    whole = seconds * (len(papers()) + 1) / labs
    return (
        f"{folder}: {labs} labs, {pages} pages, {size:.0f} MB in {seconds:.0f} s "
        f"({seconds / labs:.1f} s a lab; {whole / 60:.1f} minutes for {len(papers()) + 1} at that)"
    )


if __name__ == "__main__":
    sys.exit(main())
