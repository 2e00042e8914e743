"""Studies: runs made once, stored, judged, and open to be repeated.

A study is a module `lablib/studies/<slug>.py`, plain code:
- `run(**point) -> dict` builds, trains and evaluates one point. JSON numbers, texts and short lists
  come back; a key that ends in "seconds" is a time, which no repetition compares.
- `POINTS`: the judging points; `TUNING`: points on other seeds, on which the design was fixed;
  `CANARY`: one tiny point, under 2 s. `GPU_POINTS`, where a GPU allows more.
- `values(runs) -> {claim id: values}` for `judge`; a run is its point and its result in one dict.
- `ROLES`: {claim id: {"method": part of a point, "baseline": ..., "control": ...}}, which runs each
  direction claim compares; or the names of two results of one run. Tests exchange them, and put
  the control in the method's place, and expect another verdict.
- `READS`, where the study reads a shared one, too: {"scaling-grid": {"part": ("repetition",)}}, the
  shared study's name and what of its points is read, each key with the values that are taken. Then
  `values` gets those runs after its own, and a study may do without `run` and points of its own.
A shared study, `lablib/studies/scaling_grid.py` say, belongs to no paper: it has no `values`, and
`LIMIT_KB` where its file may be larger than others'.
Its runs lie in `data/studies/<slug>.jsonl`: a header, then one run a line.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from lablib.evidence import fingerprints
from lablib.evidence.claims import Pair, Verdict, judge
from lablib.evidence.sweeps import call, finished, sweep
from lablib.files import atomic_write
from lablib.papers import Paper, paper, papers
from lablib.paths import PACKAGE, cache_dir, data_dir

Run = dict[str, Any]
PACKAGES = ("torch", "lightning", "transformers", "numpy", "scipy", "plotly", "ipywidgets")
ALLOWED = 1e-4  # a canary's difference, relative to its value or to 1
LIMIT_KB = 200
PLAN = ("POINTS", "TUNING", "CANARY", "GPU_POINTS", "ROLES", "READS", "LIMIT_KB")


class StudyError(RuntimeError):
    """A study's file and its module do not fit; the message says what, and the way out."""


def matching(runs: Iterable[Run], **where: Any) -> list[Run]:
    """The runs that have these values."""
    return [run for run in runs if all(run.get(key) == value for key, value in where.items())]


def paired(
    runs: Sequence[Run],
    method: Mapping[str, Any],
    baseline: Mapping[str, Any],
    value: str | Callable[[Run], float],
) -> list[Pair]:
    """One `Pair` a seed that both have: `value` of the method's run, and of the baseline's.

    value: a key of the result, or a function of the run. Raises StudyError when they share no seed,
    or a side has two runs of one seed. That no planned run is missing is `Study.runs`' concern.
    """
    get = value if callable(value) else lambda run: run[value]
    ours, theirs = _by_seed(runs, method), _by_seed(runs, baseline)
    if not (seeds := sorted(ours.keys() & theirs.keys())):
        raise StudyError(f"{dict(method)} and {dict(baseline)} share no seed")
    return [Pair(seed, get(ours[seed]), get(theirs[seed])) for seed in seeds]


def _by_seed(runs: Sequence[Run], where: Mapping[str, Any]) -> dict[int, Run]:
    found: dict[int, Run] = {}
    for run in matching(runs, **where):
        if found.setdefault(run["seed"], run) is not run:
            raise StudyError(f"two runs of seed {run['seed']} have {dict(where)}")
    return found


Role = Mapping[str, Any] | str


def against(method: str, baseline: str, control: str | None = None) -> dict[str, str | None]:
    """A claim's roles where it compares two results of one run.

    control: a result that lacks what the claim credits; None where none is stored.
    """
    return {"method": method, "baseline": baseline, "control": control}


def exchanged(runs: Sequence[Run], first: Role, second: Role) -> list[Run]:
    """The runs with two of their kinds, or two of their results, exchanged.

    What a test of a verdict judges: it must turn.
    """
    if isinstance(first, str):
        both = {first, second}
        return [
            run | {first: run[second], second: run[first]} if both <= run.keys() else run
            for run in runs
        ]
    return [_relabelled(run, first, second) for run in runs]


def replaced(runs: Sequence[Run], method: Role, control: Role) -> list[Run]:
    """The runs with the control's kind, or result, in the place of the method's."""
    if isinstance(method, str):
        return [run | {method: run[control]} if control in run else run for run in runs]
    rest = [run for run in runs if not matching([run], **method)]
    return rest + [run | dict(method) for run in matching(runs, **control)]


def _relabelled(run: Run, first: Mapping[str, Any], second: Mapping[str, Any]) -> Run:
    for old, new in ((first, second), (second, first)):
        if matching([run], **old):
            return run | dict(new)
    return run


@dataclass(frozen=True)
class Shared:
    """What stands in a paper's place for a study that several papers read."""

    slug: str

    @property
    def name(self) -> str:
        """The slug as a Python name."""
        return self.slug.replace("-", "_")

    @property
    def paths(self) -> dict[str, Path]:
        """Its two places: "study" and "runs"."""
        return {
            "study": PACKAGE / "studies" / f"{self.name}.py",
            "runs": data_dir() / "studies" / f"{self.slug}.jsonl",
        }


def study(name: str) -> Study:
    """The study of a paper, by slug or lab, or a shared one, by its own slug.

    Raises UnknownPaper when there is neither.
    """
    shared = Shared(name)
    alone = name not in {row.slug for row in papers()} and shared.paths["study"].is_file()
    return Study(shared if alone else paper(name))


@dataclass(frozen=True)
class Study:
    """A paper's study, or a shared one: its module, and what is stored of it."""

    paper: Paper | Shared

    @property
    def module(self) -> ModuleType:
        """The study's code."""
        return importlib.import_module(f"lablib.studies.{self.paper.name}")

    @property
    def path(self) -> Path:
        """Where its runs lie."""
        return self.paper.paths["runs"]

    @property
    def exists(self) -> bool:
        """Whether the paper has a study."""
        return self.paper.paths["study"].is_file()

    @property
    def has_own(self) -> bool:
        """Whether it has runs of its own, beside those of shared studies."""
        return hasattr(self.module, "run")

    @property
    def reads(self) -> list[tuple[Study, Mapping[str, Sequence]]]:
        """The shared studies that it reads, each with what of their points is taken."""
        found = getattr(self.module, "READS", {})
        return [(Study(Shared(slug)), where) for slug, where in found.items()]

    def code(self) -> str:
        """The hash of what `run` reaches."""
        return fingerprints.code_hash(f"studies.{self.paper.name}:run")

    def constants(self) -> dict[str, str]:
        """The constants of studies that `run` reaches, each with a hash of its value.

        What says which runs there are, and what judges them, is none: no run depends on it.
        """
        found = fingerprints.constants(f"studies.{self.paper.name}:run")
        return {name: value for name, value in found.items() if not _is_plan(name)}

    def changed_constants(self) -> list[str]:
        """Those that have another value than when the stored runs were made.

        A canary reads few of them: what was tuned for other kinds of runs, it can't tell.
        """
        stored, now = self.read()[0].get("constants", {}), self.constants() | self.defaults()
        return [name for name, value in now.items() if stored.get(name, value) != value]

    def defaults(self) -> dict[str, str]:
        """What points leave to `run`: "glam.run(rows)" -> its default, or a hash of a long one.

        A canary often names what the points leave out, so it can't tell these either.
        """
        points = [*self.module.POINTS, *getattr(self.module, "TUNING", [])]
        found = {
            f"{self.paper.name}.run({name})": repr(parameter.default)
            for name, parameter in inspect.signature(self.module.run).parameters.items()
            if parameter.default is not parameter.empty and any(name not in p for p in points)
        }
        return {k: v if len(v) < 40 else fingerprints.short_hash(v) for k, v in found.items()}

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The header and the rows, {"point", "result", "seconds"}, as they are stored.

        Raises StudyError when nothing is stored, or a line can't be read.
        """
        if not self.path.is_file():
            raise StudyError(
                f"{self.paper.slug} has no runs yet: `python -m lablib study {self.paper.slug}`"
            )
        try:
            header, *rows = map(json.loads, self.path.read_text("utf-8").splitlines())
        except ValueError as error:
            raise StudyError(f"{self.path.name} can't be read: {error}") from None
        return header, rows

    def parts(self, points: str = "POINTS") -> list[tuple[Study, list[dict[str, Any]]]]:
        """The stored rows, its own and then those that it reads, each with the study they are of.

        points: "POINTS", "TUNING" or "GPU_POINTS", in whose order they come. Raises StudyError when
        one is missing.
        """
        own = [(self, self._own_rows(points))] if self.has_own else []
        return own + [
            (shared, [row for row in shared._own_rows(points) if _taken(row["point"], where)])
            for shared, where in self.reads
        ]

    def rows(self, points: str = "POINTS") -> list[dict[str, Any]]:
        """The rows of all `parts`."""
        return [row for _, rows in self.parts(points) for row in rows]

    def _own_rows(self, points: str) -> list[dict[str, Any]]:
        _, rows = self.read()
        known = {_text(row["point"]): row for row in rows}
        wanted = [_text(point) for point in getattr(self.module, points, [])]
        missing = [text for text in wanted if text not in known]
        if missing:
            raise StudyError(f"{self.path.name} lacks {len(missing)} runs, such as {missing[0]}")
        return [known[text] for text in wanted]

    def runs(self, points: str = "POINTS") -> list[Run]:
        """The same, each row's point and result in one dictionary."""
        return [row["point"] | row["result"] for row in self.rows(points)]

    def verdicts(self) -> list[Verdict]:
        """Every claim that the stored runs judge; none of a shared study."""
        if isinstance(self.paper, Shared):
            return []
        values = self.module.values(self.runs())
        rows = [judge(self.paper.claim(id), values[id]) for id in values]
        return [replace(row, source="study") for row in rows]

    def canary(self) -> dict[str, float]:
        """The canary's numbers, made now."""
        result = call(self.module.run, self.module.CANARY)["result"]
        return {key: value for key, value in result.items() if comparable(key, value)}

    def difference_of_canary(self) -> float:
        """How far the canary is from the stored one, relative to its size or to 1."""
        header, _ = self.read()
        stored, now = header["canary"], self.canary()
        if stored.keys() != now.keys():
            return math.inf
        return max((off(now[key], stored[key]) for key in stored), default=math.inf)

    def make(
        self,
        *,
        workers: int = 2,
        executor: Executor | None = None,
        shard: tuple[int, int] = (1, 1),
        points: str = "POINTS",
        done: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """Make the runs that are missing, and write the file.

        shard: (k, n) makes the k-th of n parts of them and leaves the file to the call that finds
        all parts done. Rows of changed code are made again, unless its constants are the same and
        the canary tells that nothing changed. Raises RunFailed as `sweep` does; what was finished
        is kept. A study without runs of its own has nothing to make: those that it reads are made
        by their own name.
        """
        if not self.has_own:
            return
        code = self.code()
        tuning = list(getattr(self.module, "TUNING", []))
        every = [*tuning, *self.module.POINTS]
        wanted = tuning if points == "TUNING" else every
        stored = self._still_good(code)
        missing = [point for point in wanted if _text(point) not in stored]
        folder = cache_dir() / "sweeps" / self.paper.slug
        mine = missing[shard[0] - 1 :: shard[1]]
        options = {"code": code, "executor": executor, "workers": workers, "done": done}
        sweep(self.module.run, mine, folder, **options)
        made = finished(missing, folder, code=code)  # by other shards, too
        stored |= {_text(row["point"]): row for row in made}
        if all(_text(point) in stored for point in wanted) or shard == (1, 1):
            self._write(code, [stored[_text(p)] for p in every if _text(p) in stored])

    def _still_good(self, code: str) -> dict[str, dict]:
        if not self.path.is_file():
            return {}
        header, rows = self.read()
        same = header["code"] == code or (
            not self.changed_constants() and self.difference_of_canary() <= ALLOWED
        )
        return {_text(row["point"]): row for row in rows} if same else {}

    def _write(self, code: str, rows: list[dict]) -> None:
        header = {
            "study": self.paper.slug,
            "code": code,
            "constants": self.constants() | self.defaults(),
            "canary": self.canary(),
            "content": opened_content(),
            "device": device(),
            "versions": versions(),
        }
        with atomic_write(self.path) as temporary:
            lines = (json.dumps(row, ensure_ascii=False) for row in [header, *rows])
            temporary.write_text("\n".join(lines) + "\n", "utf-8")

    def problems(self, canary: bool = True) -> list[str]:
        """What does not fit between the module, the file and the code; nothing when all is well.

        canary: repeat it even though no code has changed. Changed code always has it repeated, that
        of a shared study, too.
        """
        own = self._problems(canary) if self.has_own else []
        return own + [text for shared, _ in self.reads for text in shared._problems(canary=False)]

    def _problems(self, canary: bool) -> list[str]:
        again = f"run `python -m lablib study {self.paper.slug}`"
        try:
            header, rows = self.read()
        except StudyError as error:
            return [str(error)]
        found = self._wrong_rows(rows, again)
        limit = getattr(self.module, "LIMIT_KB", LIMIT_KB)
        if (size := self.path.stat().st_size / 1000) > limit:
            found.append(f"{self.path.name} has {size:.0f} KB; {limit} are allowed")
        if other := other_content(header["content"]):
            return found + [
                f"the study of {self.paper.slug} was made on another {name} than there is here"
                for name in other
                if pinned(name)
            ]
        if constants := self.changed_constants():
            names = ", ".join(constants)
            return [*found, f"the study of {self.paper.slug} is stale, {names} changed; {again}"]
        changed = header["code"] != self.code()
        if (canary or changed) and (difference := self.difference_of_canary()) > ALLOWED:
            why = "code changed" if changed else "results differ on this machine"
            found.append(
                f"the study of {self.paper.slug} is stale, {why}: its canary is off by "
                f"{difference:.2g}; {again}"
            )
        return found

    def _wrong_rows(self, rows: list[dict], again: str) -> list[str]:
        texts = [_text(row["point"]) for row in rows]
        module = self.module
        wanted = {_text(p) for p in [*module.POINTS, *getattr(module, "TUNING", [])]}
        seeds = {point.get("seed") for point in getattr(module, "TUNING", [])}
        both = seeds & {point.get("seed") for point in module.POINTS}
        found = []
        if len(set(texts)) < len(texts):
            found.append(f"{self.path.name} holds a point twice")
        if strange := set(texts) - wanted:
            found.append(f"{self.path.name} holds {len(strange)} points of no list, {min(strange)}")
        if missing := wanted - set(texts):
            found.append(f"{self.path.name} lacks {len(missing)} runs: {again}")
        if both:
            found.append(f"{self.paper.slug} was tuned on seeds that it is judged on: {both}")
        return found


def _taken(point: Mapping[str, Any], where: Mapping[str, Sequence]) -> bool:
    return all(point.get(key) in values for key, values in where.items())


def comparable(key: str, value: Any) -> bool:
    """Whether a repetition compares a result: finite numbers that are no times."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and not key.endswith("seconds")


def off(value: float, stored: float) -> float:
    """The difference of two numbers, relative to the stored one where that is above 1."""
    return abs(value - stored) / max(1.0, abs(stored))


def _is_plan(constant: str) -> bool:
    return constant.partition("[")[0].rpartition(".")[2] in PLAN


def _text(point: Mapping[str, Any]) -> str:
    return json.dumps(dict(point), sort_keys=True)


def opened_content() -> dict[str, str]:
    """SHA-256 of the corpora and models that this process has opened."""
    from lablib.files import opened

    return {name: fingerprints.content_digest(path) for name, path in sorted(opened.items())}


def other_content(content: Mapping[str, str]) -> list[str]:
    """What of a result's content is other content here. What this machine lacks is passed over."""
    paths = {name: content_path(name) for name in content}
    return [
        name
        for name, path in paths.items()
        if path and path.is_file() and fingerprints.content_digest(path) != content[name]
    ]


def pinned(name: str) -> bool:
    """Whether content is the same everywhere; the running Python's own text is not."""
    from lablib.data.corpora import CORPORA
    from lablib.data.tasks import TASKS

    kind, _, key = name.partition(" ")
    known = {"corpus": CORPORA, "task": TASKS}.get(kind)
    return known is None or (key in known and bool(known[key].sha256))


def content_path(name: str) -> Path | None:
    """The file of "corpus NAME", "task NAME" or "model NAME"; None when it is not prepared here."""
    kind, _, key = name.partition(" ")
    if kind == "corpus":
        from lablib.data.corpora import CORPORA

        return CORPORA[key].path if key in CORPORA else None
    if kind == "task":
        from lablib.data.tasks import TASKS

        return TASKS[key].path if key in TASKS else None
    from lablib.models.weights import is_ready, own_names, pretrained_path

    ready = key in own_names() or is_ready(key)
    return pretrained_path(key) / "model.safetensors" if ready else None


@contextlib.contextmanager
def dask_executor(address: str | None) -> Iterator[Executor | None]:
    """The executor of the Dask scheduler at `address`; None without one.

    Raises RuntimeError when `distributed` is not installed.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError:
        raise RuntimeError("runs on a Dask cluster need `pip install distributed`") from None
    with Client(address) as client:
        yield client.get_executor()


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on, Python among them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """Where runs are made: on how many cores. A GPU is left alone, see `sweeps.call`."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
