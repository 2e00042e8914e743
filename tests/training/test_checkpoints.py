"""The recipe of our checkpoints, on documents small enough for a test."""

import json

import pytest

from lablib import data
from lablib.models import GPTConfig, from_hf
from lablib.training import checkpoints


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path / "home"))
    texts = [data.Document(f"d{i}", f"number {i} is {i * i} squared. " * 40) for i in range(60)]
    monkeypatch.setattr(data, "load", lambda name: texts, raising=False)
    monkeypatch.setattr(checkpoints, "CORPORA", {"shakespeare": None})
    monkeypatch.setattr(checkpoints, "LENGTH", 16)
    monkeypatch.setattr(checkpoints.corpora, "__defaults__", ({"shakespeare": None}, 0))
    config = GPTConfig(checkpoints.VOCAB, 16, 1, 2, max_length=16)
    checkpoints.train("small", tmp_path / "small", checkpoints.Recipe(config, 4, 2, 1e-3))
    return tmp_path / "small"


def test_a_checkpoint_is_whole(written):
    log = json.loads((written / "training.json").read_text())
    assert {"perplexity", "bits_per_byte", "tokens"} <= set(log["held_out"]["all"])
    assert log["steps"] == 4 and log["parameters"] == from_hf(written).n_parameters()
    assert (written / "tokenizer.json").is_file() and (written / "config.json").is_file()
    assert log["held_out"]["shakespeare"]["documents"]


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match="'tiny-9m' is none of our checkpoints: tiny-1m"):
        checkpoints.train("tiny-9m")


def test_a_limit_takes_whole_documents():
    documents = [data.Document(str(i), "x" * 10) for i in range(9)]
    taken = checkpoints._at_most(documents, 35, seed=0)
    assert len(taken) == 3 and set(taken) <= set(documents)
