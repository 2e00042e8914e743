"""The study of prompted sentence embeddings (2023): one word asked for, against no prompt at all.

SmolLM2-135M is never trained here. A draw is sentence pairs of STS-B that people rated, pairs of
verses from two translations, and rated pairs of words; of each text all layers' states are pooled
in every way after one pass, so that nothing is tried for the prompt alone. Layers and poolings
were chosen on validation pairs, for the baselines over more tries than for the prompt: means with
and without the first token, weighted means and the last token, each at every layer, against one
pooling at every layer. What the paper itself does, the final layer, is kept beside it. One of
twenty demonstrations was chosen on another validation draw, together with its layer.

The contrastive part trains low-rank changes of tiny-4m, at the rank, the factor and the dropout of
the authors' script, on pairs of verses instead of their NLI triples; rates were tuned on two other
seeds, as many for the prompted last token as for the last token alone.

Verses have at most eighteen words. WordSim and SimLex stand whole beside their draws, and Lee's
newspaper texts have one pass without draws. For words no layer was chosen: the final one is
compared, of the prompt and of each way without it. Draws of forty verses, part of these, were
judged before, and trainings of half the steps. Of trainings, five seeds, 5 to 9, were too few to
tell +0.09 of the verses from nothing: with that known, and nothing else changed, twelve others were
declared, and they alone are judged.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from lablib.data.tasks import load_task
from lablib.embeddings import collections, evaluate, lexical, prompt_embeddings
from lablib.embeddings.encode import POOLINGS, Encoder
from lablib.evidence import Pair, grid, matching, paired
from lablib.models.weights import pretrained

MODEL, TRAINED = "smollm2-135m-instruct", "tiny-4m"
PAIRS = {"sts-b": 60, "verses": 60, "words": 60}  # of a draw
WORDS = 18  # of a verse, at most
STEPS, BATCH = 60, 16
JUDGED = 200  # verse pairs that a trained model is judged on
PLAIN = POOLINGS[:4]  # the first token alone has seen nothing of the text


def run(
    task: str,
    seed: int = 0,
    model: str = MODEL,
    pairs: int | None = None,
    tuned: bool = False,
    demonstration: int | None = None,
    demonstrations: int = 1,
    prompted: bool | None = None,
    rate: float = 1e-3,
    steps: int = STEPS,
    before: str | None = None,
    after: str | None = None,
) -> dict:
    """One draw of texts, judged on all layers; or a training by contrast.

    task: "sts-b", "verses", "words"; "texts" for these three; "news"; "simlex", words again;
        "search", in which several demonstrations from the given one on are tried; "train"; or "all"
        but simlex, small.
    pairs: None are those of PAIRS. Seeds from 100 on draw validation pairs. tuned: tell what the
        chosen layers give, too. demonstration: number of the candidate that stands in front, None
        for none. before, after: another prompt. prompted, rate, steps: of a training.
    Spearman's correlation of cosines and ratings, or of verses the share that finds its partner.
    "TASK plain mean" and so on are lists, a value a layer, "TASK prompt final" that of the final
    layer; "TASK prompt cosine" the mean cosine of pairs there. "TASK mean", "last", "prompt" and
    "shown" are those of the chosen layers.
    """
    if task == "train":
        return trained(prompted, seed, rate, steps, model, pairs or JUDGED)
    if task == "search":
        return searched(seed, model, pairs, demonstration, demonstrations)
    if task == "all":
        return everything(seed, model, pairs, steps)
    parts = tuple(PAIRS) if task == "texts" else (task,)
    told = {}
    for part in parts:
        shown = demonstration if part == "sts-b" else None
        row = measured(part, seed, model, pairs, shown, before, after)
        told |= row | (chosen(row, part) if tuned and part in TUNED else {})
    return {
        key: value if isinstance(value, list) else round(value, 6) for key, value in told.items()
    }


def measured(
    task: str,
    seed: int,
    model: str,
    pairs: int | None,
    demonstration: int | None,
    before: str | None = None,
    after: str | None = None,
) -> dict:
    """The curves over layers of one draw: without the prompt, with it, with a demonstration."""
    a, b, gold = drawn(task, seed, pairs)
    plain = Encoder(*opened(model))
    asking = prompt_embeddings.prompted(plain)
    given = {"before": before, "after": after}
    own = {side: words for side, words in given.items() if words is not None}
    asking = replace(asking, prompt=asking.prompt._replace(**own))
    kinds = {"plain": (plain, PLAIN), "prompt": (asking, ("last", "mean-but-first"))}
    if demonstration is not None:
        candidate = prompt_embeddings.CANDIDATES[demonstration]
        kinds["shown"] = (prompt_embeddings.prompted(plain, [candidate]), ("last",))
    told = {}
    for kind, (encoder, poolings) in kinds.items():
        told |= scores(f"{task} {kind}", encoder, poolings, a, b, gold)
    return told


def scores(name: str, encoder: Encoder, poolings, a: list, b: list, gold) -> dict:
    """Of each pooling a list, a value a layer, the final layer's, and the mean cosine there."""
    texts = list(dict.fromkeys([*a, *b]))
    place = {text: row for row, text in enumerate(texts)}
    vectors = prompt_embeddings.every_layer(encoder, texts, poolings)
    told = {}
    for pooling, layers in vectors.items():
        sides = [layers[:, [place[t] for t in side]].numpy() for side in (a, b)]
        curve = [score(one, other, gold) for one, other in zip(*sides)]
        told[f"{name} {pooling}"] = [round(value, 4) for value in curve]
        told[f"{name} {pooling} final"] = curve[-1]
        ours, theirs = (evaluate.unit(side[-1]) for side in sides)
        told[f"{name} {pooling} cosine"] = float((ours * theirs).sum(1).mean())
    return told


def score(a: np.ndarray, b: np.ndarray, gold) -> float:
    """Spearman's correlation with ratings; without ratings, the share that finds its partner.

    0 where all cosines are the same, as of the last token before the first layer.
    """
    if gold is None:
        return evaluate.bitext(a, b)["accuracy"]
    return float(np.nan_to_num(evaluate.sts(a, b, gold)["spearman"]))


def by_words(task: str, seed: int) -> dict[str, float]:
    """`score` of two counts of words, "tf-idf" and "BM25", on the texts of a draw.

    BM25 has no vectors: the first text of a pair asks, the second ones are what is searched.
    """
    a, b, gold = drawn(task, seed, None)
    weigh = lexical.tfidf_vectors(list(dict.fromkeys([*a, *b])))
    known = list(dict.fromkeys(b))
    table = lexical.bm25(known)(a)  # (pairs, texts)
    own = np.array([known.index(text) for text in b])
    if gold is None:
        ranked = float((table.argmax(1) == own).mean())
    else:
        ranked = evaluate.correlation(table[np.arange(len(a)), own], gold)["spearman"]
    counted = score(weigh(a).toarray(), weigh(b).toarray(), gold)
    return {"tf-idf": counted, "BM25": float(np.nan_to_num(ranked))}


def chosen(row: dict, task: str) -> dict:
    """What the layers and poolings chosen on validation pairs give."""
    picked = {}
    for name, (kind, pooling, layer) in TUNED[task].items():
        curve = row.get(f"{task} {kind} {pooling}")
        if curve:
            picked[f"{task} {name}"] = curve[min(layer, len(curve) - 1)]
    return picked


def searched(seed: int, model: str, pairs: int | None, first: int, count: int) -> dict:
    """Each candidate in front, one at a time: its curve over layers on one draw of STS-B."""
    a, b, gold = drawn("sts-b", seed, pairs)
    plain, told = Encoder(*opened(model)), {}
    for number in range(first, first + count):
        encoder = prompt_embeddings.prompted(plain, [prompt_embeddings.CANDIDATES[number]])
        row = scores(f"{number}", encoder, ("last",), a, b, gold)
        told[f"demonstration {number}"] = row[f"{number} last"]
        told[f"demonstration {number} final"] = round(row[f"{number} last final"], 6)
    return told


def trained(
    prompted: bool, seed: int, rate: float, steps: int, model: str = TRAINED, judged: int = JUDGED
) -> dict:
    """The last token's state, trained by contrast on pairs of verses, with or without a prompt.

    accuracy: share of judged verses that find their partner; untrained: before; curve: mean loss
    of ten parts of the training, nats.
    """
    encoder = Encoder(*pretrained(model), pooling="last", max_length=prompt_embeddings.LENGTH)
    if prompted:
        prompt = prompt_embeddings.IN_ONE_WORD
        more = len(encoder.tokenizer("".join(prompt))["input_ids"])
        encoder = replace(encoder, prompt=prompt, max_length=encoder.max_length + more)
    test = short_verses("validation" if seed >= 100 else "test")[:judged]
    told = {"untrained": partners(encoder, test)}
    verses = short_verses("train")
    order = np.random.default_rng(seed).permutation(len(verses))[: steps * BATCH]
    learned = [verses[place] for place in order]
    losses = prompt_embeddings.tune_(encoder, learned, steps, rate, BATCH, seed)
    parts = np.array_split(losses, min(10, steps))
    told |= {"accuracy": partners(encoder, test)}
    return told | {
        "curve": [round(float(part.mean()), 4) for part in parts],
        "loss": float(losses[-1]),
    }


def partners(encoder: Encoder, test: list) -> float:
    """The share of verses whose partner is the nearest of the others' translations."""
    a, b = zip(*test)
    return evaluate.bitext(encoder(a), encoder(b))["accuracy"]


def everything(seed: int, model: str, pairs: int, steps: int) -> dict:
    """Every kind of task with few texts: smooth numbers of it, the mean cosines and the loss."""
    told = run("texts", seed, model, pairs, True, 0) | run("news", seed, model, pairs)
    told |= run("search", seed, model, pairs, demonstration=3)
    told = {key: value for key, value in told.items() if key.endswith("cosine")}
    loss = trained(True, seed, 1e-3, steps, model, pairs)["loss"]
    return told | {"loss": loss, "plain loss": trained(False, seed, 1e-3, steps, model, 2)["loss"]}


@lru_cache(maxsize=1)
def opened(model: str):
    """A model and its tokenizer, which no run changes."""
    return pretrained(model)


def drawn(task: str, seed: int, pairs: int | None) -> tuple[list[str], list[str], object]:
    """Texts a and b of a draw, and ratings or None; no pair is in two draws of a split."""
    number, n = seed % 100, pairs or PAIRS.get(task, PAIRS["words"])
    if task == "verses":
        rows = short_verses("validation" if seed >= 100 else "test")[number * n : (number + 1) * n]
        return [row[0] for row in rows], [row[1] for row in rows], None
    if task == "news":
        texts, places, ratings = collections.lee()
        keep = [row for row, (_, last) in enumerate(places) if last < (pairs or len(texts))]
        sides = [[texts[i] for i in places[keep, side]] for side in (0, 1)]
        return *sides, ratings[keep]
    if task in ("words", "simlex"):
        rows, ratings = collections.wordsim() if task == "words" else collections.simlex()
    else:
        examples = load_task("sts-b")[1 if seed >= 100 else 2]
        rows = [(example.text, example.pair) for example in examples]
        ratings = np.array([example.label for example in examples])
    keep = np.random.default_rng(1).permutation(len(rows))[number * n : (number + 1) * n]
    return [rows[i][0] for i in keep], [rows[i][1] for i in keep], ratings[keep]


@lru_cache(maxsize=3)
def short_verses(split: str) -> list[tuple[str, str]]:
    """Pairs of verses with at most WORDS words in either translation."""
    rows = collections.pairs("verses", split)
    return [row for row in rows if max(len(text.split()) for text in row) <= WORDS]


TUNED = {  # of each task: kind, pooling and layer of the highest mean over the tuning draws
    "sts-b": {
        "mean": ("plain", "mean-but-first", 21),
        "last": ("plain", "last", 28),
        "prompt": ("prompt", "last", 28),
        "shown": ("shown", "last", 29),
    },
    "verses": {
        "mean": ("plain", "mean-but-first", 12),
        "last": ("plain", "last", 17),
        "prompt": ("prompt", "last", 29),
    },
}
BEST = 13  # the demonstration of the search's highest correlation
RATES = (5e-4, 2e-3, 4e-3, 8e-3, 3e-2)
SEARCH = 102

SEEDS, FRESH = range(5), range(10, 22)
LEARNED = {"task": "train", "model": TRAINED, "steps": STEPS}
POINTS = [
    *grid(task="texts", seed=SEEDS, tuned=True, demonstration=BEST),
    {"task": "news"},
    *grid(task="simlex", seed=SEEDS),
    {"task": "words", "pairs": 353},
    {"task": "simlex", "pairs": 999},
    *grid(**LEARNED, seed=FRESH, prompted=True, rate=8e-3),
    *grid(**LEARNED, seed=FRESH, prompted=False, rate=4e-3),
]
TUNING = [
    *grid(task=("sts-b", "verses"), seed=(100, 101)),
    {"task": "sts-b", "seed": SEARCH, "pairs": 32},
    *grid(task="search", seed=SEARCH, pairs=32, demonstration=range(0, 20, 5), demonstrations=5),
    *grid(**LEARNED, seed=(100, 101), prompted=(True, False), rate=RATES),
]
CANARY = {"task": "all", "seed": 200, "model": "tiny-1m", "pairs": 3, "steps": 2}

ROLES = {
    "prompt": {"method": "sts-b prompt", "baseline": "sts-b mean", "control": "sts-b last"},
    "demonstration": {
        "method": "sts-b shown",
        "baseline": "sts-b prompt",
        "control": "sts-b last",
    },
    "trained": {
        "method": {"task": "train", "prompted": True},
        "baseline": {"task": "train", "prompted": False},
        "control": None,  # "untrained" is no run of its own; this lab's tests put it in by hand
    },
    "verses": {"method": "verses prompt", "baseline": "verses mean", "control": "verses last"},
    "words": {
        "method": "words prompt last final",
        "baseline": "words plain mean final",
        "control": "words plain last final",
    },
}


def values(runs: list) -> dict:
    """A pair a seed for each claim."""
    texts = matching(runs, task="texts")
    made = {task: beside_better(texts, task) for task in ("sts-b", "verses")}
    shown = [Pair(run["seed"], run["sts-b shown"], run["sts-b prompt"]) for run in texts]
    roles = ROLES["trained"]
    learned = paired(runs, roles["method"], roles["baseline"], "accuracy")
    return {
        "prompt": made["sts-b"],
        "demonstration": shown,
        "trained": learned,
        "verses": made["verses"],
        "words": beside_best(texts),
    }


def beside_best(texts: list) -> list[Pair]:
    """Of single words, the prompt's final state beside the best of PLAIN on average."""
    keys = [f"words plain {pooling} final" for pooling in PLAIN]
    rival = max(keys, key=lambda key: np.mean([run[key] for run in texts]))
    return [Pair(run["seed"], run[ROLES["words"]["method"]], run[rival]) for run in texts]


def beside_better(texts: list, task: str) -> list[Pair]:
    """The prompt beside the one of mean and last token that is better on average."""
    means = {name: np.mean([run[f"{task} {name}"] for run in texts]) for name in ("mean", "last")}
    rival = max(means, key=means.get)
    return [Pair(run["seed"], run[f"{task} prompt"], run[f"{task} {rival}"]) for run in texts]
