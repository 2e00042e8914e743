"""Rows of the hub, from a package datasets that is made up here: nothing is fetched."""

import sys
from types import SimpleNamespace

import pytest

from lablib.data.packages import DataError
from lablib.embeddings import online

NLI = [{"anchor": f"a{n}", "positive": f"p{n}", "negative": f"n{n}"} for n in range(5)]
RATED = [{"score": 0.2 * n, "sentence1": f"one {n}", "sentence2": f"two {n}"} for n in range(3)]
LOCAL = {
    ("sentence-transformers/all-nli", "triplet", "train"): NLI,
    ("sentence-transformers/all-nli", "triplet", "dev"): NLI[3:],
    ("sentence-transformers/stsb", None, "validation"): RATED,
}


@pytest.fixture
def taken(monkeypatch):
    """Rows that were asked for, one by one."""
    seen = []

    def load_dataset(repository, config, split, streaming):
        assert streaming
        for row in LOCAL[repository, config, split]:
            seen.append(row)
            yield row

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return seen


def test_columns_come_in_order_and_no_more_is_fetched_than_asked_for(taken):
    assert online.rows("AllNLI", 2) == [("a0", "p0", "n0"), ("a1", "p1", "n1")]
    assert len(taken) == 2
    assert online.rows("STS-B", 9, "dev") == [("one 0", "two 0", 0.0), *_rated()[1:]]


def _rated():
    return [(row["sentence1"], row["sentence2"], row["score"]) for row in RATED]


def test_each_source_has_its_own_name_for_a_split(taken):
    assert online.rows("AllNLI", 9, "dev") == [("a3", "p3", "n3"), ("a4", "p4", "n4")]


def test_what_is_not_there_is_said(taken, monkeypatch):
    with pytest.raises(DataError, match="'SICK' is no source: AllNLI, STS-B"):
        online.rows("SICK", 1)
    with pytest.raises(ValueError, match="'valid' is no split: train, dev, test"):
        online.rows("STS-B", 1, "valid")
    monkeypatch.setitem(LOCAL, ("sentence-transformers/stsb", None, "test"), [{"score": 1.0}])
    with pytest.raises(DataError, match="rows of STS-B have no column sentence1; they have score"):
        online.rows("STS-B", 1, "test")


def test_without_the_package_or_the_hub_other_triples_are_taken(monkeypatch):
    rest = [("q", "p", "n")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        online.rows("AllNLI", 1)
    assert online.triples_or(1, rest) == ("", rest)

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DataError, match=r"can't be reached .* \(ConnectionError\)"):
        online.rows("AllNLI", 1)
    assert online.triples_or(1, rest) == ("", rest)


def test_triples_of_the_hub_come_first_where_some_are_wanted(taken):
    assert online.triples_or(1, []) == ("AllNLI", [("a0", "p0", "n0")])
    assert online.triples_or(0, [("q", "p", "n")]) == ("", [("q", "p", "n")])
