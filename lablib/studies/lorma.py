"""The study of LoRMA (2025): weights that are multiplied, against weights that are added to.

"movies": MiniLM's upper two blocks, queries and values; the four below stay, and their states are
computed once. The new layer that reads them trains at the adapters' rate, as in the paper. A seed
is a draw of sentences to learn from and of others to judge on, their order, and the start of what
trains. "licences": `tiny-1m` on the texts of licences, which it was not trained on; queries and
outputs of attention, because these are square, so that LoRA and a multiplier have as many numbers.
A seed is a draw of rows. Ranks are 4 where nothing else is said; alpha is the rank, as in the
paper's scripts.

On one other seed, rates were tuned for LoRA and all multipliers alike, six tries each, by the loss
on what was held out; at ranks 1 and 8, four. The best lies inside its grid each time. The plain
form takes the rotated one's rate, as in the paper's ablation, where nothing but the inflation
differs; where it starts near the weight, it has a rate of its own. Without an adapter, the new
layer takes LoRA's rate. "slow" has one small rate for all. An earlier design, with fewer tries, was
judged on other seeds than these; a later one read Django's documentation in the licences' place,
with the same seeds and tries, and came to the same verdicts.

Smaller than the specification has it, for time: a hundred steps, tuned on one seed. On the tuning
seed, queries and values of two blocks mattered little for movies: a product of the same rank
without inflation, started near the weight, did as well as any. So inflation is judged on licences.
A point of accuracy counts as none, as in the studies of labs 702, 705 and 713, and not half a
point: with so few test sentences that is less than the noise.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from lablib.compression.calibration import token_losses
from lablib.compression.recover import recover
from lablib.data.tasks import licence_texts, load_task
from lablib.evidence import Pair, grid, matching
from lablib.evidence.studies import against
from lablib.models import anatomy, pretrained
from lablib.models.classifier import Classifier, Encoded, cached_below, encode, encoder, predicted
from lablib.models.scores import scored
from lablib.peft.adapter import WeightAdapter, adapters, remove_, trainable
from lablib.peft.lora import lora_
from lablib.peft.lorma import lorma_, numerical_rank, start_near_
from lablib.peft.tuning import tune

RANK = 4
BELOW = 4  # MiniLM's blocks that stay as they are
STEPS = 100
BATCH = 16
SENTENCES = 1000  # to learn from, and as many to judge on
WORDS = 32  # tokens of a sentence, at most
LENGTH = 64  # tokens of a row of licences
LETTERS = 3000  # of a licence, from its beginning
ROLES_OF = {"movies": ["query", "value"], "licences": ["query", "output"]}
INFLATION = {
    "rotate": "rotate",
    "slow": "rotate",
    "slow-add": "add",
    "add": "add",
    "plain": "none",
    "near": "none",
}


def run(
    kind: str,
    seed: int,
    rate: float | None = None,
    text: str = "movies",
    rank: int = RANK,
    steps: int = STEPS,
    sentences: int = SENTENCES,
) -> dict:
    """One training, or several.

    kind: "lora"; "rotate" or "add", a multiplier with that inflation; "slow", "slow-add" and
        "slow-lora", these again, for one small rate; "plain", without an inflation; "near", the
        same, started as near to the base's weights as its rank allows; "head", no adapter; "base",
        nothing that trains. "all" trains those of `ALL` for this text one after another, each at
        the rate that it was tuned to; "licences_lora_nll" is then the nll of "lora" on "licences".
    text: "movies", MiniLM with a new head tells kind sentences from harsh ones; "licences",
        `tiny-1m` reads licences, which it has not seen before. sentences: to learn from, and to
        judge on.
    accuracy: %, nll: nats, both on what was held out; of licences nll alone, nats a token. area:
        mean of the training loss over all steps; curve: the same of ten parts. learning: how many
        numbers train, without the head. full: numerical rank of the changed weights, as a share of
        n. spread: how many singular values hold nine tenths of the change's squares, as a share of
        n.
    """
    if kind == "all":
        names = [(text, one) for one in ALL[text]]
        told = {pair: run(pair[1], seed, None, pair[0], rank, steps, sentences) for pair in names}
        return {
            f"{'_'.join(p)}_{key}": value for p, row in told.items() for key, value in row.items()
        }
    rate = rate_of(kind, text) if rate is None else rate
    trained = on_movies if text == "movies" else on_licences
    model, losses, found = trained(kind, seed, rate, rank, steps, sentences)
    parts = np.array_split(losses, min(10, steps))
    found |= {"area": float(np.mean(losses)), "curve": [round(float(p.mean()), 4) for p in parts]}
    return found | shapes(model)


def on_movies(kind: str, seed: int, rate: float, rank: int, steps: int, sentences: int):
    """The adapted model, its training losses, and how it did."""
    train, labels, test, truth = sentences_of(seed, sentences)
    model = copy.deepcopy(mini()[0])
    torch.manual_seed(seed)
    classifier = Classifier(model, 2, below=BELOW)
    adapt_(model, kind, rank, ROLES_OF["movies"], BELOW)
    losses = tune(classifier, train, labels, steps, rate, batch=BATCH, seed=seed)
    scores = scored(predicted(classifier, test), truth)
    return model, losses, {"accuracy": 100 * scores["accuracy"], "nll": scores["nll"]}


def on_licences(kind: str, seed: int, rate: float, rank: int, steps: int, sentences: int):
    """The same of `tiny-1m`, on licences."""
    train, held_out = rows_of(seed, BATCH * steps, sentences // 10)
    model = copy.deepcopy(tiny()[0])
    torch.manual_seed(seed)
    adapt_(model, kind, rank, ROLES_OF["licences"])
    if kind == "base":
        losses = token_losses(model, train, BATCH).view(steps, -1).mean(1).tolist()
    else:
        names = list(trainable(model))
        losses = recover(model, train, steps, rate, batch=BATCH, trainable=names, seed=None)
    return model, losses, {"nll": token_losses(model, held_out, 32).mean().item()}


def adapt_(model: nn.Module, kind: str, rank: int, roles: list[str], below: int = 0) -> None:
    """Put a kind's adapters into the blocks from number `below` on."""
    if kind in ("head", "base"):
        return
    if kind in ("lora", "slow-lora"):
        lora_(model, roles, rank=rank)
    else:
        lorma_(model, roles, rank=rank, inflation=INFLATION[kind])
    if kind == "near":
        start_near_(model)
    for block in anatomy.blocks(model)[:below]:
        remove_(block)


def shapes(model: nn.Module) -> dict:
    """How many numbers train, and what became of the weights: mean over the adapted ones."""
    layers = [a for a in adapters(model).values() if isinstance(a, WeightAdapter)]
    learning = sum(p.numel() for p in trainable(model).values())
    told = [(numerical_rank(a.weight), spread(a.delta()), min(a.weight.shape)) for a in layers]
    full = float(np.mean([rank / n for rank, _, n in told] or [0.0]))
    wide = float(np.mean([many / n for _, many, n in told] or [0.0]))
    return {"learning": learning, "full": full, "spread": wide}


def spread(change: Tensor, share: float = 0.9) -> int:
    """How many singular values hold this share of the sum of their squares."""
    squares = torch.linalg.svdvals(change.detach().double()).square()
    return int((squares.cumsum(0) < share * squares.sum()).sum()) + 1


@lru_cache(maxsize=1)
def mini():
    """MiniLM and its tokenizer."""
    return encoder()


@lru_cache(maxsize=1)
def tiny():
    """The house's small decoder and its tokenizer."""
    return pretrained("tiny-1m")


@lru_cache(maxsize=1)
def sentences_of(seed: int, count: int) -> tuple[Encoded, Tensor, Encoded, Tensor]:
    """A seed's sentences to learn from and to judge on, as MiniLM's lower blocks leave them."""
    model, tokenizer = mini()
    train, validation, test = load_task("movies")
    draw, made = np.random.default_rng(seed), []
    for examples in (train, [*validation, *test]):
        chosen = [examples[i] for i in draw.choice(len(examples), count, replace=False)]
        chosen.sort(key=lambda example: len(example.text))  # sentences of a length together
        encoded = encode(tokenizer, [example.text for example in chosen], length=WORDS)
        labels = torch.tensor([example.label for example in chosen])
        made += [cached_below(model, encoded, BELOW), labels]
    return tuple(made)


@lru_cache(maxsize=1)
def licences() -> tuple[Tensor, Tensor]:
    """Rows (n, LENGTH + 1) of licences: to learn from, and held out, near-copies on one side."""
    tokenizer, made = tiny()[1], []
    for documents in licence_texts():
        texts = [document.text[:LETTERS] for document in documents]
        ids = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
        made.append(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))
    return tuple(made)


def rows_of(seed: int, count: int, held: int) -> tuple[Tensor, Tensor]:
    """A seed's rows, to learn from and held out."""
    draw = np.random.default_rng(seed)
    train, held_out = licences()
    return tuple(
        rows[draw.choice(len(rows), n, replace=False)]
        for rows, n in ((train, count), (held_out, held))
    )


MARGIN = 1.0  # points of accuracy that count as none
SLOW = 1e-3
RATES = {
    "movies": (1e-3, 3e-3, 5.6e-3, 1e-2, 1.7e-2, 3e-2),
    "licences": (1e-2, 1.7e-2, 3e-2, 5.6e-2, 1e-1, 3e-1),
}
TUNED = {
    "movies": {"lora": 5.6e-3, "rotate": 3e-3, "add": 3e-3, "near": 5.6e-3},
    "licences": {"lora": 5.6e-2, "rotate": 5.6e-2, "add": 5.6e-2, "near": 3e-2},
}
LIKE = {"plain": "rotate", "head": "lora", "base": "lora"}  # whose rate a kind takes


def rate_of(kind: str, text: str = "movies") -> float:
    """The rate that a kind was tuned to, or takes."""
    return SLOW if kind.startswith("slow") else TUNED[text][LIKE.get(kind, kind)]


ALL = {
    "movies": ("lora", "rotate", "head", "add", "plain", "near", "slow", "slow-lora", "slow-add"),
    "licences": ("lora", "rotate", "add", "plain", "near", "base"),
}
SEEDS = range(5, 13)
POINTS = [
    *grid(kind="rotate", seed=5, text="licences", rank=1),  # short enough to be repeated
    *grid(kind="all", seed=SEEDS),
    *grid(kind="all", seed=SEEDS, text="licences"),
]
RANKS = (1, 8)  # others than RANK
RANK_RATES = {  # text, kind -> of each of these ranks
    ("licences", "lora"): (1e-1, 3e-2),
    ("licences", "rotate"): (1e-1, 3e-2),
    ("licences", "add"): (3e-2, 3e-2),
    ("movies", "lora"): (1e-2, 3e-3),
    ("movies", "rotate"): (3e-3, 3e-3),
    ("movies", "add"): (1e-2, 3e-3),
}
RANKED = 5  # seeds
for (text, kind), rates in RANK_RATES.items():
    for rank, rate in zip(RANKS, rates):
        POINTS += grid(kind=kind, text=text, rank=rank, rate=rate, seed=SEEDS[:RANKED])
TUNING = [
    *grid(text="movies", seed=100, kind=TUNED["movies"], rate=RATES["movies"]),
    *grid(text="licences", seed=100, kind=TUNED["licences"], rate=RATES["licences"]),
]
for text, rates in {
    "licences": (1e-2, 3e-2, 1e-1, 3e-1),
    "movies": (1e-3, 3e-3, 1e-2, 3e-2),
}.items():
    kinds = ("lora", "rotate", "add")
    TUNING += grid(text=text, seed=100, kind=kinds, rank=RANKS, rate=rates)
CANARY = {
    "kind": "rotate",
    "seed": 200,
    "rate": 1e-3,
    "text": "movies",
    "rank": 2,
    "steps": 2,
    "sentences": 40,
}


ALONE = "movies_head_area"  # a new layer and no adapter
ROLES = {
    # Whoever does nothing is not on par: it stands in the baseline's place already.
    "on-par": against("movies_rotate_accuracy", "movies_head_accuracy"),
    "on-par-add": against("movies_add_accuracy", "movies_head_accuracy"),
    "area": against("movies_rotate_area", "movies_lora_area", ALONE),
    "area-add": against("movies_add_area", "movies_lora_area", ALONE),
    # A new layer alone was trained at a larger rate than "slow", so it is no control of that.
    "area-slow": against("movies_slow_area", "movies_slow-lora_area"),
    "area-slow-add": against("movies_slow-add_area", "movies_slow-lora_area"),
    # "near" is not inflated, but at a rate of its own; it is below "plain", too. How much of the
    # effect is inflation's, "inflation-near" judges.
    "inflation": against("licences_rotate_nll", "licences_plain_nll"),
    "inflation-add": against("licences_add_nll", "licences_plain_nll"),
    "inflation-near": against("licences_rotate_nll", "licences_near_nll", "licences_plain_nll"),
    "licences": against("licences_rotate_nll", "licences_lora_nll", "licences_base_nll"),
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, or a number a seed."""
    every = of_seeds(runs)
    found = {id: pairs_of(every, of["method"], of["baseline"]) for id, of in ROLES.items()}
    for id in ("on-par", "on-par-add"):
        pairs = pairs_of(every, ROLES[id]["method"], "movies_lora_accuracy")
        found[id] = [pair._replace(method=pair.method + MARGIN) for pair in pairs]
    return found | {"rank-trained": [run["movies_rotate_full"] for run in every]}


def of_seeds(runs: list) -> list[dict]:
    """A seed's runs of all kinds as one, keys beginning with text and kind."""
    seeds: dict[int, dict] = {}
    for run in runs:
        told = seeds.setdefault(run["seed"], {"seed": run["seed"]})
        if run["kind"] == "all":
            told |= run
    return list(seeds.values())


def at_rank(runs: list, kind: str, rank: int, text: str, key: str = "nll") -> list[float]:
    """A kind's results with a rank, of the seeds that have other ranks, too."""
    if rank == RANK:
        return [run[f"{text}_{kind}_{key}"] for run in of_seeds(runs)][:RANKED]
    rate = RANK_RATES[text, kind][RANKS.index(rank)]
    return [run[key] for run in matching(runs, kind=kind, text=text, rank=rank, rate=rate)]


def pairs_of(runs: list, method: str, baseline: str) -> list[Pair]:
    """A pair a seed."""
    return [Pair(run["seed"], run[method], run[baseline]) for run in runs]
