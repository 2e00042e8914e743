"""The study of LayerDrop (2019): eight blocks trained with and without it, then pruned.

The text is small and is read 30 times, so that models overfit: what all three of the paper's claims
on language models need at once, as far as such a short training has it. A seed is another part of
the plays to train on, other weights, another order and other draws.

Ordinary dropout and the learning rate were tuned for the usual model, LayerDrop's and the half-deep
one: five values of one and three of the other each, on a second seed the two larger rates. The best
of each kind is judged: the usual model has another dropout where it is pruned than where it is
whole, since more of it makes pruning cheaper; LayerDrop's best is none for both. The usual model
without dropout and a LayerDrop of rate 0.5 stand beside them.

Two more comparisons came later, and no claim is judged on them. LayerDrop for as many more steps as
its blocks left out, so that each learned as often as the usual model's. And text that is read once,
without dropout; of three learning rates, tried again for each kind, the largest was the best for
all, on both seeds.

Last came longer training, 3,000 steps on three times the text, which is read 51 times: the paper's
rivals of half the depth learn until they learn no more. Dropout, three values, and the learning
rate, two, were tuned again for LayerDrop by its pruned loss and for the half-deep model, on one
seed. They are compared at equal text, and with as many more steps for LayerDrop as its blocks left
out. No claim is judged on these either.

The pretrained model's run is an illustration, made once: no claim is judged on it, and its rate was
not tuned.
"""

import itertools
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from lablib.compression import layerdrop
from lablib.data import Batches, LetterTokenizer, documents, load
from lablib.evidence import Pair, matching, paired
from lablib.models import GPT, GPTConfig, anatomy, pretrained
from lablib.models.ablation import leave_one_out_losses
from lablib.scaling.token_crisis import noisy_
from lablib.training import fit, next_token_loss
from lablib.training.optimizers import adamw

DIM, DEPTH, HALF = 32, 8, 4
BATCH, LENGTH = 16, 64  # rows a step, letters a row
STEPS, LETTERS = 600, 20_000
RATE, DROP = 8e-3, 0.2  # of learning; of blocks to be left out, the paper's
REAL = "smollm2-135m-instruct"
TRAINED = ("output", "down")  # what writes to the stream, all that the real model trains


def run(
    seed: int,
    rate: float = DROP,
    dropout: float = 0.0,
    n_layers: int = DEPTH,
    lr: float = RATE,
    steps: int = STEPS,
    rising: bool = False,
    model: str = "letters",
    rows: int = 256,
    letters: int = LETTERS,
) -> dict:
    """Train a model with LayerDrop (none at rate 0), prune it in several ways, nothing retrained.

    Losses are held-out nats a letter: "whole"; "four", "two" with so many blocks, evenly spread;
    "first_four", "last_four" with those alone; "found" with the four that are best on other text.
    Lists: "even", "first" and "found_each" of 1, 2, ... blocks; "cloud", on that other text, of all
    sub-networks, in the order of `layerdrop.all_losses`.
    seed: of weights, order, draws, and of which letters are trained on. dropout: the ordinary kind.
    rising: rates grow with the depth, from 0, with the same mean.
    model: "letters", or the name of a pretrained one, see `continued`.
    """
    if model != "letters":
        return continued(model, seed, rate, steps, lr, rows)
    train, test, valid = texts(seed, letters, rows)
    student = build(seed, n_layers, rate, dropout, rising)
    batches, optimizer = Batches(train, BATCH, LENGTH, seed), adamw(lr)
    history = fit(student, batches, steps=steps, optimizer=optimizer, seed=seed, progress=False)
    last = history.losses[-50:]
    return {"training": round(sum(last) / len(last), 5)} | cut(student, test, valid)


def build(seed: int, n_layers: int, rate: float, dropout: float = 0.0, rising: bool = False) -> GPT:
    """A model of letters, weights of deviation dim^-0.5, that drops blocks and entries."""
    torch.manual_seed(seed)
    sizes = {"dim": DIM, "n_heads": 2, "ffn_dim": 3 * DIM, "max_length": LENGTH}
    model = GPT(GPTConfig(vocab_size=27, n_layers=n_layers, init_std=DIM**-0.5, **sizes))
    rates = [2 * rate * d / (n_layers - 1) for d in range(n_layers)] if rising else rate
    layerdrop.layerdrop_(model, rates, seed)
    if dropout:
        noisy_(model, dropout)
    return model


def cut(model: GPT, test: torch.Tensor, valid: torch.Tensor) -> dict:
    """The losses of a model pruned in several ways, as `run` describes them."""
    n, cloud = len(model.blocks), layerdrop.all_losses(model, valid)
    sizes = range(1, n + 1)

    def loss(keep) -> float:
        return round(layerdrop.loss_of(model, keep, test), 5)

    best = [best_of(cloud, n, k) for k in sizes]
    four = {"first_four": loss(range(HALF)), "last_four": loss(range(n - HALF, n))}
    return four | {
        "whole": loss(range(n)),
        "four": loss(layerdrop.evenly(n, HALF)),
        "two": loss(layerdrop.evenly(n, 2)),
        "found": loss(best[HALF - 1]),
        "even": [loss(layerdrop.evenly(n, k)) for k in sizes],
        "first": [loss(range(k)) for k in sizes],
        "found_each": [loss(keep) for keep in best],
        "found_keep": best[HALF - 1],
        "cloud": [round(value, 3) for value in cloud.tolist()],
    }


def best_of(cloud: torch.Tensor, n: int, k: int) -> list[int]:
    """The k blocks whose loss, of all subsets of their size, is least."""
    size = [index.bit_count() for index in range(2**n)]
    index = int(cloud.masked_fill(torch.tensor(size) != k, torch.inf).argmin())
    return [place for place in range(n) if index >> place & 1]


def texts(seed: int, letters: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Letters to train on, another part of the plays for each seed; rows to test; to choose on."""
    train, held_out = plays()
    start = int(np.random.default_rng(seed).integers(len(train) - letters))
    half = len(held_out) // 2
    test, valid = spread(held_out[:half], rows), spread(held_out[half:], rows // 4)
    return train[start : start + letters], test, valid


def spread(ids: torch.Tensor, rows: int) -> torch.Tensor:
    """Windows from all over a text: (rows, LENGTH + 1)."""
    starts = torch.linspace(0, len(ids) - LENGTH - 1, rows).long()
    return ids[starts[:, None] + torch.arange(LENGTH + 1)]


@lru_cache
def plays() -> tuple[torch.Tensor, torch.Tensor]:
    """Shakespeare's letters, to train on and of other works."""
    parts = documents.split(load("shakespeare"), (0.9, 0.1), 0)
    joined = (" ".join(document.text for document in part) for part in parts)
    return tuple(torch.tensor(LetterTokenizer().encode(text)) for text in joined)


def continued(name: str, seed: int, rate: float, steps: int, lr: float, rows: int = 8) -> dict:
    """A pretrained model cut in half, before and after some steps with LayerDrop, one row each.

    Losses are nats a token: "whole", "even" with every other block, "least" without the half of the
    blocks that the loss misses least, one by one, before training. Only TRAINED learns: memory.
    """
    model, tokenizer = pretrained(name)
    ids = torch.tensor(tokenizer.encode(load("shakespeare")[0].text[: 600 * LENGTH]))
    test, train = ids[: rows * (LENGTH + 1)].view(rows, -1), ids[rows * (LENGTH + 1) :]
    n = len(anatomy.blocks(model))
    missed = leave_one_out_losses(model, test[:2])[1]
    keeps = {"whole": range(n), "even": layerdrop.every_other(n, 0.5)}
    keeps["least"] = np.argsort(missed)[n // 2 :].tolist()  # the other half is missed least
    made = {key: layerdrop.loss_of(model, keep, test) for key, keep in keeps.items()}
    model.requires_grad_(False)
    for layer in anatomy.projections(model, *TRAINED).values():
        layer.requires_grad_(True)
    layerdrop.layerdrop_(model, rate, seed)
    options = {"optimizer": adamw(lr, weight_decay=0.0), "seed": seed, "progress": False}
    fit(model, Batches(train, 1, LENGTH, seed), steps=steps, **options)
    after = {key: layerdrop.loss_of(model, keep, test) for key, keep in keeps.items()}
    return {f"{key}_before": round(v, 4) for key, v in made.items()} | {
        f"{key}_after": round(v, 4) for key, v in after.items()
    }


def on_words(
    file: str | Path, steps: int, dim: int, n_layers: int = 12, lr: float = 1e-3, batch: int = 32
) -> dict[str, list[float]]:
    """Models of a text of the reader's, WikiText-2 say: {"usual": losses, "LayerDrop": losses}.

    file: plain text, whose last tenth is held out. dim: a multiple of 32. Losses are nats a token,
    of all blocks and of every other one; one seed, and nothing tuned.
    """
    tokenizer = pretrained("tiny-4m")[1]
    ids = torch.tensor(tokenizer.encode(Path(file).read_text("utf-8")))
    train, held_out = ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10])
    found = {}
    for name, rate in (("usual", 0.0), ("LayerDrop", DROP)):
        torch.manual_seed(0)
        sizes = {"dim": dim, "n_heads": dim // 32, "ffn_dim": 3 * dim, "max_length": 2 * LENGTH}
        config = GPTConfig(vocab_size=tokenizer.vocab_size, n_layers=n_layers, **sizes)
        model = layerdrop.layerdrop_(GPT(config), rate)
        batches, optimizer = Batches(train, batch, 2 * LENGTH, 0), adamw(lr)
        fit(model, batches, steps=steps, optimizer=optimizer, seed=0, progress=False)
        rows = spread(held_out, 64).to(next(model.parameters()).device)
        keeps = range(n_layers), layerdrop.every_other(n_layers, 0.5)
        found[name] = [layerdrop.loss_of(model, keep, rows) for keep in keeps]
    return found


SEEDS = range(5)
# Ordinary dropout, the best of TRIED; "firm": of the usual model that is to be pruned.
TUNED = {"standard": 0.2, "firm": 0.3, "layerdrop": 0.0, "shallow": 0.1}
TRIED = (0.0, 0.1, 0.2, 0.3, 0.4)
STANDARD = {"n_layers": DEPTH, "rate": 0.0, "dropout": TUNED["standard"]}
FIRM = {**STANDARD, "dropout": TUNED["firm"]}
EIGHT, FOUR = {"n_layers": DEPTH, "rate": DROP}, {"n_layers": HALF, "rate": 0.0}
DROPPED = {**EIGHT, "dropout": TUNED["layerdrop"]}
SHALLOW = {**FOUR, "dropout": TUNED["shallow"]}
BARE = {"n_layers": DEPTH, "rate": 0.0, "dropout": 0.0}
HALVED = {"n_layers": DEPTH, "rate": 0.5, "dropout": 0.0}
KINDS = (STANDARD, FIRM, DROPPED, SHALLOW, BARE, HALVED)
POINTS = [{**kind, "seed": seed} for kind in KINDS for seed in SEEDS]
POINTS += [{"model": REAL, "seed": 0, "rate": DROP, "steps": 40, "lr": 2e-4, "rows": 8}]
LEARNING = (2e-3, 4e-3, RATE)
TUNING = [
    {key: kind[key] for key in ("n_layers", "rate")} | {"seed": seed, "dropout": dropout, "lr": lr}
    for kind in (STANDARD, DROPPED, SHALLOW)
    for seed, learning in ((100, LEARNING), (101, LEARNING[1:]))
    for dropout in TRIED
    for lr in learning
]
LIMIT_KB = 310  # each run keeps the losses of 256 sub-networks
# As many updates of each block as the usual model's have, which takes more text
LONGER = {**DROPPED, "steps": round(STEPS / (1 - DROP))}
POINTS += [{**LONGER, "seed": seed} for seed in SEEDS]
# Text that is read once
ONCE = {"letters": STEPS * BATCH * LENGTH + 1, "dropout": 0.0}
READ_ONCE = [{**kind, **ONCE} for kind in (STANDARD, DROPPED, SHALLOW)]
POINTS += [{**kind, "seed": seed} for kind in READ_ONCE for seed in SEEDS]
TUNING += [
    {**kind, "seed": s, "lr": lr} for kind in READ_ONCE for s in (100, 101) for lr in LEARNING
]
# Longer training on text that is read 51 times, at equal text and at equal updates of each block
LONG = {"steps": 3000, "letters": 60_000, "dropout": 0.1}
LONG_DROPPED, LONG_SHALLOW = {**EIGHT, **LONG}, {**FOUR, **LONG, "lr": 4e-3}
LONGEST = {**LONG_DROPPED, "steps": round(LONG["steps"] / (1 - DROP))}
POINTS += [
    {**kind, "seed": seed} for kind in (LONG_DROPPED, LONGEST, LONG_SHALLOW) for seed in SEEDS
]
TUNING += [
    {**kind, **LONG, "seed": 100, "dropout": dropout, "lr": lr}
    for kind in (EIGHT, FOUR)
    for dropout in TRIED[:3]
    for lr in LEARNING[1:]
]
CANARY = {"seed": 200, "rate": 0.2, "dropout": 0.1, "steps": 3, "letters": 4000, "rows": 8}
# Of "bare" none is stored: what has neither LayerDrop nor dropout is its baseline.
ROLES = {
    "scratch": {"method": EIGHT, "baseline": FOUR, "control": BARE},
    "pruned": {"method": DROPPED, "baseline": FIRM, "control": BARE},
    "regularizes": {"method": DROPPED, "baseline": STANDARD, "control": BARE},
    "bare": {"method": DROPPED, "baseline": BARE, "control": None},
    "spread": {"method": "four", "baseline": "first_four", "control": "last_four"},
    "searched": {"method": "found", "baseline": "four", "control": "first_four"},
    "larger-rate": {"method": HALVED, "baseline": DROPPED, "control": BARE},
}


def values(runs: list) -> dict:
    """One pair a seed, the losses of method and baseline; and a number of the paper's model."""
    runs = [run for run in runs if usual(run)]
    dropped = matching(runs, **EIGHT)
    return {
        "pruned": paired(runs, EIGHT, FIRM, "four"),
        "scratch": paired(runs, EIGHT, FOUR, "four"),
        "regularizes": paired(runs, EIGHT, STANDARD, "whole"),
        "bare": paired(runs, EIGHT, BARE, "whole"),
        "spread": [Pair(run["seed"], run["four"], run["first_four"]) for run in dropped],
        "searched": [Pair(run["seed"], run["found"], run["four"]) for run in dropped],
        "larger-rate": paired(runs, HALVED, EIGHT, "two"),
        "parameters-8": [millions(8)],
    }


def usual(run: dict) -> bool:
    """Whether a run had the usual steps and the usual, small text."""
    return run.get("steps", STEPS) == STEPS and run.get("letters", LETTERS) == LETTERS


def millions(n_layers: int) -> float:
    """Parameters of the paper's model."""
    parameters = layerdrop.wikitext103_model(n_layers).parameters()
    return sum(parameter.numel() for parameter in parameters) / 1e6


def under_every_mask() -> tuple[list[float], list[float], int]:
    """Loss and gradients under each mask of four blocks: ours; of models built anew from what
    stays; and how many parameters of dropped blocks got a gradient.
    """
    torch.manual_seed(0)
    sizes = {"dim": 8, "n_heads": 2, "ffn_dim": 16, "max_length": 16}
    model = GPT(GPTConfig(vocab_size=27, n_layers=4, init_std=0.3, **sizes)).double()
    blocks = layerdrop.layerdrop_(model, 0.5).blocks
    rows = torch.randint(27, (3, 9))
    ours, theirs, touched = [], [], 0
    for mask in itertools.product((False, True), repeat=4):
        blocks.fixed = list(mask)
        keep = [place for place in range(4) if mask[place]]
        small = GPT(GPTConfig(vocab_size=27, n_layers=len(keep), **sizes)).double()
        small.load_state_dict(weights_of(model, keep))
        ours += after_backward(model, rows)
        theirs += after_backward(small, rows)
        gone = [blocks[place] for place in range(4) if not mask[place]]
        touched += sum(p.grad is not None for block in gone for p in block.parameters())
    return ours, theirs, touched


def weights_of(model: GPT, keep: list[int]) -> dict:
    """A model's weights under the names that they have in one of these blocks alone."""
    new = {f"blocks.{old}.": f"blocks.{place}." for place, old in enumerate(keep)}
    found = {}
    for name, weight in model.state_dict().items():
        start = next((old for old in new if name.startswith(old)), None)
        if start or not name.startswith("blocks."):
            found[name.replace(start, new[start]) if start else name] = weight
    return found


def after_backward(model: GPT, rows: torch.Tensor) -> list[float]:
    """The loss, then all gradients that there are, in order."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = next_token_loss(model, rows)
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [loss.item(), *torch.cat(grads).tolist()]
