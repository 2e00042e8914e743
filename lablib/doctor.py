"""What this machine can run, and how to mend what is missing."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from lablib.paths import cache_dir


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: state is "ok", "note" (works, with a limit) or "fix"."""

    state: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok  ", "note": "note", "fix": "FIX "}[self.state]
        return f"{mark} {self.what}" + (f"\n       {self.fix}" if self.fix else "")


def examine() -> Iterator[Finding]:
    """Look at Python, packages, memory, disk, accelerator, corpora and models, in this order."""
    yield from _python()
    yield from _packages()
    yield from _machine()
    yield from _accelerator()
    yield from _prepared()


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()}")


def _packages() -> Iterator[Finding]:
    for package, why in (
        ("torch", "everything that is trained"),
        ("lightning", "training"),
        ("transformers", "pretrained models"),
        ("ipywidgets", "sliders"),
        ("plotly", "figures"),
        ("jupyterlab", "the labs on this machine"),
        ("nbclient", "verify"),
    ):
        try:
            yield Finding("ok", f"{package} {version(package)}")
        except PackageNotFoundError:
            yield Finding("fix", f"{package} is missing ({why})", f"pip install {package}")


def _machine() -> Iterator[Finding]:
    cores = os.cpu_count() or 1
    memory = _memory_gb()
    words = f"{cores} CPU cores" + (f", {memory:.1f} GB of memory" if memory else "")
    if memory and memory < 1.9:
        yield Finding("fix", words, "the cpu tier needs 2 GB: set LABLIB_TIER=smoke")
    else:
        yield Finding("ok" if cores > 1 else "note", words)
    cache_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir()).free / 1e9
    state = "ok" if free > 2 else "fix"
    fix = "" if free > 2 else "set-up needs 2 GB: free some, or point LABLIB_HOME elsewhere"
    folder = str(cache_dir()).replace(os.path.expanduser("~"), "~", 1)
    yield Finding(state, f"{free:.0f} GB free in {folder}", fix)


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):
        return None


def _accelerator() -> Iterator[Finding]:
    from lablib.lab.tiers import current, has_cuda

    if has_cuda():
        import torch

        major, minor = torch.cuda.get_device_capability()
        precision = "bf16" if major >= 8 else "fp16"
        name = torch.cuda.get_device_name()
        yield Finding("ok", f"{name}, compute capability {major}.{minor}: trains in {precision}")
    else:
        yield Finding("note", "no CUDA device: labs run at the cpu tier, kernels on their CPU path")
    yield Finding("ok", f"tier {current()} (LABLIB_TIER sets it)")


def _prepared() -> Iterator[Finding]:
    from lablib.data import CORPORA

    absent = [c.name for c in CORPORA.values() if not c.online and not c.path.is_file()]
    if absent:
        yield Finding("fix", f"corpora not fetched: {', '.join(absent)}", "python -m lablib setup")
    else:
        count = sum(not corpus.online for corpus in CORPORA.values())
        yield Finding("ok", f"{count} corpora are ready")
    if importlib.util.find_spec("torch"):
        from lablib.models.weights import is_ready, local_names

        missing = [name for name in local_names() if not is_ready(name)]
        if missing:
            yield Finding(
                "fix", f"models not ready: {', '.join(missing)}", "python -m lablib setup"
            )
        else:
            yield Finding("ok", f"models are ready: {', '.join(local_names())}")
