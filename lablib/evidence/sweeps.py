"""Many small runs: a list of points, resumable, on any executor."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest import mock

from lablib.files import write_json
from lablib.paths import cache_dir

Point = dict[str, Any]
WORKERS = {  # their environment
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc would give each step's large buffers back to the system: a third of a small run's time.
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}
PATIENCE = 0.2  # seconds between two looks for a free core


class RunFailed(RuntimeError):
    """A run raised, or its process died; the message names the point."""


def grid(**axes: Any) -> list[Point]:
    """Every combination of the axes' values, the last axis fastest; one value is an axis of one.

    A string counts as one value. grid(n_experts=(4, 8), seed=range(5)) has ten points.
    """
    alone = (str, int, float, bool, type(None))
    values = [[axis] if isinstance(axis, alone) else list(axis) for axis in axes.values()]
    return [dict(zip(axes, row)) for row in itertools.product(*values)]


def sweep(
    function: Callable[..., Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    code: str = "",
    executor: Executor | None = None,
    workers: int = 2,
    done: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Call `function(**point)` at every point; the rows, in the points' order.

    A row is {"point", "result", "seconds"}, JSON types; NumPy's scalars and arrays become such. It
    lies in a file of its own in `folder`, on disk before its worker's next run starts, named by the
    point and `code`: a point whose file is there is not run again, unless the code differs.
    executor: any of concurrent.futures whose workers are processes, such as a Dask client's; by
        default `workers` spawned processes of one thread each. Threads would share the seeds of
        torch, NumPy and Python, so their results would depend on one another.
    done: called with each row as it is finished.
    At most as many runs as this machine has cores go on at once, whoever started them.
    Raises ValueError for a function that another process can't import, RunFailed when a run raises
    or its process is killed; what was finished before is kept, and the next call goes on from it.
    """
    _importable(function)
    folder, points = Path(folder), [_plain(point) for point in points]
    files = [row_file(folder, point, code) for point in points]
    missing = {file: point for file, point in zip(files, points) if not file.is_file()}
    if missing:
        with _executor(executor, min(workers, len(missing))) as (pool, size):
            _run_all(pool, size, function, missing, done)
    return finished(points, folder, code=code)


def finished(
    points: Sequence[Mapping[str, Any]], folder: str | Path, *, code: str = ""
) -> list[dict[str, Any]]:
    """The rows that a sweep of any process has left in `folder`, in the points' order."""
    files = [row_file(Path(folder), _plain(point), code) for point in points]
    return [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]


def _run_all(pool: Executor, size: int, function, missing: dict[Path, Point], done) -> None:
    """Keep `size` runs going; write each row as it comes, also those that Ctrl-C finds finished."""
    waiting, going = list(missing.items()), {}
    try:
        while waiting or going:
            while waiting and len(going) < size:
                file, point = waiting.pop(0)
                going[pool.submit(call_in_turn, function, point)] = file, point
            finished, _ = wait(going, return_when=FIRST_COMPLETED)
            for future in finished:
                _keep(future, *going.pop(future), done)
    except BaseException:
        for future, (file, point) in going.items():
            if not future.cancel() and future.done() and not future.exception():
                _keep(future, file, point, done)
        raise


def _keep(future: Future, file: Path, point: Point, done) -> None:
    try:
        row = {"point": point, **future.result()}
    except Exception as error:
        raise RunFailed(f"the run {point} failed: {type(error).__name__}: {error}") from error
    write_json(file, row)
    done(row)


def call_in_turn(function: Callable[..., Mapping[str, Any]], point: Point) -> dict[str, Any]:
    """`call`, once a core is free."""
    with a_core():
        return call(function, point)


def call(
    function: Callable[..., Mapping[str, Any]], point: Point, gpu: bool = False
) -> dict[str, Any]:
    """One run, on one thread of torch: its result in JSON types, and the seconds that it took.

    gpu: let it train on a GPU where there is one. Without it a run is the same on every machine:
    a GPU trains in fewer bits.
    """
    start = time.perf_counter()
    with _one_thread(), contextlib.nullcontext() if gpu else _without_gpu():
        result = _plain(function(**point))
    seconds = round(time.perf_counter() - start, 2)
    json.dumps(result, allow_nan=False)  # here, where the error still has its point
    return {"result": result, "seconds": seconds}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """What a run computes depends on the number of threads, in its last digits."""
    torch = sys.modules.get("torch")  # whoever trains has imported it
    before = torch.get_num_threads() if torch else 1
    try:
        if torch:
            torch.set_num_threads(1)
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    """Torch says meanwhile that there is none, so whatever asks it stays on the processor."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        yield
        return
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        yield


@contextlib.contextmanager
def a_core() -> Iterator[None]:
    """Hold one of the machine's cores: never more holders than cores, whoever started them."""
    from filelock import FileLock, Timeout

    folder = cache_dir() / "cores"
    folder.mkdir(parents=True, exist_ok=True)
    locks = [FileLock(folder / f"{core}.lock") for core in range(os.cpu_count() or 1)]
    parent = multiprocessing.parent_process()
    while parent is None or parent.is_alive():  # nobody waits for an orphan's runs
        for lock in locks:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield
            finally:
                lock.release()
                time.sleep(1.5 * PATIENCE)  # or who has just had a core would always be next
            return
        time.sleep(PATIENCE)
    raise SystemExit("the process that asked for this run is gone")


@contextlib.contextmanager
def _executor(given: Executor | None, workers: int) -> Iterator[tuple[Executor, int]]:
    if given is not None:
        yield given, 10_000  # it has a queue of its own
        return
    # A fork would inherit the locks of torch's threads, and wait for them for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    with _environment(**WORKERS):
        try:
            yield pool, workers
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(**settings: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _importable(function: Callable) -> None:
    name = getattr(function, "__qualname__", "")
    if getattr(function, "__module__", "__main__") == "__main__" or "<" in name or not name:
        raise ValueError(
            f"other processes can't import {name or function!r}: sweep needs a function defined at "
            "the top of a module, not in a notebook, a script or another function"
        )


def _plain(value: Any) -> Any:
    """The value in JSON's types; NumPy's and torch's become numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{value!r} is no number, text, list or dict of them")


def row_file(folder: Path, point: Point, code: str) -> Path:
    """Where a sweep keeps the row of one point, made by the code of this hash."""
    text = json.dumps([point, code], sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
