"""A grid of small trainings: resumable, on any executor."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lablib.files import write_json


def grid(axes: Mapping[str, Sequence]) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values, as keyword arguments; the last axis runs fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values))


def sweep(
    function: Callable[..., Any],
    axes: Mapping[str, Sequence],
    folder: str | Path,
    *,
    executor: Executor | None = None,
    workers: int = 2,
) -> list[dict[str, Any]]:
    """Call `function(**point)` at every point of the grid; the rows, in the grid's order.

    A row is the point plus "result", what the function returned (JSON types), and lies in a file
    of its own in `folder`, written whole or not at all. Points whose file is there are not run
    again, so an interrupted sweep goes on where it stopped.
    executor: any of concurrent.futures, such as a Dask client's; by default a process pool of
    `workers`, so the function must be importable.
    When a point raises, the others are still finished; then the first error is raised.
    """
    folder = Path(folder)
    points = list(grid(axes))
    missing = [point for point in points if not _file(folder, point).is_file()]
    own = executor is None and bool(missing)
    pool = ProcessPoolExecutor(workers) if own else executor
    errors = []
    try:
        futures = {pool.submit(function, **point): point for point in missing} if missing else {}
        for future in as_completed(futures):
            point = futures[future]
            if error := future.exception():
                errors.append(error)
            else:
                write_json(_file(folder, point), {**point, "result": future.result()})
    finally:
        if own:
            pool.shutdown()
    if errors:
        raise errors[0]
    return [json.loads(_file(folder, point).read_text("utf-8")) for point in points]


def _file(folder: Path, point: dict[str, Any]) -> Path:
    text = json.dumps(point, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
