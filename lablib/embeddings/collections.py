"""Pairs of texts that mean the same, to learn from, to choose by and to judge on; rated pairs.

| name | a | b | split by | corpora |
| --- | --- | --- | --- | --- |
| verses | World English Bible | Young's Literal Translation | chapter | bible-web, bible-ylt |
| headings | heading | its section's text | document | django-docs |
| docstrings | docstring, first paragraph | function's body | module | docstrings |
| messages-CODE | English message | its translation | message | django |
| names-CODE | English name | its translation | name | babel |

No text is in two splits, and each has one partner: pairs with a text that stands in another pair
too are left out (of translations, all but the first). Near-copies stay: where two chapters tell the
same story, one may be in training and one held out. `lablib.data.CORPORA` holds the licenses,
versions and SHA-256 of the sources.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np

from lablib.data.corpora import load, prepare
from lablib.data.packages import DataError
from lablib.files import note_opened

SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1.0)}
NAMES = ("verses", "headings", "docstrings", "messages-CODE", "names-CODE")
WORDS = 5  # a docstring, and a section, has at least as many


class _Item(NamedTuple):
    """A pair in its source: what is split as one, such as a chapter; items of it are neighbors."""

    source: str
    place: str
    a: str
    b: str


def pairs(name: str, split: str) -> list[tuple[str, str]]:
    """(a, b) texts that mean the same, in a fixed order that looks random.

    name: "verses", "headings", "docstrings", "messages-CODE" or "names-CODE" (as "messages-fr").
    split: "train" (60 % of the sources), "validation" (15 %) or "test" (25 %); disjoint by source
    and by text. The same English message, or name, is in the same split for every language.
    Raises DataError for another name or language, ValueError for another split.
    """
    return [(item.a, item.b) for item in _of_split(name, split)]


def triples(name: str, split: str) -> list[tuple[str, str, str]]:
    """(a, b, hard negative): the b of a's neighbor, which is close but says something else.

    The neighbor is the next pair of the chapter, document or module, of its last pair the one
    before; a source with one pair gives none. In the order of `pairs`.
    Raises ValueError for messages and names, which have no neighbors.
    """
    if name.partition("-")[0] in ("messages", "names"):
        raise ValueError(f"{name} has no neighbors to take as hard negatives")
    chosen = _of_split(name, split)
    beside: dict[_Item, str] = {}
    for _, group in groupby(_items(name), key=lambda item: item.source):
        items = list(group)
        beside |= {
            item: other.b for item, other in zip(items, items[1:] + items[-2:-1], strict=False)
        }
    return [(item.a, item.b, beside[item]) for item in chosen if item in beside]


def folders(split: str) -> list[str]:
    """The folder of Django's documentation, such as "ref", of each pair of "headings"."""
    return [item.source.partition("/")[0] for item in _of_split("headings", split)]


def languages(kind: str, at_least: int = 0) -> list[str]:
    """Codes of "messages" or "names" whose translations are at least so many."""
    rows = load(_TRANSLATED[kind])
    return [code for code, text in rows if text.count("\n") >= at_least]


def parallel(kind: str, codes: Sequence[str], split: str) -> list[tuple[str, ...]]:
    """(English, translation into each of codes) of the "messages" or "names" that all of them have.

    In the order of `pairs`.
    """
    columns = [dict(pairs(f"{kind}-{code}", split)) for code in codes]
    common = [english for english in columns[0] if all(english in column for column in columns)]
    return [(english, *(column[english] for column in columns)) for english in common]


def widespread(
    kind: str, n: int, accept: Callable[[str], bool] = bool
) -> dict[str, dict[str, str]]:
    """Code -> {English: translation} of the n "messages" or "names" that most languages have.

    accept: which English texts count at all. Of those that are as widespread the first by letters.
    A language that has none is left out, and so are varieties of English.
    """
    for corpus in _SOURCES[kind]:
        note_opened(f"corpus {corpus}", prepare(corpus))
    codes = [code for code in languages(kind) if code.partition("_")[0] != "en"]
    tables = {code: {item.a: item.b for item in _items(f"{kind}-{code}")} for code in codes}
    spread = Counter(text for table in tables.values() for text in filter(accept, table))
    chosen = sorted(spread, key=lambda text: (-spread[text], text))[:n]
    made = {code: {t: table[t] for t in chosen if t in table} for code, table in tables.items()}
    return {code: table for code, table in made.items() if table}


def language_names(codes: Iterable[str]) -> dict[str, str]:
    """Code -> what English calls the language, as the CLDR has it; where, or in which script.

    What tells two of the codes apart is said of them alone: "pt_BR" is Portuguese, beside "pt" it
    is Portuguese (Brazil). A code that the CLDR lacks is its own name.
    """
    from babel import Locale

    english, parts = Locale("en"), {code: code.partition("_") for code in codes}
    known = Counter(language for language, _, _ in parts.values())
    more = {**english.territories, **english.scripts}
    return {
        code: english.languages.get(language, language)
        + (f" ({more.get(variety, variety)})" if variety and known[language] > 1 else "")
        for code, (language, _, variety) in parts.items()
    }


def names(codes: Sequence[str], split: str) -> list[tuple[str, tuple[str, ...]]]:
    """(kind, (English, translation into each of codes)) of names; `parallel` with labels.

    kind: "language", "place" or "currency"; a name that is of two kinds is left out.
    """
    kinds = _kinds()
    rows = parallel("names", codes, split)
    return [(kinds[row[0]], row) for row in rows if row[0] in kinds]


def lee() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Newspaper texts and how alike people found each two of them.

    Returns 50 texts of about 80 words, pairs (1225, 2) int64 of places in them, and ratings (1225,)
    float64 from 0 to 1, each the mean of about ten people's.
    Source: Lee, Pincombe and Welsh, "An empirical evaluation of models of text document
    similarity" (CogSci 2005), as gensim 4.4.0 (LGPL-2.1) carries them.
    """
    tables = dict(load("similarities"))
    ratings = np.loadtxt(tables["lee-similarities"].splitlines())  # (50, 50), zero below
    rows, columns = np.triu_indices(len(ratings), 1)
    texts = [line.strip() for line in tables["lee"].splitlines()]
    return texts, np.stack([rows, columns], 1), ratings[rows, columns]


def wordsim() -> tuple[list[tuple[str, str]], np.ndarray]:
    """353 pairs of words and how related people found them: (353,) float64 from 0 to 10.

    Source: WordSim-353 (Finkelstein et al., 2002), as gensim 4.4.0 (LGPL-2.1) carries it.
    """
    return _rated_words("wordsim353")


def simlex() -> tuple[list[tuple[str, str]], np.ndarray]:
    """999 pairs of words and how similar people found them: (999,) float64 from 0 to 10.

    "cup" and "coffee" are related, but not similar.
    Source: SimLex-999 (Hill et al., 2015), as gensim 4.4.0 (LGPL-2.1) carries it.
    """
    return _rated_words("simlex999")


def polarity() -> tuple[list[str], np.ndarray]:
    """200 sentences of film reviews and whether they praise: (200,) int64, 1 for praise.

    Source: a sample of Pang and Lee (2005), as gensim 4.4.0 (LGPL-2.1) carries it.
    """
    lines = dict(load("similarities"))["polarity"].splitlines()
    rows = [line.split(maxsplit=1) for line in lines]
    labels = np.array([label == "__label__pos" for label, _ in rows], dtype=np.int64)
    return [text.strip() for _, text in rows], labels


def _rated_words(table: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    lines = dict(load("similarities"))[table].splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return [(a, b) for a, b, _ in rows], np.array([float(rating) for *_, rating in rows])


def _of_split(name: str, split: str) -> list[_Item]:
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split: {', '.join(SPLITS)}")
    kind, _, code = name.partition("-")
    if kind not in _SOURCES or bool(code) != (kind in _TRANSLATED):
        raise DataError(f"no collection is called {name!r}; there are {', '.join(NAMES)}.")
    for corpus in _SOURCES[kind]:
        note_opened(f"corpus {corpus}", prepare(corpus))
    low, high = SPLITS[split]
    places = _places(name)
    chosen = [item for item in _items(name) if low <= places[item.source] < high]
    return sorted(chosen, key=lambda item: _draw(f"{item.source} {item.place}"))


@lru_cache(maxsize=200)
def _places(name: str) -> dict[str, float]:
    """Where from 0 to 1 each source lies, in an order that looks random.

    Sources are as long as they have pairs; those of translations are one pair each.
    """
    sizes = Counter(item.source for item in _items(name))
    if name.partition("-")[0] in _TRANSLATED:  # the same place in every language
        return {source: _draw(source) for source in sizes}
    ordered = sorted(sizes, key=_draw)
    ends = accumulate(sizes[source] for source in ordered)
    whole = sizes.total()
    return {s: (end - sizes[s] / 2) / whole for s, end in zip(ordered, ends, strict=True)}


def _draw(key: str) -> float:
    """A number from 0 to 1, the same for the same key on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48


@lru_cache(maxsize=200)
def _items(name: str) -> tuple[_Item, ...]:
    """All pairs of a collection, each text once, in its own order."""
    kind, _, code = name.partition("-")
    if kind in _TRANSLATED:
        return tuple(_first(_translations(kind, code)))
    found = list(_READ[kind]())
    counts = Counter(text for item in found for text in {_plain(item.a), _plain(item.b)})
    return tuple(i for i in found if counts[_plain(i.a)] == 1 == counts[_plain(i.b)])


def _first(items: Iterable[_Item]) -> Iterator[_Item]:
    """Those with no text of one before."""
    seen: set[str] = set()
    for item in items:
        texts = {_plain(item.a), _plain(item.b)}
        if seen.isdisjoint(texts):
            seen |= texts
            yield item


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _verses() -> Iterator[_Item]:
    other = dict(load("bible-ylt"))
    for book, text in load("bible-web"):
        there = dict(line.split("\t") for line in other[book].splitlines())
        for line in text.splitlines():
            place, verse = line.split("\t")
            if there.get(place) and verse:
                yield _Item(f"{book} {place.partition(':')[0]}", place, verse, there[place])


# A title, a line of one mark below it that is at least as long, and often one above it.
_HEADING = re.compile(r"^(?:([=~*\-]{3,})\n)?(\S.*)\n([=\-~^\"'*+#`.])\3{2,}[ ]*$", re.MULTILINE)
# Anchors, comments, and what a directive says of itself.
_DIRECTIVE = re.compile(r"^ *(?:\.\. .*|:[a-z-]+:(?: .*)?)$", re.MULTILINE)
# :setting:`DEBUG`, :doc:`text </address>` and `text <https://...>`_, of which the text stays.
_ROLE = re.compile(r"(?::[\w:+-]+:)?(?<!`)`(?!`)[~!]?([^`<]+?)\s*(?:<[^`>]*>)?`(?!`)_{0,2}")


def _headings() -> Iterator[_Item]:
    for name, text in load("django-docs"):
        found = list(_HEADING.finditer(text))
        ends = [*(match.start() for match in found[1:]), len(text)]
        for number, (match, end) in enumerate(zip(found, ends, strict=False)):
            section = _prose(text[match.end() : end])
            if len(section.split()) >= WORDS:
                yield _Item(name, f"{number}", _prose(match[2]), section)


def _prose(text: str) -> str:
    """Without reStructuredText's marks, on one line."""
    return " ".join(_ROLE.sub(r"\1", _DIRECTIVE.sub("", text)).replace("``", "").split())


def _docstrings() -> Iterator[_Item]:
    for module, text in load("docstrings"):
        for number, line in enumerate(text.splitlines()):
            _, said, body = json.loads(line)
            if len(said.split()) >= WORDS:
                yield _Item(module, f"{number}", said, body)


def _translations(kind: str, code: str) -> Iterator[_Item]:
    texts = dict(load(_TRANSLATED[kind]))
    if code not in texts:
        raise DataError(f"no {kind} are in {code!r}; there are {', '.join(texts)}.")
    for line in texts[code].splitlines():
        english, translation = line.split("\t")
        yield _Item(english, "", english, translation)


@lru_cache(maxsize=1)
def _kinds() -> dict[str, str]:
    """English name -> what it names."""
    from babel import Locale

    english = Locale("en")
    tables = (
        ("language", english.languages),
        ("place", english.territories),
        ("currency", english.currencies),
    )
    counts = Counter(name for _, table in tables for name in set(table.values()))
    return {name: kind for kind, table in tables for name in table.values() if counts[name] == 1}


_TRANSLATED = {"messages": "django", "names": "babel"}
_READ = {"verses": _verses, "headings": _headings, "docstrings": _docstrings}
_SOURCES = {
    "verses": ("bible-web", "bible-ylt"),
    "headings": ("django-docs",),
    "docstrings": ("docstrings",),
    "messages": ("django",),
    "names": ("babel",),
}
