"""What kenlm's own estimator, `lmplz`, makes of three plays by Shakespeare: recorded once.

The pip package of kenlm reads models and cannot estimate them. `lmplz` and `query` were built from
its source distribution, version 0.3.0, and run as `lmplz.json` says: an unpruned 5-gram model of
the plays in "train", a sentence a line, words parted by blanks. The file holds the discounts that
lmplz printed, the log10-probability that `query` gave each word of some lines, and that and the
back-off weight of n-grams drawn at random from its ARPA file, 40 of each length.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from lablib.data import load


@lru_cache(maxsize=1)
def recorded() -> dict[str, Any]:
    """The file's content: "train", "scored", "discounts", "word_log10", "ngrams_log10"."""
    return json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))


def lines(play: str) -> list[list[str]]:
    """The lines of one of Shakespeare's plays that are not blank, as lists of words."""
    text = next(document.text for document in load("shakespeare") if document.name == play)
    return [words for line in text.splitlines() if (words := line.split())]


def training_lines() -> list[list[str]]:
    """What lmplz was given."""
    return [line for play in recorded()["train"] for line in lines(play)]


def scored_lines() -> list[list[str]]:
    """What query scored: lines of another play, and lines of one that lmplz was given."""
    return [line for play, low, high in recorded()["scored"] for line in lines(play)[low:high]]
