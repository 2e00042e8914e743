"""A benchmark that fits into a lab: twelve tasks of eight types, cut to some tens of short texts.

A task is its texts and a way to score what an encoder makes of them: similarities (texts, texts)
and vectors (texts, dim). So that BM25, which has no vectors, can take part, its vectors are its
similarities to all texts. Sources of the texts: `lablib.embeddings.collections`,
`lablib.data.tasks`. Evaluators: `lablib.embeddings.evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lablib.data.tasks import load_task
from lablib.embeddings import collections, evaluate, lexical
from lablib.embeddings.mmteb import Benchmark, Task

WORDS = 14  # of a text, the first ones
KINDS = ("currency", "language", "place")


class Drawn(NamedTuple):
    """A task's texts, and its score from their similarities (n, n) and vectors (n, dim)."""

    texts: list[str]
    score: Callable[[np.ndarray, np.ndarray], float]


def cut(texts: Sequence[str], words: int = WORDS) -> list[str]:
    """The first words of each text."""
    return [" ".join(text.split()[:words]) for text in texts]


# Ways to score.


def rated(a: Sequence[str], b: Sequence[str], gold: Sequence[float]) -> Drawn:
    """Pairs with ratings: Spearman."""
    n = len(a)
    return Drawn(
        [*a, *b], lambda s, v: evaluate.correlation(s[:n, n:].diagonal(), gold)["spearman"]
    )


def told_apart(a: Sequence[str], b: Sequence[str], same: Sequence[int]) -> Drawn:
    """Pairs that mean the same, and others: average precision."""
    n = len(a)
    return Drawn([*a, *b], lambda s, v: evaluate.pairs(s[:n, n:].diagonal(), same)["ap"])


def searched(queries: Sequence[str], documents: Sequence[str], metric: str, k: int = 10) -> Drawn:
    """Document i is the one that query i is after; others may follow."""
    n = len(queries)

    def score(s: np.ndarray, v: np.ndarray) -> float:
        return evaluate.retrieval(s[:n, n:], range(n), k)[metric]

    return Drawn([*queries, *documents], score)


def reranked(triples: Sequence[tuple[str, str, str]], candidates: int = 5) -> Drawn:
    """Of each query's candidates the first is right, the second its neighbor: MAP.

    candidates: of a query; fewer where there are too few queries to take them from.
    """
    n = len(triples)
    queries, own, near = (list(column) for column in zip(*triples))
    others = range(1, min(candidates - 1, n))  # the documents of the next queries
    after = [[i, n + i, *((i + step) % n for step in others)] for i in range(n)]

    def score(s: np.ndarray, v: np.ndarray) -> float:
        rows = [s[i, n:][places] for i, places in enumerate(after)]
        return evaluate.reranking(rows, [0] * n)["map"]

    return Drawn([*queries, *own, *near], score)


def labeled(train: Sequence, test: Sequence) -> Drawn:
    """(text, label) to learn from and to judge on: accuracy."""
    n = len(train)
    labels = [label for _, label in [*train, *test]]

    def score(s: np.ndarray, v: np.ndarray) -> float:
        sides = (v[:n], labels[:n], v[n:], labels[n:])
        return evaluate.classification(*sides, per_class=16, draws=5)["accuracy"]

    return Drawn([text for text, _ in [*train, *test]], score)


def grouped(rows: Sequence) -> Drawn:
    """(text, label): V-measure."""
    labels = [label for _, label in rows]
    return Drawn(
        [text for text, _ in rows],
        lambda s, v: evaluate.clustering(v, labels, range(5))["v_measure"],
    )


# The tasks.


def some(rows: Sequence, count: int, draw: np.random.Generator) -> list:
    """So many rows at random, all of them where there are fewer."""
    return [rows[i] for i in draw.permutation(len(rows))[:count]]


def balanced(rows: Sequence, count: int, draw: np.random.Generator) -> list:
    """So many (text, label) of each label, mixed."""
    labels = sorted({label for _, label in rows})
    chosen = [some([r for r in rows if r[1] == label], count, draw) for label in labels]
    return some([row for part in chosen for row in part], count * len(labels), draw)


def _sts_b(n: int, draw: np.random.Generator) -> Drawn:
    chosen = some(load_task("sts-b").test, n, draw)
    a, b = ([getattr(e, side) for e in chosen] for side in ("text", "pair"))
    return rated(cut(a), cut(b), [e.label for e in chosen])


def _lee(n: int, draw: np.random.Generator) -> Drawn:
    texts, pairs, gold = collections.lee()
    chosen = set(draw.choice(len(texts), 3 * n // 5, replace=False).tolist())
    kept = [row for row, pair in enumerate(pairs.tolist()) if chosen.issuperset(pair)]
    places = sorted(chosen)
    a, b = np.searchsorted(places, pairs[kept]).T
    short = cut([texts[i] for i in places], 3 * WORDS)
    return Drawn(short, lambda s, v: evaluate.correlation(s[a, b], gold[kept])["spearman"])


def _wordsim(n: int, draw: np.random.Generator) -> Drawn:
    words, gold = collections.wordsim()
    places = draw.choice(len(words), n, replace=False)
    return rated(*zip(*(words[i] for i in places)), gold[places])


def _pairs(name: str, metric: str, k: int = 10):
    def drawn(n: int, draw: np.random.Generator) -> Drawn:
        queries, documents = zip(*some(collections.pairs(name, "test"), n, draw))
        return searched(cut(queries), cut(documents), metric, k)

    return drawn


def _next_verse(n: int, draw: np.random.Generator) -> Drawn:
    rows = some(collections.triples("verses", "validation"), n // 2, draw)
    return reranked([tuple(cut(row)) for row in rows])


def _kinds(n: int, draw: np.random.Generator) -> Drawn:
    sides = []
    for split, place, count in (("train", 0, 16), ("test", 1, n // 3)):
        rows = [(texts[place], kind) for kind, texts in collections.names(["fr"], split)]
        sides.append(balanced(rows, count, draw))
    return labeled(*sides)


def _polarity(n: int, draw: np.random.Generator) -> Drawn:
    texts, labels = collections.polarity()
    rows = balanced(list(zip(cut(texts), labels.tolist())), 16 + n // 2, draw)
    train = [row for label in (0, 1) for row in [r for r in rows if r[1] == label][:16]]
    return labeled(train, [row for row in rows if row not in train])


def _sections(n: int, draw: np.random.Generator) -> Drawn:
    texts = cut([section for _, section in collections.pairs("headings", "test")])
    rows = list(zip(texts, collections.folders("test")))
    kept = [row for row in rows if row[1] in ("howto", "ref", "releases", "topics")]
    return grouped(balanced(kept, n // 3, draw))


def _paraphrase(n: int, draw: np.random.Generator) -> Drawn:
    rows = [((e.text, e.pair), e.label) for e in load_task("paraphrase").validation]
    chosen = balanced(rows, n // 2, draw)
    a, b = zip(*(pair for pair, _ in chosen))
    return told_apart(cut(a), cut(b), [label for _, label in chosen])


ENG, NEWS, CODE, BIBLE = ("eng",), ("news",), ("code",), ("religious",)
DOCS, WORD = ("software",), ("dictionary",)
FIRST = ("recall@1", 1)  # with one right answer, the accuracy
_TASKS = (  # with how many pairs or texts it draws from, and what draws it
    (Task("sts-b", "STS", ENG, NEWS, 1378), _sts_b),
    (Task("lee", "STS", ENG, NEWS, 50), _lee),
    (Task("wordsim", "STS", ENG, WORD, 353), _wordsim),
    (Task("headings", "Retrieval", ENG, DOCS, 1062), _pairs("headings", "ndcg@10")),
    (Task("docstrings", "Code retrieval", ENG, CODE), _pairs("docstrings", "ndcg@10")),
    (Task("next verse", "Reranking", ENG, BIBLE, 4564), _next_verse),
    (Task("messages-fr", "Bitext mining", ("eng", "fra"), DOCS, 74), _pairs("messages-fr", *FIRST)),
    (Task("names-ru", "Bitext mining", ("eng", "rus"), WORD, 265), _pairs("names-ru", *FIRST)),
    (Task("kinds-fr", "Classification", ("eng", "fra"), WORD, 294), _kinds),
    (Task("polarity", "Classification", ENG, ("reviews",), 200), _polarity),
    (Task("sections", "Clustering", ENG, DOCS, 973), _sections),
    (Task("paraphrase", "Pair classification", ENG, NEWS, 839), _paraphrase),
)
MINI = Benchmark("mini", tuple(task for task, _ in _TASKS))


def drawn(name: str, size: int = 40, seed: int = 0) -> Drawn:
    """A task's texts, drawn by the seed. size: about how many of them a side has.

    Raises KeyError for a task that MINI doesn't have.
    """
    place = MINI.names.index(name) if name in MINI.names else -1
    if place < 0:
        raise KeyError(f"{name!r} is none of {', '.join(MINI.names)}")
    return _TASKS[place][1](size, np.random.default_rng([seed, place]))


def dense(embed: Callable) -> Callable:
    """An encoder's similarities and vectors of texts: embed gives (n, dim)."""

    def both(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        vectors = evaluate.unit(embed(texts))
        return vectors @ vectors.T, vectors

    return both


def by_words(index: Callable) -> Callable:
    """The same of `lexical.bm25` or `lexical.tfidf`, by words that are split at underscores."""

    def both(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        similarities = index(texts, tokenize=lexical.code_words)(texts)
        return similarities, evaluate.unit(similarities)

    return both


def column(
    both: Callable, names: Sequence[str] = tuple(MINI.names), size: int = 40, seed: int = 0
) -> dict[str, float]:
    """Task -> score of an encoder; 0 where its similarities are all the same.

    both: of `dense` or `by_words`.
    """
    scores = {}
    for name in names:
        task = drawn(name, size, seed)
        scores[name] = float(np.nan_to_num(task.score(*both(task.texts))))
    return scores
