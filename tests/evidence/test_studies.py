import json
import sys
import types

import pytest

from lablib.evidence import studies
from lablib.evidence.claims import Pair
from lablib.evidence.studies import Study, StudyError, exchanged, matching, paired, replaced
from lablib.evidence.sweeps import row_file
from lablib.files import write_json
from lablib.papers import Paper, papers

RUNS = [
    {"kind": kind, "seed": seed, "loss": loss + seed / 10}
    for kind, loss in (("dense", 2.0), ("moe", 1.0), ("random", 2.1))
    for seed in range(5)
]


def test_pairs_are_made_by_seed():
    made = paired(RUNS[::-1], {"kind": "moe"}, {"kind": "dense"}, "loss")
    assert made == [Pair(seed, 1.0 + seed / 10, 2.0 + seed / 10) for seed in range(5)]
    assert [row.seed for row in paired(RUNS[1:], {"kind": "moe"}, {"kind": "dense"}, "loss")] == [
        1,
        2,
        3,
        4,
    ]
    with pytest.raises(StudyError, match="share no seed"):
        paired(RUNS[5:], {"kind": "moe"}, {"kind": "dense"}, "loss")
    with pytest.raises(StudyError, match="two runs of seed"):
        paired(RUNS, {}, {"kind": "dense"}, "loss")


def test_runs_can_be_exchanged_and_replaced():
    moe, dense, control = {"kind": "moe"}, {"kind": "dense"}, {"kind": "random"}
    swapped = paired(exchanged(RUNS, moe, dense), moe, dense, "loss")
    assert swapped[0] == Pair(0, 2.0, 1.0)
    instead = paired(replaced(RUNS, moe, control), moe, dense, "loss")
    assert instead[0] == Pair(0, 2.1, 2.0)
    assert len(matching(RUNS, kind="moe", seed=3)) == 1


MODULE = "lablib.studies.fabricated"


def runs_of(point):
    return {"loss": 1.0 + 0.1 * point["seed"] + (point["kind"] == "dense"), "seconds": 3.0}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs cost nothing, and whose code we can pretend to change."""
    from lablib.papers import Claim

    claim = Claim("wins", "direction", "t", "p", better="lower")
    made = Paper(1, "fabricated", "A title", "2020-01-01", "experts", 3, "x", 399, (claim,))
    module = types.ModuleType(MODULE)
    module.POINTS = [{"kind": k, "seed": s} for k in ("moe", "dense") for s in range(5)]
    module.TUNING = [{"kind": k, "seed": 10} for k in ("moe", "dense")]
    module.CANARY = {"kind": "moe", "seed": 20}
    module.run = lambda **point: runs_of(point)
    module.values = lambda runs: {"wins": _noisy(runs)}
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr("lablib.papers.data_dir", lambda: tmp_path / "data")
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Study, "code", lambda self: module.code_now)
    monkeypatch.setattr(Study, "constants", lambda self: dict(module.constants_now))
    monkeypatch.setattr(studies, "sweep", in_process)
    module.code_now, module.constants_now, module.calls = "one", {"RATE['moe']": "1e-2"}, []
    return Study(made), module


def _noisy(runs):
    rows = paired(runs, {"kind": "moe"}, {"kind": "dense"}, "loss")
    return [Pair(row.seed, row.method, row.baseline + row.seed / 50) for row in rows]


def in_process(function, points, folder, *, code, executor, workers, done):
    rows = [{"point": p, "result": function(**p), "seconds": 1.0} for p in points]
    for row in rows:
        sys.modules[MODULE].calls.append(row["point"])
        write_json(row_file(folder, row["point"], code), row)
        done(row)
    return rows


def test_a_study_is_made_once_judged_and_found_whole(study):
    study, module = study
    study.make()
    assert len(module.calls) == 12 and study.problems() == []
    assert study.runs()[0] == {"kind": "moe", "seed": 0, "loss": 1.0, "seconds": 3.0}
    assert [run["seed"] for run in study.runs("TUNING")] == [10, 10]
    (verdict,) = study.verdicts()
    assert verdict.verdict == "reproduced" and "5 seeds" in verdict.summary
    study.make()
    assert len(module.calls) == 12
    module.POINTS = [*module.POINTS, *({"kind": k, "seed": 5} for k in ("moe", "dense"))]
    assert "lacks 2 runs" in study.problems()[0]
    study.make()
    assert len(module.calls) == 14 and study.problems() == []


def test_tuning_once_more_keeps_what_was_judged(study):
    study, module = study
    study.make()
    module.TUNING = [*module.TUNING, {"kind": "moe", "seed": 11}]
    study.make(points="TUNING")
    assert len(module.calls) == 13 and study.problems() == []


def test_changed_code_is_checked_by_the_canary(study):
    study, module = study
    study.make()
    module.code_now = "two"  # other code, equal results
    assert study.problems() == []
    study.make()
    assert len(module.calls) == 12 and study.read()[0]["code"] == "two"
    module.code_now = "three"  # other code, other results
    module.run = lambda **point: {**runs_of(point), "loss": 0.5}
    assert "stale, code changed: its canary is off" in study.problems()[0]
    study.make()
    assert len(module.calls) == 24 and study.problems() == []


def test_no_canary_vouches_for_a_changed_constant(study):
    study, module = study
    study.make()
    module.code_now, module.constants_now = "two", {"RATE['moe']": "1e-2", "RATE['new']": "2e-2"}
    assert study.problems() == []  # one more is code like any other
    module.constants_now = {"RATE['moe']": "3e-2"}
    (problem,) = study.problems()
    assert "stale, RATE['moe'] changed" in problem and study.difference_of_canary() == 0
    study.make()
    assert len(module.calls) == 24 and study.problems() == []


def test_no_canary_vouches_for_a_changed_default(study):
    study, module = study

    def run(kind, seed, lr=1e-3, rows=8):
        return module.runs_of(kind=kind, seed=seed)

    module.runs_of, module.run = module.run, run
    module.CANARY = module.CANARY | {"lr": 1e-3}
    study.make()
    module.run = lambda kind, seed, lr=2e-3, rows=8, more=1: run(kind, seed)
    (problem,) = study.problems()
    assert "stale, fabricated.run(lr) changed" in problem and study.difference_of_canary() == 0
    module.POINTS, module.TUNING = (
        [point | {"lr": 1e-3} for point in points] for points in (module.POINTS, module.TUNING)
    )
    study.make()
    assert study.defaults() == {"fabricated.run(rows)": "8", "fabricated.run(more)": "1"}
    assert study.problems() == []  # none of the points leaves the rate out


def test_a_broken_canary_is_seen_though_no_code_changed(study):
    study, module = study
    study.make()
    module.run = lambda **point: {**runs_of(point), "loss": 0.5}
    assert study.problems(canary=False) == []
    assert "results differ on this machine" in study.problems()[0]


def test_shards_together_make_the_whole(study):
    study, module = study
    study.make(shard=(2, 3))
    assert len(module.calls) == 4 and not study.path.exists()
    study.make(shard=(1, 3))
    assert len(module.calls) == 8 and not study.path.exists()
    study.make(shard=(3, 3))
    assert len(module.calls) == 12 and study.problems() == []
    points = [row["point"] for row in study.rows()]
    assert points == module.POINTS and study.runs()[0]["loss"] == 1.0


def test_files_edited_by_hand_are_noticed(study):
    study, module = study
    study.make()
    header, *rows = study.path.read_text().splitlines()
    study.path.write_text("\n".join([header, *rows, rows[0]]) + "\n")
    assert any("holds a point twice" in text for text in study.problems())
    stray = json.dumps({"point": {"kind": "moe", "seed": 77}, "result": {}, "seconds": 1})
    study.path.write_text("\n".join([header, *rows, stray]) + "\n")
    assert any("points of no list" in text for text in study.problems())
    study.path.write_text("\n".join([header, *rows[1:]]) + "\n")
    assert any("lacks 1 runs" in text for text in study.problems())
    study.path.write_text("{broken\n")
    assert "can't be read" in study.problems()[0]
    module.TUNING = [{"kind": "moe", "seed": 0}]
    study.path.write_text("\n".join([header, *rows]) + "\n")
    assert any("tuned on seeds that it is judged on" in text for text in study.problems())


@pytest.fixture
def reader(study, tmp_path, monkeypatch):
    """A paper's study that reads a shared one: (reader, its module, the shared study)."""
    own, module = study
    shared = types.ModuleType("lablib.studies.fabricated_grid")
    shared.POINTS = [{"part": p, "seed": s} for p in ("size", "data") for s in range(5)]
    shared.TUNING, shared.CANARY = [], {"part": "size", "seed": 9}
    shared.run = lambda part, seed: {"loss": seed / 10}
    monkeypatch.setitem(sys.modules, shared.__name__, shared)
    monkeypatch.setattr(studies, "data_dir", lambda: tmp_path / "data")
    module.READS = {"fabricated-grid": {"part": ("data",)}}
    grid = Study(studies.Shared("fabricated-grid"))
    own.make()
    return own, module, grid


def test_a_study_reads_what_it_asks_for_of_a_shared_one(reader):
    own, _module, grid = reader
    assert "fabricated-grid has no runs yet" in own.problems()[0]
    grid.make()
    assert own.problems() == grid.problems() == [] and grid.verdicts() == []
    assert len(own.runs()) == 15 and len(grid.runs()) == 10
    assert own.runs()[10:] == [{"part": "data", "seed": s, "loss": s / 10} for s in range(5)]
    assert [study.paper.slug for study, _ in own.parts()] == ["fabricated", "fabricated-grid"]
    assert len(own.runs("TUNING")) == 2


def test_a_reader_may_have_no_runs_of_its_own(reader):
    own, module, grid = reader
    grid.make()
    own.path.unlink()
    del module.run, module.POINTS, module.TUNING, module.CANARY
    own.make()
    assert not own.path.exists() and own.problems() == [] and len(own.runs()) == 5


def test_a_shared_study_that_is_stale_makes_its_readers_stale(reader):
    own, module, grid = reader
    grid.make()
    module.code_now = "two"
    sys.modules["lablib.studies.fabricated_grid"].run = lambda part, seed: {"loss": 7.0}
    assert ["fabricated-grid is stale" in text for text in own.problems()] == [True]


def test_a_shared_study_is_found_by_its_name():
    assert studies.study("scaling-grid").paper == studies.Shared("scaling-grid")
    assert studies.study("glam").paper.slug == "glam"
    with pytest.raises(KeyError, match="no paper is called 'scaling-gird'"):
        studies.study("scaling-gird")


def test_a_paper_without_runs_says_what_to_do():
    study = next(study for study in map(Study, papers()) if not study.path.is_file())
    with pytest.raises(StudyError, match=f"python -m lablib study {study.paper.slug}"):
        study.read()


def test_content_that_differs_between_machines_is_not_compared():
    from lablib.evidence.studies import content_path, pinned

    assert pinned("corpus bible") and pinned("task movies") and pinned("model minilm-l6-v2")
    assert not pinned("corpus python-source") and not pinned("task python-module")
    assert not pinned("corpus of nobody") and not pinned("task of nobody")
    assert content_path("task movies").name == "movies.jsonl"
    assert content_path("task of nobody") is None
