"""Two more tasks on legal text, made of the licences and notices of `lablib.data.tasks`.

`clauses`: a paragraph that disclaims warranties, or one that limits liability; which of them, its
heading says, which is cut off. `families`: notices by the family of their licence. No text nearly
repeats another one (`with_near_copies`).
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from lablib.data.tasks import Example, Splits, arrange, licence_texts, load_task, with_near_copies

CLAUSES = ("warranty", "liability")
FAMILIES = ("gpl", "lgpl", "apache", "bsd")
SHARES = (0.6, 0.1, 0.3)  # of training, validation, test
WORDS = 20  # that a clause has at least
_NUMBER = r"(?:(?:section |article )?\(?(?:\d+(?:\.\d+)*|[a-z]|[ivx]+)?[.):]*[ \t]+)?"
_HEADING = re.compile(
    rf"[ \t]*(?i:{_NUMBER})"
    r"([A-Z][A-Za-z ,/&'-]{5,50}?)[ \t]*(?:[.:\n]|[-–]{1,2}[ \t])[ \t]*(\S.*)",
    re.DOTALL,
)
_STEMS = {"warranty": r"warrant", "liability": r"liabilit"}


@lru_cache(1)
def clauses() -> Splits:
    """Paragraphs below a heading that speaks of warranties, or of liability, and not of both.

    Labels are places in CLAUSES. The heading, up to a period, colon, dash or the end of its line,
    is not part of the text.
    """
    found = []
    for document in (*licence_texts()[0], *licence_texts()[1]):
        for paragraph in re.split(r"\n[ \t]*\n", document.text):
            if (clause := clause_of(paragraph)) is not None:
                found.append(clause)
    return _split(found)


def clause_of(paragraph: str) -> Example | None:
    """The text below a paragraph's heading and its label; None for any other paragraph."""
    if not (match := _HEADING.match(paragraph)):
        return None
    heading, body = match[1], " ".join(match[2].split()).lstrip("-– ")
    kinds = [n for n, kind in enumerate(CLAUSES) if re.search(_STEMS[kind], heading, re.IGNORECASE)]
    if len(kinds) != 1 or len(body.split()) < WORDS:
        return None
    return Example(body, kinds[0])


@lru_cache(1)
def families() -> Splits:
    """Notices of four families of licences; labels are places in FAMILIES."""
    every = [example for part in load_task("notices") for example in part]
    named = [(re.split(r"[-.]", example.source)[0], example.text) for example in every]
    return _split(Example(text, FAMILIES.index(name)) for name, text in named if name in FAMILIES)


def _split(examples: Iterable[Example]) -> Splits:
    """Of near-copies the first alone, in three splits."""
    known: dict[str, Example] = {}
    for example in with_near_copies(list(examples)):
        known.setdefault(example.source, example)
    rows = (("", Example(example.text, example.label)) for example in known.values())
    return arrange(rows, SHARES)
