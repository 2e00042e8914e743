"""Qwen2.5 of 1.5 billion weights learns to prefer Spanish in 4 bits: lab 710's gpu tier.

A smaller model of the family that the paper's comes from. Its projections go to 4-bit NormalFloat,
LoRA over all of them learns by direct preference optimization, and the reference is the same model
without it, asked once. Rank, rate and sizes are ours; nothing is tuned here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lablib.compression.calibration import token_losses
from lablib.compression.recover import recover
from lablib.models import pretrained
from lablib.peft import rigochat
from lablib.peft.adapter import freeze_base_, trainable
from lablib.peft.mixed import adapters_to_float32_, in_precision_of_base
from lablib.peft.on_gpu import Speaker, on_gpu
from lablib.peft.qlora import nf4_, qlora_
from lablib.training.checkpoints import corpora

NAME = "Qwen/Qwen2.5-1.5B-Instruct"
RATE = 1e-4
OTHERS = {
    "Shakespeare": "shakespeare",
    "the Bible": "bible",
    "Python's documentation": "python-docs",
    "Python": "python-source",
}
LETTERS = 4000  # of a document of other text, from its beginning


class Sizes(NamedTuple):
    """Pairs to train on, each read once, and to judge on; pairs a step; LoRA's rank.

    rows: of each other text, of so many tokens, at most.
    """

    pairs: int = 1000
    judged: int = 600
    batch: int = 8
    rank: int = 16
    rows: int = 32
    tokens: int = 128


SIZES = Sizes()
Pairs = Sequence[rigochat.Preference]


class Seen(NamedTuple):
    """accuracy: % of pairs in which Spanish wins; byte_loss: nats a byte of Spanish answers.

    others: text -> nats a token.
    """

    accuracy: float
    byte_loss: float
    others: dict[str, float]


@on_gpu("That takes a GPU, so Qwen learned nothing here.")
def say_spanish(
    lab: Speaker,
    device: str,
    pairs_of: Callable[[int, int, bool, int], tuple[Pairs, Pairs]],
    sizes: Sizes = SIZES,
    seed: int = 0,
) -> None:
    """What is better after training, and what is not.

    pairs_of: (seed, how many, False, how many) -> pairs to train on, and to judge on.
    """
    model, tokenizer = pretrained(NAME, torch.bfloat16 if device == "cuda" else torch.float32)
    train, test = pairs_of(seed, sizes.pairs, False, sizes.judged)
    others = other_rows(tokenizer, sizes)
    in_four_bits_(model.to(device), sizes.rank, seed)
    before, after = preferring(model, tokenizer, train, test, others, sizes, seed, device)
    lab.say(
        f"{NAME} in 4 bits, {len(train)} pairs: Spanish wins in {before.accuracy:.1f} % of "
        f"{len(test)} other pairs before and in {after.accuracy:.1f} % after; Spanish answers cost "
        f"{before.byte_loss:.3f} nats a byte, then {after.byte_loss:.3f}."
    )
    told = [f"{name} {cost:.3f}, {after.others[name]:.3f}" for name, cost in before.others.items()]
    lab.say(f"Nats a token of other text, before and after: {'; '.join(told)}.")


def in_four_bits_(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Projections go to 4 bits for good, with fresh adapters on all of them that alone train.

    seed: of their first values.
    """
    nf4_(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        qlora_(model, rank=rank, alpha=rank)
    adapters_to_float32_(model)
    freeze_base_(model)


def preferring(
    model: nn.Module,
    tokenizer,
    train: Pairs,
    test: Pairs,
    others: Mapping[str, Tensor],
    sizes: Sizes = SIZES,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Seen, Seen]:
    """Train the model's adapters on pairs, in place; what is seen before and after.

    others: text -> rows of tokens, as `other_rows` gives them.
    """
    told, held_out = (_on(rigochat.encode(tokenizer, part), device) for part in (train, test))
    letters = sum(len(pair.chosen.encode()) + 1 for pair in test)

    def seen() -> Seen:
        with in_precision_of_base(model), torch.device(device):
            scores = rigochat.score(model, held_out)  # (pairs, 2), chosen first
            costs = {name: token_losses(model, r).mean().item() for name, r in others.items()}
        wins = (scores[:, 0] > scores[:, 1]).float().mean().item()
        return Seen(100 * wins, -scores[:, 0].sum().item() / letters, costs)

    before = seen()
    with in_precision_of_base(model), torch.device(device):
        reference = rigochat.reference_scores(model, told)
    exact = rigochat.preference_loss(told, reference)

    def loss(model: nn.Module, places: Tensor) -> Tensor:
        with in_precision_of_base(model):
            return exact(model, places)

    steps = len(train) // sizes.batch
    options = {"batch": sizes.batch, "seed": seed, "trainable": list(trainable(model))}
    recover(model, torch.arange(len(train)), steps, RATE, loss=loss, **options)
    return before, seen()


def _on(rows: rigochat.Rows, device: str) -> rigochat.Rows:
    return rigochat.Rows(*(part.to(device) for part in rows))


def other_rows(tokenizer, sizes: Sizes = SIZES) -> dict[str, Tensor]:
    """Text -> (rows, tokens + 1): pieces of documents that have nothing to do with the pairs."""
    held_out = corpora()[1]
    return {
        word: pieces(tokenizer, [d.text for d in held_out[name]], sizes)
        for word, name in OTHERS.items()
    }


def pieces(tokenizer, texts: Sequence[str], sizes: Sizes) -> Tensor:
    """The first tokens of each text in whole rows, and of these so many, from all texts alike."""
    length, rows = sizes.tokens + 1, []
    for text in texts:
        ids = tokenizer.encode(text[:LETTERS])
        rows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return torch.tensor(rows[:: max(1, len(rows) // sizes.rows)][: sizes.rows])
