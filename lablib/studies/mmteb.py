"""The study of MMTEB (2025): benchmarks cut in half, corpora cut to a tenth, and a mini-benchmark.

"split": of the models with published scores half choose which tasks to keep, the other half are
ranked, by these tasks and by all. "predictable" takes the most predictable tasks out by rank
correlation, as the released selection does; "error" by squared error, which a script beside it
prefers; "random" draws as many, at least one of each type, and "any" without that; "one" is a
single task. "best models" are the best quarter of those ranked. On the splits that the design was
fixed on, "error" was as good as chance, "predictable" worse. Splits share their models, so an
interval tells how much it matters which models choose, not how other models would be ranked.

"sizes" is the same with fewer tasks, two sizes of which the smaller is one task of each type, so
that the rule has no choice but which; no claim is judged on it.

"hard": verses of one translation are looked up in another, by twelve encoders. A tenth of the
corpus is kept, the relevant verses and others: what three of the encoders rank first, or verses at
random. The first corpora were larger and had more queries a draw; then encoding took too long.

"bench": the columns of the mini-benchmark, by family of encoders; one draw of texts, short ones
and few, for SmolLM2's sake. No claim is judged on it. What tunes tiny-4m was not tuned itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from lablib.embeddings import collections, evaluate, lexical, mmteb, students
from lablib.embeddings import mini_benchmark as mini
from lablib.embeddings.encode import Encoder, Prompt, batches, hidden_layers, pool
from lablib.evidence import Pair, grid, matching
from lablib.models import pretrained
from lablib.models.classifier import encoder

ENOUGH = 0.95  # of a rank correlation
FEWER = (10, 7)  # tasks that are kept, of 41 of seven types
RANDOM = 50  # random choices of tasks a split
DRAWS, QUERIES = 8, 15  # of a corpus
SHARE = 0.1  # of a corpus that is kept
TUNED = {"steps": 40, "rate": 1e-3}  # of tiny-4m
FAMILIES = ("words", "minilm", "e5", "tiny", "smollm2", "smollm2-prompt")
TOGETHER = ("words+minilm+e5+tiny", "smollm2+smollm2-prompt")
ONE_WORD = Prompt('This sentence : "', '" means in one word:"')


def run(
    kind: str, seed: int, keep: int = 20, documents: int = 1000, family: str = "", size: int = 40
) -> dict:
    """One split, one corpus, or some families' columns.

    kind: "split", "hard", "bench"; "cuts", a corpus and four splits, in lists; "sizes", as many
    splits as "cuts" have in all, of FEWER tasks; or "canary", a little of each. keep: tasks of 41.
    documents: of a corpus. family: of FAMILIES, joined by plus signs. size: of the mini-benchmark's
    tasks.
    """
    if kind == "split":
        return split(seed, keep)
    if kind == "hard":
        return hard(seed, documents)
    if kind == "cuts":
        rows = [split(number, keep) for number in numbers(seed)]
        return {key: [row[key] for row in rows] for key in rows[0]} | hard(seed, documents)
    if kind == "sizes":
        return sizes(range(seed, seed + 20))
    if kind == "canary":
        texts = collections.pairs("docstrings", "test")[:documents]
        told = one_draw(searched(*zip(*texts), some=SMALL), np.arange(2), np.random.default_rng(0))
        words = mini.column(columns("words")["tf-idf"], ("wordsim", "messages-fr"), size)
        return split(seed, keep) | words | {"nDCG": float(np.mean(told["kept"]))}
    told = {}
    for one in family.split("+"):
        for name, both in columns(one).items():
            row = mini.column(both, size=size, seed=seed)
            told |= {f"{name} | {task}": round(score, 4) for task, score in row.items()}
    return told


def numbers(seed: int) -> range:
    """Of the splits that go with a corpus."""
    return range(4 * seed, 4 * seed + 4)


# Tasks.


def sizes(splits: Sequence[int]) -> dict[str, list[float]]:
    """ "10 predictable", "10 random" and so on: a value a split, of FEWER tasks kept."""
    told: dict[str, list[float]] = {}
    for keep in FEWER:
        for number in splits:
            row = split(number, keep)
            for key in ("predictable", "error", "random"):
                told.setdefault(f"{keep} {key}", []).append(row[key])
    return told


def split(seed: int, keep: int) -> dict[str, float]:
    """Spearman of held-out models' means over kept tasks and over all."""
    _, scores = mmteb.published(mmteb.ENGLISH_V2)
    types = mmteb.ENGLISH_V2.types
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(scores))
    known, others = np.array_split(scores[order], 2)
    whole = mmteb.mean(others)
    best = np.argsort(-whole)[: len(whole) // 4]

    def agrees(tasks: Sequence[int], models: Sequence[int] = range(len(others))) -> float:
        points = mmteb.mean(others[:, list(tasks)])
        return mmteb.spearman(points[list(models)], whole[list(models)])

    drawn = [mmteb.random_tasks(types, keep, draw) for _ in range(RANDOM)]
    free = [draw.choice(len(types), keep, replace=False) for _ in range(RANDOM)]
    told = {"enough": ENOUGH}
    for name, by in (("predictable", "spearman"), ("error", "error")):
        gone = {task for task, _ in mmteb.downsample(known, types, keep=keep, by=by)}
        kept = [task for task in range(len(types)) if task not in gone]
        told |= {name: agrees(kept), f"{name}, best models": agrees(kept, best)}
    told |= {"random": np.mean([agrees(tasks) for tasks in drawn])}
    told |= {"random, best models": np.mean([agrees(tasks, best) for tasks in drawn])}
    told |= {"any": np.mean([agrees(tasks) for tasks in free]), "one": agrees(free[0][:1])}
    return {name: round(float(value), 6) for name, value in told.items()}


# Corpora.


def hard(seed: int, documents: int) -> dict:
    """How a tenth of a corpus orders encoders: Spearman with the order by the whole corpus.

    hard: with what retrievers rank first, chance: with verses at random. whole, kept, at random:
    mean nDCG@10 of each encoder. k: documents that a retriever gives to a query, on average.
    """
    pairs = collections.pairs("verses", "validation" if seed >= 100 else "test")
    draw = np.random.default_rng(seed)
    chosen = [pairs[i] for i in draw.permutation(len(pairs))[:documents]]
    found = searched([a for a, _ in chosen[: DRAWS * QUERIES]], [b for _, b in chosen])
    queries = np.arange(DRAWS * QUERIES).reshape(DRAWS, QUERIES)
    rows = [one_draw(found, some, draw) for some in queries]
    told = {key: np.mean([row[key] for row in rows], 0).round(5).tolist() for key in rows[0]}
    return told | {"encoders": list(found)}


def one_draw(found: dict[str, np.ndarray], queries: np.ndarray, draw: np.random.Generator) -> dict:
    """Some of the queries, whose documents have the same numbers, in the corpus and in a tenth."""
    rows = {name: scores[queries] for name, scores in found.items()}
    n = rows["BM25"].shape[1]
    kept, k = tenth([rows[name] for name in POOLING if name in rows], queries, int(SHARE * n))
    rest = np.setdiff1d(np.arange(n), queries)
    others = np.sort([*queries, *draw.choice(rest, len(kept) - len(queries), replace=False)])
    told: dict = {"k": k, "share": len(kept) / n}
    for name, places in (("whole", np.arange(n)), ("kept", kept), ("at random", others)):
        small = mmteb.renumbered([{int(q): 1.0} for q in queries], places)
        told[name] = [evaluate.retrieval(s[:, places], small)["ndcg@10"] for s in rows.values()]
    told["hard"] = mmteb.spearman(told["kept"], told["whole"])
    told["chance"] = mmteb.spearman(told["at random"], told["whole"])
    return told


def tenth(found: list[np.ndarray], queries: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """The hard-negative split of the largest k that keeps no more documents, and that k."""
    kept, k = np.sort(queries), 0
    while len(more := mmteb.hard_negative_split(queries[:, None].tolist(), found, k + 1)) <= most:
        kept, k = more, k + 1
    return kept, k


LAYERS = {  # None is the last
    "MiniLM": {"": None, ", embeddings": 0, ", block 2": 2, ", block 4": 4},
    "tiny-4m": {"": None, ", embeddings": 0, ", block 2": 2},
    "tiny-4m, tuned": {"": None},
    "tiny-1m": {"": None, ", embeddings": 0},
}
SMALL = ("tiny-1m",)
POOLING = ("BM25", "MiniLM", "tiny-4m, tuned")


def searched(
    queries: Sequence[str], documents: Sequence[str], some: Sequence[str] = tuple(LAYERS)
) -> dict[str, np.ndarray]:
    """Scores (queries, documents) of each retriever."""
    found = {"BM25": lexical.bm25(documents)(queries), "tf-idf": lexical.tfidf(documents)(queries)}
    for name in some:
        one, layers = ENCODERS[name](), list(LAYERS[name].values())
        a, b = (vectors_of(one, texts, layers) for texts in (queries, documents))
        pairs = zip(LAYERS[name], a, b)
        found |= {name + layer: evaluate.cosine(x, y) for layer, x, y in pairs}
    return found


def vectors_of(one: Encoder, texts: Sequence[str], layers: Sequence[int | None]) -> np.ndarray:
    """(layers, n, dim) of several layers in one pass; None is the final norm's."""
    encoded = one.tokens(texts)
    places = [-1 if layer is None else layer for layer in layers]
    made: list = [None] * len(texts)
    with torch.inference_mode():
        for rows in batches(encoded.mask.sum(1).tolist(), 2048):
            part = encoded.at(rows)
            states = hidden_layers(one.model, part)[places]  # (layers, n, length, dim)
            for row, vectors in zip(rows, pool(states, part.mask, one.pooling).unbind(1)):
                made[row] = vectors.float()
    return torch.stack(made, 1).numpy()


# Encoders.


def columns(family: str) -> dict[str, Callable]:
    """Name -> what gives similarities and vectors, for each of a family's encoders."""
    if family == "words":
        return {"BM25": mini.by_words(lexical.bm25), "tf-idf": mini.by_words(lexical.tfidf)}
    if family == "minilm":
        return {"MiniLM": mini.dense(minilm())}
    if family == "e5":
        one = Encoder(*encoder("multilingual-e5-small"), prompt=Prompt("query: "))
        return {"multilingual-e5-small": mini.dense(one)}
    if family == "tiny":
        raw = {"tiny-4m": tiny(), "tiny-4m, tuned": tiny_tuned()}
        raw["averaged embeddings"] = replace(tiny(), layer=0)
        return {name: mini.dense(one) for name, one in raw.items()}
    if family == "smollm2-prompt":
        one = replace(small("smollm2-135m-instruct"), pooling="last", prompt=ONE_WORD)
        return {"SmolLM2, prompt": mini.dense(one)}
    ways = {"SmolLM2, mean": 0, "SmolLM2, block 20": 1}
    return {n: mini.dense(lambda texts, at=at: smollm2(*texts)[at]) for n, at in ways.items()}


@lru_cache(maxsize=len(mini.MINI.tasks))
def smollm2(*texts: str) -> np.ndarray:
    """(2, n, dim): means of the final states, and of those after block 20."""
    return vectors_of(small("smollm2-135m-instruct"), texts, [None, 20])


@lru_cache(maxsize=1)
def minilm() -> Encoder:
    return Encoder(*encoder("minilm-l6-v2"))


@lru_cache(maxsize=3)
def small(name: str) -> Encoder:
    return Encoder(*pretrained(name))


def tiny() -> Encoder:
    return small("tiny-4m")


@lru_cache(maxsize=1)
def tiny_tuned() -> Encoder:
    """tiny-4m after a short contrastive training on verses of other chapters."""
    one = Encoder(*pretrained("tiny-4m"))
    students.train(one, collections.pairs("verses", "train")[:1000], **TUNED, seed=0)
    return one


ENCODERS = {
    "MiniLM": minilm,
    "tiny-4m": tiny,
    "tiny-4m, tuned": tiny_tuned,
    "tiny-1m": lambda: small("tiny-1m"),
}
POINTS = [{"kind": "split", "seed": 20, "keep": 20}]
POINTS += grid(kind="cuts", seed=range(5), documents=1000)
POINTS += [{"kind": "sizes", "seed": 0}]
POINTS += grid(kind="bench", seed=0, family=TOGETHER, size=30)
TUNING = grid(kind="split", seed=range(100, 120)) + grid(kind="hard", seed=100, documents=1000)
CANARY = {"kind": "canary", "seed": 200, "keep": 38, "documents": 40, "size": 10}

ROLES = {
    # Random halves are enough, too: that the choice matters is judged by "better-than-random".
    "halved": {"method": "predictable", "baseline": "enough", "control": "one"},
    "better-than-random": {"method": "predictable", "baseline": "random", "control": "any"},
    "best-models": {
        "method": "predictable, best models",
        "baseline": "enough",
        "control": "random, best models",
    },
    "by-error": {"method": "error", "baseline": "random", "control": "any"},
    # No control is stored: documents at random are the baseline.
    "hard-negatives": {"method": "hard", "baseline": "chance", "control": None},
}


def values(runs: list) -> dict:
    """A pair a seed for each claim."""
    found = {}
    for id, roles in ROLES.items():
        rows = matching(runs, kind="cuts") if id == "hard-negatives" else splits(runs)
        method, baseline = roles["method"], roles["baseline"]
        found[id] = [Pair(row["seed"], row[method], row[baseline]) for row in rows]
    return found


def splits(runs: list) -> list[dict]:
    """Every split's results, its number as the seed."""
    rows = list(matching(runs, kind="split"))
    for run in matching(runs, kind="cuts"):
        keys = [key for key in rows[0] if isinstance(run.get(key), list)]
        for place, number in enumerate(numbers(run["seed"])):
            rows.append({"seed": number} | {key: run[key][place] for key in keys})
    return rows


def table(runs: list) -> tuple[list[str], np.ndarray]:
    """Encoders of the mini-benchmark, and their scores: (encoders, tasks)."""
    cells = {key: x for run in matching(runs, kind="bench") for key, x in run.items() if "|" in key}
    names = list(dict.fromkeys(key.partition(" | ")[0] for key in cells))
    rows = [[cells[f"{name} | {task}"] for task in mini.MINI.names] for name in names]
    return names, np.array(rows)
