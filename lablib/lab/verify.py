"""Run a lab headless and write what it measured to data/results."""

import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nbformat

from lablib.files import atomic_write, write_json
from lablib.lab import tiers
from lablib.papers import Paper

PACKAGES = ("torch", "lightning", "transformers", "numpy", "scipy", "plotly", "ipywidgets")
# A result is stale when the code that made it changed; how a figure is drawn does not matter.
IGNORED = ("lablib.lab", "lablib.exercises", "lablib.papers", "lablib.paths", "lablib.files")
KEPT = ("lablib.lab.claims", "lablib.lab.intervals")
_PROBE = """
import json, sys
device = None
if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
    device = sys.modules["torch"].cuda.get_device_name()
names = sorted(name for name in sys.modules if name.split(".")[0] == "lablib")
from lablib.resources import peak_memory  # after the names, which it is none of
peak = peak_memory()
peak = peak and peak / 1e9
print("LABLIB" + json.dumps({"peak_gb": peak, "device": device, "modules": names}))
"""


class LabFailed(RuntimeError):
    """A cell of the lab raised; the message holds its error."""


def run(path: Path, tier: str, *, timeout: int = 1800) -> tuple[nbformat.NotebookNode, dict]:
    """Run every cell of a notebook at `tier` in a new kernel.

    Returns the notebook with its outputs, and what was seen: seconds, peak_gb, device, modules,
    verdicts. Raises LabFailed when a cell does.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book = nbformat.read(path, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(_PROBE))
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "verdicts.jsonl"
        settings = {"LABLIB_TIER": tier, "LABLIB_STATIC": "1", "LABLIB_RECORD": str(record)}
        client = NotebookClient(
            book,
            timeout=timeout,
            kernel_name="python3",
            resources={"metadata": {"path": str(path.parent)}},
            record_timing=False,
            store_widget_state=False,
        )
        start = time.perf_counter()
        try:
            # The kernel's own log is dropped; what cells print to stderr comes another way.
            client.execute(env={**os.environ, **settings}, stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            raise LabFailed(f"{path.name} failed:\n{error}") from None
        seconds = time.perf_counter() - start
        rows = record.read_text("utf-8").splitlines() if record.is_file() else []
    seen = _probe_output(book.cells.pop())
    return book, seen | {"seconds": seconds, "verdicts": [json.loads(row) for row in rows]}


def _probe_output(cell: nbformat.NotebookNode) -> dict:
    text = "".join(output.get("text", "") for output in cell.outputs)
    return json.loads(text.split("LABLIB", 1)[1])


def verify(paper: Paper, tier: str, *, save: bool = False) -> dict:
    """Run a paper's lab at `tier`; return its result and write it unless the tier is smoke.

    save: store the outputs in the notebook. Raises LabFailed, or FileNotFoundError when the paper
    has no lab yet.
    """
    path = paper.paths["lab"]
    if not path.is_file():
        raise FileNotFoundError(f"{paper.slug} has no lab yet ({path.name})")
    book, seen = run(path, tier)
    judged = {verdict["claim"] for verdict in seen["verdicts"]}
    missing = [claim.id for claim in paper.claims if claim.id not in judged]
    if missing:
        raise LabFailed(f"{path.name} ran, but judged no claim called {', '.join(missing)}")
    modules = [name for name in seen["modules"] if _counts(name)]
    result = {
        "slug": paper.slug,
        "tier": tier,
        "claims": seen["verdicts"],
        "seconds": round(seen["seconds"], 1),
        "peak_gb": seen["peak_gb"] and round(seen["peak_gb"], 2),
        "device": seen["device"] or f"{os.cpu_count()} CPU cores",
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": _versions(),
        "modules": modules,
        "hash": fingerprint(paper, modules),
    }
    if save:
        write_notebook(path, book)
    if tier != "smoke":
        write_json(paper.paths["result"], result)
    return result


def _counts(module: str) -> bool:
    inside = any(module == name or module.startswith(name + ".") for name in IGNORED)
    return module in KEPT or (module != "lablib" and not inside)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def fingerprint(paper: Paper, modules: list[str]) -> str:
    """SHA-256 over the lab's code, the paper's claims and the sources of the modules it used."""
    digest = hashlib.sha256()
    for cell in nbformat.read(paper.paths["lab"], as_version=4).cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode())
    digest.update(json.dumps([asdict(claim) for claim in paper.claims]).encode())
    for name in modules:
        spec = importlib.util.find_spec(name)
        digest.update(Path(spec.origin).read_bytes() if spec and spec.origin else name.encode())
    return digest.hexdigest()[:16]


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
