"""What this machine can run, and how to mend what is missing."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from lablib.files import scratch
from lablib.paths import cache_dir
from lablib.prepare import needed_steps
from lablib.resources import memory_limit


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
    """Look at Python, packages, memory, accelerator, disk, corpora and models, in this order."""
    yield from _python()
    yield from _packages()
    yield from _machine()
    yield from _accelerator()
    try:
        cache_dir()
    except ValueError as error:  # LABLIB_HOME
        yield Finding("fix", str(error))
        return
    yield from _disk()
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
    cores, memory = os.cpu_count() or 1, (memory_limit() or 0) / 1e9
    words = f"{cores} CPU cores" + (f", {memory:.1f} GB of memory" if memory else "")
    if memory and memory < 1.9:
        yield Finding("fix", words, "the cpu tier needs 2 GB: set LABLIB_TIER=smoke")
    else:
        yield Finding("ok" if cores > 1 else "note", words)


def _disk() -> Iterator[Finding]:
    cache = cache_dir()
    try:
        with scratch(cache / "doctor") as probe:
            probe.touch()
        free = shutil.disk_usage(cache).free / 1e9
    except OSError as error:
        what = f"the cache can't be written ({error})"
        yield Finding("fix", what, "set LABLIB_HOME to a folder that can")
        return
    state = "ok" if free > 2 else "fix"
    fix = "" if free > 2 else "set-up needs 2 GB: free some, or point LABLIB_HOME elsewhere"
    folder = str(cache).replace(os.path.expanduser("~"), "~", 1)
    yield Finding(state, f"{free:.0f} GB free in {folder}", fix)


def _accelerator() -> Iterator[Finding]:
    from lablib.evidence.tiers import current, has_cuda

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
    """Corpora and models, absent, cut or ready: what the labs of `LABLIB_THEMES` need of them."""
    try:
        steps = needed_steps()
    except ValueError as error:
        yield Finding("fix", str(error))
        return
    if missing := [step.name for step in steps if not step.is_ready()]:
        yield Finding("fix", f"not ready: {', '.join(missing)}", "python -m lablib setup")
    if ready := len(steps) - len(missing):
        yield Finding("ok", f"{ready} corpora, tasks and models are ready")
