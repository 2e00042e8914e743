"""Run a lab headless and write what it measured to data/results."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat

from lablib.evidence import tiers
from lablib.evidence.fingerprints import notebook_hash
from lablib.evidence.studies import Study, versions
from lablib.files import atomic_write, write_json
from lablib.papers import Paper

# The notebook's last cell while it is verified: what its kernel saw, written to a file.
_PROBE = """
import json, pathlib, sys
device = None
if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
    device = sys.modules["torch"].cuda.get_device_name()
from lablib.evidence.studies import opened_content
from lablib.resources import peak_memory
peak = peak_memory()
seen = {{"peak_gb": peak and peak / 1e9, "device": device, "content": opened_content()}}
pathlib.Path({path!r}).write_text(json.dumps(seen))
"""


class LabFailed(RuntimeError):
    """A cell of the lab raised; the message holds its error."""


def run(path: Path, tier: str, *, timeout: int = 1800) -> tuple[nbformat.NotebookNode, dict]:
    """Run every cell of a notebook at `tier` in a new kernel.

    Returns the notebook with its outputs, and what was seen: seconds, peak_gb, device, content
    (SHA-256 of what was opened), verdicts. Raises LabFailed when a cell does.
    """
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as scratch:
        record, probe = Path(scratch) / "verdicts.jsonl", Path(scratch) / "seen.json"
        book.cells.append(nbformat.v4.new_code_cell(_PROBE.format(path=str(probe))))
        settings = {"LABLIB_TIER": tier, "LABLIB_STATIC": "1", "LABLIB_RECORD": str(record)}
        start = time.perf_counter()
        _execute(book, path, settings, timeout)
        seconds = time.perf_counter() - start
        rows = record.read_text("utf-8").splitlines() if record.is_file() else []
        seen = json.loads(probe.read_text("utf-8"))
    book.cells.pop()
    return book, seen | {"seconds": seconds, "verdicts": [json.loads(row) for row in rows]}


def _execute(book: nbformat.NotebookNode, path: Path, settings: dict, timeout: int) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(
        book,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
    )
    try:
        # The kernel's own log is dropped; what cells print to stderr comes another way.
        client.execute(env={**os.environ, **settings}, stderr=subprocess.DEVNULL)
    except CellExecutionError as error:
        raise LabFailed(f"{path.name} failed:\n{error}") from None


def verify(paper: Paper, tier: str, *, save: bool = False) -> dict[str, Any]:
    """Run a paper's lab at `tier`; return its result and write it unless the tier is smoke.

    save: store the outputs in the notebook. Raises LabFailed when a cell fails, or a claim of the
    paper was judged never or twice; FileNotFoundError when the paper has no lab yet.
    """
    path = paper.paths["lab"]
    if not path.is_file():
        raise FileNotFoundError(f"{paper.slug} has no lab yet ({path.name})")
    book, seen = run(path, tier)
    ids = [verdict["claim"] for verdict in seen["verdicts"]]
    asides = [claim.id for claim in paper.claims if claim.aside]
    if wrong := [c.id for c in paper.claims if ids.count(c.id) != (c.id not in asides)]:
        raise LabFailed(f"{path.name} ran, but did not judge once each: {', '.join(wrong)}")
    verdicts = Study(paper).verdicts() if asides else []
    seen["verdicts"] += [asdict(verdict) for verdict in verdicts if verdict.claim in asides]
    result = {
        "slug": paper.slug,
        "tier": tier,
        "code": notebook_hash(path),
        "claims": seen["verdicts"],
        "seconds": round(seen["seconds"], 1),
        "peak_gb": seen["peak_gb"] and round(seen["peak_gb"], 2),
        "device": seen["device"] or f"{os.cpu_count()} CPU cores",
        "machine": f"{platform.system()} {platform.machine()}",
        "content": seen["content"],
        "versions": versions(),
    }
    if save:
        write_notebook(path, book)
    if tier != "smoke":
        write_json(paper.paths["result"], result)
    return result


def verify_each(papers: Sequence[Paper], tier: str, workers: int = 2) -> list[str]:
    """Verify labs `workers` at a time, outputs stored; the slugs of those that failed."""

    def one(paper: Paper) -> bool:
        command = [sys.executable, "-m", "lablib", "verify", paper.slug, "--tier", tier, "--save"]
        return subprocess.run(command).returncode == 0

    with ThreadPoolExecutor(workers) as pool:
        return [paper.slug for paper, good in zip(papers, pool.map(one, papers)) if not good]


def write_notebook(path: Path, book: nbformat.NotebookNode) -> None:
    """Store a notebook with its outputs, without widget state and standard error."""
    book.metadata.pop("widgets", None)
    book.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    book.metadata["language_info"] = {"name": "python"}
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _stays(output)]
    with atomic_write(path) as temporary:
        nbformat.write(book, temporary)


def _stays(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stdout"
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def budget_line(name: str, tier: str, seconds: float, peak_gb: float | None) -> str:
    """One line: what a lab took beside its tier's budget."""
    limit, memory = tiers.BUDGETS[tier]
    fits = seconds <= limit and (peak_gb or 0) <= memory
    peak = "unknown" if peak_gb is None else f"{peak_gb:.2f} GB"
    mark = "ok  " if fits else "OVER"
    return f"{mark} {name:34} {tier:5} {seconds:6.1f} s of {limit:g} s, {peak} of {memory:g} GB"


if sys.platform == "win32":  # zmq needs the selector loop there
    import asyncio

    asyncio.set_event_loop_policy(asyncio.WindowsSelectorEventLoopPolicy())
