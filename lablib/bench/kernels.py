"""`python -m lablib bench kernels`: each op against its definition, plain and compiled, and peers.

An op's cases stand in its folder's `bench.py`. What is compared takes turns, in a new order each
round, so that neither a busy machine nor what ran just before favors one of them; a ratio is the
median over rounds of the ratio within a round.
"""

from __future__ import annotations

import random
import statistics
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from lablib import kernels
from lablib.kernels.cases import Case
from lablib.resources import Way, measure

Row = dict[str, float | str]


def benches() -> list[ModuleType]:
    """The `bench.py` of every op that has one: `cases`, and `memory` where that matters."""
    files = sorted(Path(kernels.__file__).parent.glob("*/bench.py"))
    return [import_module(f"lablib.kernels.{file.parent.name}.bench") for file in files]


def machine_limits(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of one large matrix product and bytes a second of one large copy, both measured."""
    size = 1536 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = statistics.median(measure({"": lambda: a @ a})[""])
    b = torch.randn(2**24 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(b)
    copy = statistics.median(measure({"": lambda: target.copy_(b)})[""])
    return {"flops": 2 * size**3 / product, "bandwidth": 2 * b.nbytes / copy}


def show(case: Case, limits: dict[str, float], repeats: int) -> Row:
    """Median seconds of each way, printed; a way that fails gives its error's name.

    Ratios are to the first way, ours, or to the next where that fails.
    """
    failed = {key: error for key, way in case.ways.items() if (error := _failure(way))}
    times = _times({k: way for k, way in case.ways.items() if k not in failed}, case, repeats)
    print(f"\n{case.title}")
    ours = times[next(key for key in case.ways if key in times)]
    row: Row = {}
    for key in case.ways:
        if key in failed:
            row[key] = f"not run: {failed[key]}"
            print(f"  {key:36} {row[key]}")
            continue
        row[key] = seconds = statistics.median(times[key])
        ratio = statistics.median(time / own for time, own in zip(times[key], ours))
        shares = _shares(case, key, seconds, limits)
        print("  ".join([f"  {key:36} {1e3 * seconds:9.2f} ms  {ratio:5.2f} x ours", *shares]))
    return row


def _failure(way: Way) -> str | None:
    """The name of the error of a way's first run, which is not timed."""
    try:
        way()
    except Exception as error:  # a peer that is not there, or a compiler that fails
        return type(error).__name__
    return None


def _times(ways: dict[str, Way], case: Case, repeats: int) -> dict[str, list[float]]:
    n = min(repeats, case.repeats or repeats)
    rounds = [measure(dict(random.sample(list(ways.items()), len(ways))), 1) for _ in range(n)]
    return {key: [seconds[key][0] for seconds in rounds] for key in ways}


def _shares(case: Case, way: str, seconds: float, limits: dict[str, float]) -> list[str]:
    shares, moved = [], case.other_moved.get(way, case.moved)
    if case.flops:
        shares.append(f"{case.flops / seconds / limits['flops']:5.0%} of peak FLOP/s")
    if moved:
        shares.append(f"{moved / seconds / limits['bandwidth']:5.0%} of bandwidth")
    return shares


def show_memory(sizes: dict[str, int]) -> dict[str, int]:
    """Peak bytes of each way, printed with their ratio to the first."""
    ours = next(iter(sizes.values()))
    for way, size in sizes.items():
        print(f"  peak memory, {way:23} {size / 2**20:9.0f} MiB {size / ours:5.2f} x ours")
    return sizes


def bench_kernels(repeats: int = 41) -> dict[str, Row]:
    """Time every op on this machine's device and print ratios; returns title -> way -> seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    limits = machine_limits(device, dtype)
    print(
        f"{device} ({name}), {str(dtype).removeprefix('torch.')}, torch {torch.__version__}: "
        f"{limits['flops'] / 1e9:,.0f} GFLOP/s, {limits['bandwidth'] / 1e9:,.1f} GB/s"
    )
    table: dict[str, Row] = {}
    for bench in benches():
        for case in bench.cases(device, dtype):
            table[case.title] = show(case, limits, repeats)
        if hasattr(bench, "memory"):
            table["peak memory in bytes"] = show_memory(bench.memory(device, dtype))
    if device == "cpu":
        print("\non a GPU: not run (there is none here)")
    return table
