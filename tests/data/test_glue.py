import sys
import types

import pytest

from lablib.data.glue import load_glue
from lablib.data.packages import DataError
from lablib.data.tasks import Example


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def rows(source, name, split, streaming):
    """A made-up GLUE: which rows were asked for can be read from them."""
    assert (source, streaming) == ("a folder", True)
    for i in range(9):
        if name == "sst2":
            yield {"sentence": f"{split} {i}", "label": i % 2, "idx": i}
        else:
            yield {"premise": f"{split} {i}", "hypothesis": f"is {i}", "label": i % 3, "idx": i}


def test_splits_come_from_training_and_validation(monkeypatch):
    hub(monkeypatch, rows)
    train, validation, test = load_glue("sst2", train=3, test=2, source="a folder")
    assert [e.text for e in train] == ["train 0", "train 1", "train 2"]
    assert [e.text for e in validation] == ["train 3", "train 4"]
    assert test == [Example("validation 0", 0), Example("validation 1", 1)]


def test_pairs_have_both_texts_and_mnli_its_own_split(monkeypatch):
    hub(monkeypatch, rows)
    splits = load_glue("mnli", train=4, test=1, source="a folder")
    assert splits.test == [Example("validation_matched 0", 0, "is 0")]
    assert splits.train[2] == Example("train 2", 2, "is 2")


def unreachable(*_, **__):
    raise ConnectionError("no network")


def test_what_lacks_is_one_sentence(monkeypatch):
    with pytest.raises(DataError, match="no task 'sst'; it has cola"):
        load_glue("sst")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load_glue("sst2")
    hub(monkeypatch, unreachable)
    with pytest.raises(DataError, match="can't be reached .*ConnectionError"):
        load_glue("sst2")
