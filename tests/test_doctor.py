"""What doctor says and set-up prepares, and how the commands fail."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lablib import prepare
from lablib.cli import main
from lablib.data import CORPORA, Document
from lablib.doctor import examine
from lablib.models.weights import PACKAGED
from lablib.papers import UnknownPaper, papers, themes
from lablib.paths import cache_dir
from lablib.resources import memory_limit, release_memory


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty cache, one small corpus and one small model to prepare."""
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path / "cache"))
    rows = [Document("a", "text")]
    corpus = replace(CORPORA["bible"], megabytes=0.0, read=lambda corpus: rows)

    def convert(archive, folder):
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
        table = json.dumps({"w": {"data_offsets": [0, 4]}}).encode()
        weights = len(table).to_bytes(8, "little") + table + b"1234"
        (folder / "model.safetensors").write_bytes(weights)

    model = replace(PACKAGED["minilm-l6-v2"], convert=convert)
    monkeypatch.setattr("lablib.models.weights.fetch", lambda *_, **__: None)
    monkeypatch.setitem(CORPORA, "bible", corpus)
    monkeypatch.setitem(PACKAGED, "minilm-l6-v2", model)
    monkeypatch.setattr(prepare, "CORPORA", {"bible": corpus})
    monkeypatch.setattr(prepare, "TASKS", {})
    monkeypatch.setattr(prepare, "local_names", lambda: ["minilm-l6-v2"])
    return tmp_path / "cache"


def said():
    return "\n".join(map(str, examine()))


def test_doctor_looks_into_the_files(small, capsys):
    assert "FIX  not ready: corpus bible, model minilm-l6-v2" in said()
    assert main(["setup"]) == 0
    assert "[2/2] model minilm-l6-v2" in capsys.readouterr().out
    assert "ok   2 corpora, tasks and models are ready" in said()
    weights = small / "models" / "minilm-l6-v2" / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    (small / "corpora" / "bible.jsonl").write_text("")
    assert "FIX  not ready: corpus bible, model minilm-l6-v2" in said()
    with pytest.warns(UserWarning, match="cut or changed"):
        assert main(["setup"]) == 0
    assert "ok   2 corpora, tasks and models are ready" in said()


def test_a_cache_that_cannot_be_written_is_one_sentence(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path / "file"))
    assert "FIX  the cache can't be written" in said() and "set LABLIB_HOME" in said()
    assert main(["setup"]) == 2
    err = capsys.readouterr().err
    assert "LABLIB_HOME can name another folder for the cache" in err and err.count("\n") == 1


def test_a_relative_home_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("LABLIB_HOME", "cache")
    assert "FIX  LABLIB_HOME is 'cache', another place from each folder" in said()
    assert main(["setup"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.delenv("LABLIB_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir().is_absolute() and "relative" not in cache_dir().parts


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_the_catalogue_prints_in_any_encoding(encoding):
    command = [sys.executable, "-m", "lablib", "papers"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    ran = subprocess.run(command, capture_output=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.decode(encoding).splitlines()[-1] == f"{len(papers())} papers"


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_that_of_the_container(version, tmp_path):
    own, groups = tmp_path / "own", tmp_path / "groups"
    tree = groups if version == 2 else groups / "memory"
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    (tree / "user" / "lab").mkdir(parents=True)
    own.write_text({1: "5:memory:/user/lab\n4:cpu:/user\n", 2: "0::/user/lab\n"}[version])
    machine = memory_limit(groups, own)
    (tree / "user" / "lab" / name).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert memory_limit(groups, own) == machine
    (tree / "user" / name).write_text("50000000\n")
    assert memory_limit(groups, own) == 50_000_000
    (tree / name).write_text("40000000\n")
    assert memory_limit(groups, own) == 40_000_000, "a container sees its own group as the root"
    assert memory_limit(tmp_path / "none", tmp_path / "none") == machine


class Lab:
    """Stands for a paper: its lab's code, and what its stored files say was opened."""

    def __init__(self, folder, theme, code=None, result=None, study=None):
        self.theme, self.present = theme, code is not None
        kinds = {"lab": "ipynb", "result": "json", "runs": "jsonl"}
        self.paths = {key: folder / f"{theme}.{kind}" for key, kind in kinds.items()}
        cells = [{"cell_type": "code", "source": code}]
        rows = {"lab": code and {"cells": cells}, "result": result, "runs": study}
        for key, row in rows.items():
            if row is not None:
                self.paths[key].write_text(json.dumps(row) + "\n")


@pytest.fixture
def labs(tmp_path, monkeypatch):
    opened = {"content": {"corpus shakespeare": "1", "model owner/name": "2"}}
    rows = [
        Lab(tmp_path, "experts", 'load("django")', opened, {"content": {"corpus bible": "3"}}),
        Lab(tmp_path, "scaling", "x = 1", study=opened),
        Lab(tmp_path, "theory"),
    ]
    monkeypatch.setattr(prepare, "papers", lambda: rows)
    monkeypatch.setattr(prepare, "labs_dir", lambda: tmp_path / "none")
    return rows


def names():
    return [step.name for step in prepare.needed_steps()]


def test_set_up_is_limited_to_what_the_themes_labs_opened(labs, monkeypatch):
    every = names()
    assert "model minilm-l6-v2" in every and "corpus wikitext-103" not in every
    monkeypatch.setenv("LABLIB_THEMES", "experts, theory")
    assert names() == ["corpus shakespeare", "corpus bible", "corpus django"]
    monkeypatch.setenv("LABLIB_THEMES", "experts,scaling")
    assert names() == every, "nobody knows yet what the lab of scaling opens"
    monkeypatch.setenv("LABLIB_THEMES", "theory")
    assert names() == []


def test_set_up_is_limited_to_the_labs_that_are_named(monkeypatch):
    monkeypatch.setenv("LABLIB_THEMES", "theory")
    steps = {step.name for step in prepare.needed_steps(["701", "00"])}
    assert {"task licences-all", "model smollm2-135m-instruct", "corpus shakespeare"} <= steps
    assert "task movies" not in steps
    with pytest.raises(UnknownPaper, match="702x"):
        prepare.needed_steps(["702x"])


def test_an_unknown_theme_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setenv("LABLIB_THEMES", "expert")
    assert main(["setup"]) == 2
    assert capsys.readouterr().err == (
        f"LABLIB_THEMES has 'expert', which is no theme; there are {', '.join(themes())}\n"
    )
    assert "FIX  LABLIB_THEMES has 'expert'" in said()


def test_the_landed_labs_say_what_they_open(monkeypatch):
    """Every theme asks for things that set-up can prepare, the start page's among them."""
    for theme in themes():
        monkeypatch.setenv("LABLIB_THEMES", theme.replace("_", "-"))
        assert "corpus shakespeare" in names()


def test_a_result_that_does_not_parse_is_named(labs, monkeypatch):
    labs[0].paths["result"].write_text("{")
    monkeypatch.setenv("LABLIB_THEMES", "experts")
    with pytest.raises(ValueError, match=r"experts\.json can't be read"):
        names()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts as Linux does")
def test_memory_that_is_free_goes_back_to_the_system():
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])  # kB

    kept = [
        bytearray(50_000) for _ in range(4000)
    ]  # 200 MB, each too small for a mapping of its own
    last = bytearray(50_000)
    del kept
    before = resident()
    release_memory()
    assert len(last) and resident() < before + 1000
