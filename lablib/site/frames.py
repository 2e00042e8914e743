"""Frames as they are stored, in data/frames/SLUG.json.gz: recorded from a lab, read by the site.

An explorer's frames share most of what they show. So each trace, each part of a layout and each
text is kept once, in a pool, and a frame is a list of places in it.
"""

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lablib.evidence.fingerprints import notebook_hash
from lablib.files import atomic_write
from lablib.lab.figures import PLOTLY
from lablib.lab.frames import KIND
from lablib.papers import Paper
from lablib.paths import data_dir

LIMIT = 150_000  # bytes of a lab's file
DIGITS = 6  # significant ones: a picture shows no more


def path_of(paper: Paper) -> Path:
    """Where the frames of a paper's lab are stored."""
    return data_dir() / "frames" / f"{paper.slug}.json.gz"


def fingerprint(lab: Path) -> str:
    """Of what a lab's pictures come from: its own code, and what that reaches in lablib."""
    cells = json.loads(lab.read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code = [text for text in code if "%pip" not in text]  # what installs lablib draws nothing
    own = hashlib.sha256(json.dumps(code).encode()).hexdigest()
    return f"{notebook_hash(lab)}-{own[:16]}"


def record(paper: Paper, tier: str) -> str:
    """Run a lab at `tier`, store its explorers' frames; one line on what was stored.

    Raises FileNotFoundError when the paper has no lab, LabFailed when a cell fails.
    """
    from lablib.evidence.verify import run

    lab = paper.paths["lab"]
    if not lab.is_file():
        raise FileNotFoundError(f"{paper.slug} has no lab yet ({lab.name})")
    code = fingerprint(lab)
    os.environ["LABLIB_FRAMES"] = "1"
    try:
        book, _ = run(lab, tier)
    finally:
        del os.environ["LABLIB_FRAMES"]
    return write(path_of(paper), code, dict(_recorded(book)))


def _recorded(book: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("CELL:OUTPUT", packed frames) for each explorer of a run notebook that can be moved."""
    for cell in book["cells"]:
        for place, output in enumerate(cell.get("outputs", ())):
            made = output.get("data", {}).get(KIND)
            if made and len(made["frames"]) > 1:
                yield f"{cell['id']}:{place}", packed(made)


def write(path: Path, code: str, explorers: dict[str, dict[str, Any]]) -> str:
    """Store explorers, without the largest ones where they are more than LIMIT; one line on it."""
    kept = dict(sorted(explorers.items(), key=lambda item: len(json.dumps(item[1]))))
    while len(stored := _compressed({"code": code, "explorers": kept})) > LIMIT:
        kept.popitem()
    with atomic_write(path) as temporary:
        temporary.write_bytes(stored)
    left = [key for key in explorers if key not in kept]
    count = sum(len(made["frames"]) for made in kept.values())
    line = f"{path.name}: {len(kept)} explorers, {count} frames, {len(stored) / 1000:.0f} KB"
    return line + (f"; too large and left out: {', '.join(left)}" if left else "")


def _compressed(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return gzip.compress(text.encode(), 9, mtime=0)


def load(paper: Paper) -> dict[str, dict[str, Any]]:
    """ "CELL:OUTPUT" -> packed frames; none where none are stored, or the lab has changed since.

    Raises ValueError for a file that can't be read.
    """
    path = path_of(paper)
    if not path.is_file():
        return {}
    try:
        stored = json.loads(gzip.decompress(path.read_bytes()))
        return stored["explorers"] if stored["code"] == fingerprint(paper.paths["lab"]) else {}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} can't be read ({error}): record it again with "
            f"`python -m lablib frames {paper.slug}`"
        ) from None


def packed(made: Mapping[str, Any]) -> dict[str, Any]:
    """`controls`, `pool` and `frames` of recorded frames.

    A frame has `data` and `layout` of a figure, or `html`, and `alt`: places in the pool.
    """
    pool: dict[str, int] = {}

    def place(value: Any) -> int:
        return pool.setdefault(json.dumps(plain(value), ensure_ascii=False), len(pool))

    frames = [_frame(bundle, place) for bundle in made["frames"]]
    return {**made, "pool": [json.loads(text) for text in pool], "frames": frames}


def _frame(bundle: Mapping[str, Any], place: Any) -> dict[str, Any]:
    if PLOTLY not in bundle:
        return {"html": place(bundle.get("text/html", ""))}
    figure = bundle[PLOTLY]
    layout = {key: place(value) for key, value in figure["layout"].items()}
    alt = place(bundle.get("text/plain", ""))
    return {"data": [place(trace) for trace in figure["data"]], "layout": layout, "alt": alt}


def plain(value: Any) -> Any:
    """A part of a figure's JSON with packed arrays as lists, and numbers of DIGITS digits."""
    if isinstance(value, dict) and "bdata" in value:
        return plain(_array(value).tolist())
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _array(value: Mapping[str, Any]) -> np.ndarray:
    """An array as plotly.py packs it into JSON."""
    array = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
    shape = value.get("shape", "")
    return array.reshape([int(n) for n in str(shape).split(",")]) if shape else array
