"""The study of an overview (2024): its methods in one table, on six tasks.

Of one draw of texts, all rows are made; texts are short, the first words of each, so that all fits
into minutes of one core: two hundred a task, and half of them for SmolLM2. Rows of tiny-4m and
tiny-1m, two small decoders, of MiniLM and of words are made on all tasks. SmolLM2 reads four of
them, three times: as texts are, told twice, and within a prompt. All are pooled from the final
states: layers were not chosen, for plain means no more than for echo. The few texts that have more
tokens than half of the limit are cut in both copies of echo, and not where they are told once.

"tuned" is tiny-4m after a short contrastive training on verses, with a Matryoshka loss, or, where
the task is docstrings, on docstrings; its rate was chosen on two other seeds, of three. Each draw
trains its own. BM25 has no rate; its two ways of splitting names stand side by side. The one
that splits them is compared, as was settled beforehand and not tuned: docstrings write apart what
code joins.

Prompts are chosen within a draw, on half of its pairs, and compared on the other half: on tuning
seeds one prompt was best on most tasks, so that choosing there would compare it with itself.
Tuning seeds, from 100 on, draw from other splits than the judging seeds.

Beside these stand rows that need no training here; then two tasks, news and languages, and models
that three other labs of the theme train, each by that lab's own code, anew for each draw: m-ST5's
middle encoder of bytes (1001), tiny-4m with GRL's losses (1004), DRAMA's student (1005). No claim
is judged on any of them. News are the first words of newspaper texts, too few to keep some for
other seeds; languages are messages and names that this draw's m-ST5 has not seen, each with its
translation into one of eighteen languages.

An earlier design had fewer pairs and other draws, and its verdicts were known. Left out for time:
SmolLM2 on two tasks of six and in other rows, and whatever is tuned on docstrings on other tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch

from lablib.data.tasks import load_task
from lablib.embeddings import collections, drama, evaluate, l3prune, lexical, students, ullme
from lablib.embeddings import embedding_overview as overview
from lablib.embeddings import mini_benchmark as mini
from lablib.embeddings.contrastive import info_nce, matryoshka
from lablib.embeddings.encode import Encoder, Prompt, batches, pool, states
from lablib.embeddings.prompt_embeddings import CANDIDATES, with_demonstrations
from lablib.embeddings.sentence_t5 import byte_tokens, vectors
from lablib.evidence import Pair, grid, matching
from lablib.models import pretrained
from lablib.models.classifier import encoder
from lablib.studies import drama as lab_1005
from lablib.studies import sentence_t5 as lab_1001
from lablib.studies import ullme as lab_1004

WORDS = {"verses": 14, "headings": 16, "docstrings": 16, "sts-b": 14}  # of a text, the first ones
TASKS = tuple(WORDS)
LONGER = {"news": 40, "languages": 14}  # the same, of tasks that were added
ALL = (*TASKS, *LONGER)
READ = 256  # tokens of one of their texts, and of both copies of echo
SIZE, LLM_SIZE = 100, 50  # pairs of a task
STEPS, BATCH, LENGTH = 40, 24, 24  # of training; tokens of a text
DIMS = (32, 256)  # that are trained to do alone
KEEP = 64  # words of a sparse vector
LLM = "smollm2-135m-instruct"
E5 = "multilingual-e5-small"
RATES = (3e-4, 1e-3, 3e-3)
RATE = {"verses": 1e-3, "docstrings": 1e-3}


def run(
    kind: str,
    seed: int,
    size: int = SIZE,
    llm_size: int = LLM_SIZE,
    steps: int = STEPS,
    rate: float | None = None,
) -> dict:
    """Every row's score on every task: "row | task".

    kind: "draw", all rows but SmolLM2's, which are "llm"; "more", those of other labs; "theme",
        those that other labs train, on ALL tasks, and all rows on LONGER; "prompts" and "rate" a
        part of a draw, to choose by; or "canary".
    size: pairs of a task, llm_size of SmolLM2's. steps, rate: of the training, None the chosen one.
    A score is nDCG@10, and of RATED tasks Spearman's correlation. own prompts, one prompt: mean
    over TASKS.
    """
    if kind == "canary":
        found = table({"tiny-1m, echo": overview.Echo(small("tiny-1m"))}, ("verses",), seed, size)
        return found | trained("verses", seed, size, steps, rate, "tiny-1m")
    told = {}
    if kind in ("draw", "prompts"):
        told |= prompts(seed, size)
    if kind in ("draw", "rate"):
        for name in ("verses", "docstrings"):
            told |= trained(name, seed, size, steps, rate)
    if kind == "llm":
        told |= llm_rows(seed, llm_size)
    if kind == "more":
        told |= more(seed, size)
    if kind == "theme":
        told |= theme(seed, size)
        told |= table(rows(READ), LONGER, seed, size) | sparse_rows(seed, size, LONGER, READ)
        told |= more(seed, size, LONGER, READ)
        one = replace(learned("verses", seed, STEPS, RATE["verses"]), max_length=READ)
        told |= table({"tuned on verses": one}, LONGER, seed, size)
    if kind == "draw":
        told |= table(rows(), TASKS, seed, size) | sparse_rows(seed, size)
    return told


# Tasks.


def texts_of(name: str, seed: int, size: int) -> tuple[list[str], list[str], list[float]]:
    """(a, b, gold): pairs of short texts that a seed draws, and ratings where there are some."""
    split = "validation" if seed >= 100 else "test"
    draw = np.random.default_rng([seed, ALL.index(name)])
    if name in LONGER:
        a, b, gold = news(size, draw) if name == "news" else translated(seed, size, draw)
        return mini.cut(a, LONGER[name]), mini.cut(b, LONGER[name]), gold
    if name == "sts-b":
        chosen = mini.some(getattr(load_task(name), split), size, draw)
        a, b, gold = zip(*((e.text, e.pair, e.label) for e in chosen))
    else:
        a, b = zip(*mini.some(collections.pairs(name, split), size, draw))
        gold = ()
    return mini.cut(a, WORDS[name]), mini.cut(b, WORDS[name]), list(gold)


def news(size: int, draw: np.random.Generator) -> tuple[list[str], list[str], list[float]]:
    """Pairs of Lee's newspaper texts, and how alike people found them."""
    texts, places, ratings = collections.lee()
    chosen = mini.some(range(len(places)), size, draw)
    a, b = ([texts[place] for place in places[chosen, side]] for side in (0, 1))
    return a, b, ratings[chosen].tolist()


def translated(
    seed: int, size: int, draw: np.random.Generator
) -> tuple[list[str], list[str], list[float]]:
    """English messages and names that m-ST5 has not seen, each in a language drawn for it.

    Messages come first, and names fill up.
    """
    held, pairs = lab_1001.drawn(seed, lab_1001.LANGUAGES)["held_out"], []
    for kind, texts in held.items():
        table_ = lab_1001.table_of(kind, lab_1001.LANGUAGES)
        columns = draw.integers(1, 1 + len(lab_1001.LANGUAGES), len(texts))
        pairs += [(text, table_[text][column]) for text, column in zip(texts, columns)]
    a, b = zip(*pairs[:size])
    return list(a), list(b), []


RATED = ("sts-b", "news")


def score(similarities: np.ndarray, gold: Sequence[float]) -> float:
    """Of text a[i] with each b: nDCG@10 of finding b[i], or how ratings agree with the own b's."""
    if gold:
        found = evaluate.correlation(similarities.diagonal(), gold)["spearman"]
    else:
        found = evaluate.retrieval(similarities, range(len(similarities)))["ndcg@10"]
    return round(float(np.nan_to_num(found)), 5)


def table(methods: dict[str, Callable], names: Sequence[str], seed: int, size: int) -> dict:
    """ "row | task" -> score of methods that make vectors."""
    told = {}
    for name in names:
        a, b, gold = texts_of(name, seed, size)
        for row, embed in methods.items():
            told[f"{row} | {name}"] = score(evaluate.cosine(embed(a), embed(b)), gold)
    return told


# Rows.


@lru_cache(maxsize=3)
def small(name: str) -> Encoder:
    return Encoder(*pretrained(name), max_length=2 * LENGTH)


@lru_cache(maxsize=1)
def minilm() -> Encoder:
    return Encoder(*encoder("minilm-l6-v2"))


def rows(length: int = 2 * LENGTH) -> dict[str, Callable]:
    """Methods that need no training here. length: tokens that tiny models read, at most."""
    tiny = replace(small("tiny-4m"), max_length=length)
    return {
        "MiniLM": minilm(),
        "tiny-1m, mean": replace(small("tiny-1m"), max_length=length),
        "tiny-4m, mean": tiny,
        "tiny-4m, last token": replace(tiny, pooling="last"),
        "tiny-4m, sees both ways": replace(tiny, causal=False),
        "tiny-4m, two blocks": replace(tiny, layer=2),
        "tiny-4m, echo": overview.Echo(tiny),
    }


ASKED = {  # what an instruction says of each task
    "verses": "Given a Bible verse, retrieve its other translation.",
    "headings": "Given a heading of a manual, retrieve its section.",
    "docstrings": "Given a sentence, retrieve the function that does it.",
    "sts-b": "Retrieve sentences that mean the same.",
}
ASKED_TOO = {
    "news": "Retrieve news on the same event.",
    "languages": "Given a message, retrieve its translation.",
}
SHOWN = 13  # the demonstration that lab 1002's search chose, for SmolLM2


def more(
    seed: int, size: int, names: Sequence[str] = TASKS, length: int = 4 * LENGTH
) -> dict[str, float]:
    """Rows from other labs of the theme that need no training here.

    multilingual-e5-small of lab 1001, with its "query: " before every text; a demonstration of
    1002; the cut of 1003, after one block; then an instruction before queries alone, and the mean
    over all prompts. Nothing of them was chosen here.
    """
    tiny = replace(small("tiny-4m"), max_length=length)
    last = replace(tiny, pooling="last")
    shown = with_demonstrations(CANDIDATES[SHOWN : SHOWN + 1])
    methods = {
        "multilingual-e5-small": Encoder(*encoder(E5), prompt=Prompt("query: ")),
        "tiny-4m, demonstration": replace(last, prompt=shown),
        "tiny-4m, one block": l3prune.cut(tiny, 1),
        "tiny-4m, several prompts": partial(
            overview.several, last, prompts=[*overview.PROMPTS.values()]
        ),
    }
    told = table(methods, names, seed, size)
    for name in names:
        a, b, gold = texts_of(name, seed, size)
        task = (ASKED | ASKED_TOO)[name]
        asked = tiny([overview.instruct(task, text) for text in a])
        told[f"tiny-4m, instructed | {name}"] = score(evaluate.cosine(asked, tiny(b)), gold)
    return told


M_ST5 = {"dim": 128, "rate": 1.5e-3, "steps": 300}
GRL = {"weight": 0.1, "rate": 1e-3, "steps": 60}


def theme(seed: int, size: int) -> dict[str, float]:
    """Rows of models that labs 1001, 1004 and 1005 train, on ALL tasks: first texts, second texts.

    Each is trained anew, as it is there. DRAMA's queries have their prefix, where there are
    queries.
    """
    query, text = drama_student(seed)
    both = {"m-ST5": (sentence_t5(seed),) * 2, "tiny-4m, GRL": (grl(seed),) * 2}
    told = {}
    for name in ALL:
        a, b, gold = texts_of(name, seed, size)
        both["DRAMA's student"] = (text if gold else query), text
        for row, (first, second) in both.items():
            told[f"{row} | {name}"] = score(evaluate.cosine(first(a), second(b)), gold)
    return told


def sentence_t5(seed: int) -> Callable[[Sequence[str]], torch.Tensor]:
    """Lab 1001's middle encoder of bytes, trained across languages; it reads READ bytes."""
    split = lab_1001.drawn(seed, lab_1001.LANGUAGES)
    model, _ = lab_1001.learned(split, "across", seed, **M_ST5)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> torch.Tensor:
        return vectors(model.eval(), byte_tokens(texts, READ), budget=8192)

    return embed


def grl(seed: int) -> Encoder:
    """Lab 1004's tiny-4m, trained with all three losses on headings."""
    one = Encoder(*pretrained("tiny-4m"), causal=False, max_length=lab_1004.LENGTH)
    own = ullme.Objective((1.0, GRL["weight"], GRL["weight"]))
    lessons = lab_1004.lessons("headings", seed)
    ullme.train_grl(one, lessons, GRL["steps"], GRL["rate"], own, batch=lab_1004.BATCH, seed=seed)
    return replace(one, max_length=READ)


def drama_student(seed: int) -> tuple[Encoder, Encoder]:
    """Lab 1005's student after people's pairs and all that large models made: queries, texts."""
    counts, rate = lab_1005.MIXTURES["augmented"], lab_1005.TUNED["augmented"]
    student, _ = lab_1005.taught(counts, seed, rate)
    return drama.encoders(student, lab_1005.tokens_of(), READ)


def sparse_rows(
    seed: int, size: int, names: Sequence[str] = TASKS, length: int = 2 * LENGTH
) -> dict[str, float]:
    """Methods with a number a word: BM25, tf-idf, and tiny-4m's head."""
    told, tiny = {}, replace(small("tiny-4m"), max_length=length)
    for name in names:
        a, b, gold = texts_of(name, seed, size)
        found = {
            "BM25": lexical.bm25(b, tokenize=lexical.code_words)(a),
            "BM25, names whole": lexical.bm25(b)(a),
            "tf-idf": lexical.tfidf(b, lexical.code_words)(a),
        }
        w = overview.sparse_vectors(tiny, [*a, *b], KEEP).numpy()
        found["tiny-4m, sparse head"] = evaluate.cosine(w[: len(a)], w[len(a) :])
        told |= {f"{row} | {name}": score(scores, gold) for row, scores in found.items()}
    return told


def prompts(seed: int, size: int) -> dict[str, float]:
    """tiny-4m's last token within each prompt, and two ways to choose one.

    "own prompts": on one half of the pairs each task chooses its prompt, "one prompt": all tasks
    together choose one, by their mean; the other half tells how good that is. Both ways round.
    """
    last, ways = replace(small("tiny-4m"), pooling="last"), list(overview.PROMPTS)
    told, halves = {}, np.empty((2, len(TASKS), len(ways)))  # half, task, prompt
    for column, task in enumerate(TASKS):
        a, b, gold = texts_of(task, seed, size)
        for place, way in enumerate(ways):
            one = replace(last, prompt=overview.PROMPTS[way])
            found = evaluate.cosine(one(a), one(b))
            told[f"prompt {way} | {task}"] = score(found, gold)
            for half in (0, 1):
                halves[half, column, place] = score(found[half::2, half::2], gold[half::2])
    gains = [chosen(halves[half], halves[1 - half]) for half in (0, 1)]
    own, common = np.mean(gains, 0).round(6).tolist()
    return told | {"own prompts": own, "one prompt": common}


def chosen(by: np.ndarray, on: np.ndarray) -> tuple[float, float]:
    """Mean score `on` some pairs of each task's best prompt `by` others, and of one for all.

    by, on: (tasks, prompts).
    """
    own = np.take_along_axis(on, by.argmax(1)[:, None], 1)
    return float(own.mean()), float(on[:, by.mean(0).argmax()].mean())


def trained(
    name: str, seed: int, size: int, steps: int, rate: float | None, model: str = "tiny-4m"
) -> dict[str, float]:
    """A decoder tuned on a task's pairs, on that task; the one tuned on verses on all others, too.

    So "tuned | docstrings" has learned from docstrings, "tuned on verses | docstrings" has not.
    """
    one = learned(name, seed, steps, RATE[name] if rate is None else rate, model)
    told = table({"tuned": one}, (name,), seed, size)
    told |= table({"tuned, 32 numbers": lambda t: one(t)[:, :32]}, (name,), seed, size)
    if name == "verses" and model == "tiny-4m":
        others = [task for task in TASKS if task != name]
        told |= table({"tuned on verses": one}, others, seed, size)
    return told


def learned(name: str, seed: int, steps: int, rate: float, model: str = "tiny-4m") -> Encoder:
    """A decoder tuned on a task's pairs, with a Matryoshka loss."""
    one = Encoder(*pretrained(model), max_length=LENGTH)
    draw = np.random.default_rng([seed, 7])
    a, b = zip(*mini.some(collections.pairs(name, "train"), steps * BATCH, draw))
    pairs = list(zip(mini.cut(a, WORDS[name]), mini.cut(b, WORDS[name])))
    dims = [min(dim, one.model.config.dim) for dim in DIMS]
    loss = matryoshka(partial(info_nce, symmetric=True), dims)
    students.train(one, pairs, steps, rate, batch=BATCH, seed=seed, loss=loss)
    return one


POOLED = {"mean": "mean", "mean but first": "mean-but-first", "last token": "last"}


def llm_rows(seed: int, size: int) -> dict[str, float]:
    """SmolLM2: pooled in three ways after one pass, told twice, and prompted."""
    one, told = small(LLM), {}
    for task in TASKS:
        a, b, gold = texts_of(task, seed, size)
        found = pooled_ways(one, [*a, *b])
        found["echo"] = overview.Echo(one)([*a, *b])
        found["one word"] = replace(one, pooling="last", prompt=overview.IN_ONE_WORD)([*a, *b])
        for name, v in found.items():
            similar = evaluate.cosine(v[: len(a)], v[len(a) :])
            told[f"SmolLM2, {name} | {task}"] = score(similar, gold)
    return told


def pooled_ways(one: Encoder, texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Name of POOLED -> (n, dim), of the final states, after one pass."""
    encoded = one.tokens(texts)
    made: dict[str, list] = {name: [torch.empty(0)] * len(texts) for name in POOLED}
    with torch.inference_mode():
        for places in batches(encoded.mask.sum(1).tolist(), 1024):
            part = encoded.at(places)
            h = states(one.model, part)  # (n, length, dim)
            for name, way in POOLED.items():
                for place, vector in zip(places, pool(h, part.mask, way)):
                    made[name][place] = vector
    return {name: torch.stack(vectors) for name, vectors in made.items()}


SEEDS = range(5, 10)
POINTS = grid(kind="prompts", seed=0) + grid(kind=("draw", "llm", "more", "theme"), seed=SEEDS)
TUNING = grid(kind="prompts", seed=(100, 101), size=40)
TUNING += grid(kind="rate", seed=(100, 101), rate=RATES, size=40)
TUNING += grid(kind="llm", seed=100, llm_size=12)
CANARY = {"kind": "canary", "seed": 200, "size": 6, "steps": 2, "rate": 1e-3}

ROLES = {
    "echo": {
        "method": "SmolLM2, echo | verses",
        "baseline": "SmolLM2, mean | verses",
        "control": "SmolLM2, mean but first | verses",
    },
    "paraphrase": {
        "method": "tuned | verses",
        "baseline": "BM25 | verses",
        "control": "tiny-4m, mean | verses",
    },
    "identifiers": {
        "method": "BM25 | docstrings",
        "baseline": "tuned | docstrings",
        "control": "tiny-4m, mean | docstrings",
    },
    # No control is stored: without a prompt there is a score for each task, and no mean of halves.
    "prompts": {"method": "own prompts", "baseline": "one prompt", "control": None},
}


PLAIN = "tiny-4m, mean"
ON_MAP = {  # the table's row of a leaf of `overview.TREE`, where there is one
    "one word": "prompt one word",
    "demonstrations": "tiny-4m, demonstration",
    "step by step": "prompt step by step",
    "many prompts": "tiny-4m, several prompts",
    "echo": "tiny-4m, echo",
    "bidirectional": "tiny-4m, sees both ways",
    "pooling": "tiny-4m, last token",
    "projection": "m-ST5",
    "contrastive": "tuned",
    "generative": "tiny-4m, GRL",
    "Matryoshka": "tuned, 32 numbers",
    "supervised": "tuned on verses",
    "synthetic": "DRAMA's student",
    "instructions": "tiny-4m, instructed",
    "languages": "multilingual-e5-small",
    "code": "BM25",
    "dense": "MiniLM",
    "sparse": "tiny-4m, sparse head",
    "words alone": "BM25, names whole",
    "fewer layers": "tiny-4m, one block",
    "smaller model": "DRAMA's student",
}


def values(runs: list) -> dict:
    """A pair a draw for each claim."""
    draws: dict[int, dict] = {}
    for kind in ("draw", "llm"):
        for run in matching(runs, kind=kind):
            draws.setdefault(run["seed"], {}).update(run)
    nan = float("nan")
    return {
        id: [
            Pair(seed, row.get(roles["method"], nan), row.get(roles["baseline"], nan))
            for seed, row in draws.items()
        ]
        for id, roles in ROLES.items()
    }


def cells(runs: list) -> dict[str, dict[str, list[float]]]:
    """Row -> task -> its scores, one a draw."""
    made: dict[str, dict[str, list[float]]] = {}
    for one in runs:
        for key, value in one.items():
            row, bar, task = key.partition(" | ")
            if bar:
                made.setdefault(row, {}).setdefault(task, []).append(value)
    return made
