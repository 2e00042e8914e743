"""Words and sentences of plain text, for the word-level models."""

import re
import unicodedata
from functools import lru_cache

_JOINERS = "\u200c\u200d"  # of no width, inside words of Persian, Hindi and others
_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z])|\n\s*\n")


def words(text: str) -> list[str]:
    """Words, numbers and single punctuation marks, case kept: "O, don't!" -> O , don't !

    A letter's combining marks belong to its word: vowel signs, and accents written apart.
    """
    return _pattern("" if text.isascii() else _marks(text)).findall(text)


def _marks(text: str) -> str:
    """The combining marks and joiners that a text uses, sorted."""
    used = (c for c in set(text) if c in _JOINERS or unicodedata.category(c)[0] == "M")
    return "".join(sorted(used))


@lru_cache(maxsize=256)
def _pattern(marks: str) -> re.Pattern[str]:
    # `re` has no class for marks, and one of all 2,500 would slow down every text.
    letters = rf"[^\W\d_](?:[^\W\d_]|[{marks}])*" if marks else r"[^\W\d_]+"
    return re.compile(rf"{letters}(?:['’\-]{letters})*|\d+(?:[.,]\d+)*|[^\w\s]|_+")


def sentences(text: str) -> list[list[str]]:
    """Sentences as lists of words: cut after . ! ? before a capital, and at blank lines."""
    return [found for piece in _END.split(text) if (found := words(piece))]
