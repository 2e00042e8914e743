"""Words and sentences of plain text, for the word-level models."""

import re

_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*|\d+(?:[.,]\d+)*|[^\w\s]|_+")
_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z])|\n\s*\n")


def words(text: str) -> list[str]:
    """Words, numbers and single punctuation marks, case kept: "O, don't!" -> O , don't !"""
    return _WORD.findall(text)


def sentences(text: str) -> list[list[str]]:
    """Sentences as lists of words: cut after . ! ? before a capital, and at blank lines."""
    return [found for piece in _END.split(text) if (found := words(piece))]
