"""Labelled pairs of the Hugging Face hub, for the gpu tier: what no ordinary package carries.

    AllNLI   (sentence, one that follows from it, one that contradicts it)
    STS-B    (sentence, sentence, rating from 0 to 1)

AllNLI joins SNLI and MultiNLI (Bowman et al., 2015; Williams et al., 2018); many of the theme's
papers train on such triples. The hub may change, so no claim is judged on these: `collections` and
`lablib.data.tasks` have what is pinned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lablib.data.hub import hub_rows
from lablib.data.packages import DataError


class Source(NamedTuple):
    """Where rows lie, and the columns that are taken, in order."""

    repository: str
    config: str | None
    columns: tuple[str, ...]


SOURCES = {
    "AllNLI": Source(
        "sentence-transformers/all-nli", "triplet", ("anchor", "positive", "negative")
    ),
    "STS-B": Source("sentence-transformers/stsb", None, ("sentence1", "sentence2", "score")),
}
SPLITS = ("train", "dev", "test")


def rows(name: str, count: int, split: str = "train") -> list[tuple[Any, ...]]:
    """The first rows of a source's split, so many where there are.

    name: "AllNLI" or "STS-B". split: "train", "dev" or "test". Rows are streamed: no more is
    fetched than is asked for. Raises DataError for another name, without package datasets, where
    the hub can't be reached, and for rows without one of the columns; ValueError for another split.
    """
    if name not in SOURCES:
        raise DataError(f"{name!r} is no source: {', '.join(SOURCES)}")
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split: {', '.join(SPLITS)}")
    repository, config, columns = SOURCES[name]
    known = "validation" if (name, split) == ("STS-B", "dev") else split
    found = hub_rows(name, repository, config, known, count)
    if missing := [c for row in found[:1] for c in columns if c not in row]:
        raise DataError(
            f"rows of {name} have no column {missing[0]}; they have {', '.join(found[0])}"
        )
    return [tuple(row[column] for column in columns) for row in found]


def triples_or(count: int, rest: list[tuple[str, str, str]]) -> tuple[str, list]:
    """("AllNLI", its first triples) where some are wanted and can be had, else ("", rest)."""
    if not count:
        return "", rest
    try:
        return "AllNLI", rows("AllNLI", count)
    except DataError:
        return "", rest
