"""RoBERTa-base reads licences with its own head, then learns legal tasks: lab 709's gpu tier.

The paper's own model, and the objective that it was pretrained with: some tokens are masked, and
the model fills the gaps. A prefix reads so, or all weights do; then four ways learn each task from
a few labelled texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lablib.compression.recover import recover
from lablib.data.tasks import Splits, few_shot, licence_texts
from lablib.models.classifier import Classifier, encode_examples, predicted
from lablib.models.scores import scored
from lablib.peft.legal_adaptation import adapt_, masked_loss, prefix_of, start_
from lablib.peft.on_gpu import Speaker, on_gpu
from lablib.peft.prefix import drop_mlp_, prefix_
from lablib.peft.tuning import backbone_above, tune

RATES = {"prefix": 1e-2, "all": 3e-5}  # of what trains, with labels and without; nobody tuned them
LENGTH, HIDDEN = 8, 64  # rows of a prefix, and of the MLP that computes them
LETTERS = 1000  # of a licence, from its beginning


class Sizes(NamedTuple):
    """How much is read and learned: steps without labels and with them, texts a step, tokens a
    text, labels a class, rows and texts a class to judge on, at most."""

    reading: int = 300
    steps: int = 60
    batch: int = 8
    words: int = 64
    labels: int = 8
    held_out: int = 96
    judged: int = 120


SIZES = Sizes()


class Readers(NamedTuple):
    """Who has read. model: nothing; prefix: a prefix alone; whole: all weights of a copy.

    losses: nats a masked token of held-out licences, of each.
    """

    model: nn.Module
    prefix: Tensor
    whole: nn.Module
    losses: dict[str, float]


@on_gpu("That takes a GPU, so RoBERTa read nothing here.")
def say_reading(
    lab: Speaker, device: str, tasks: Iterable[str], splits_of: Callable[[str], Splits]
) -> None:
    """A line on the reading, and one a task.

    tasks: names that `splits_of` knows.
    """
    model, tokenizer = filler()
    texts = [[document.text for document in part] for part in licence_texts()]
    readers = read(model, tokenizer, *texts, device=device)
    told = ", ".join(f"{who} {nats:.2f}" for who, nats in readers.losses.items())
    lab.say(f"Nats a masked token of licences that were held out: {told}.")
    for task in tasks:
        points = points_of(readers, tokenizer, splits_of(task), device=device)
        lab.say(f"{task}, % right: " + ", ".join(f"{way} {p:.1f}" for way, p in points.items()))


def filler(name: str = "FacebookAI/roberta-base"):
    """An encoder with the head that fills gaps, and its tokenizer, in evaluation mode, float32.

    Raises DataError where it can't be had.
    """
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    from lablib.models.weights import pretrained_path

    folder = pretrained_path(name)
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def read(
    model: nn.Module,
    tokenizer,
    texts: Sequence[str],
    held_out: Sequence[str],
    sizes: Sizes = SIZES,
    seed: int = 0,
    device: str = "cpu",
) -> Readers:
    """A prefix reads, and so do all weights of a copy, as many steps; the model itself stays."""
    rows = rows_of(tokenizer, texts, sizes.words).to(device)
    judging = rows_of(tokenizer, held_out, sizes.words)[: sizes.held_out].to(device)
    loss = masked_loss(tokenizer.mask_token_id, tokenizer.all_special_ids)
    shared = {"batch": sizes.batch, "seed": seed, "loss": loss}
    reader, whole = (copy.deepcopy(model).to(device) for _ in range(2))
    losses = {"untouched": _judged(reader, judging, loss)}
    adapt_(reader, rows, LENGTH, sizes.reading, RATES["prefix"], hidden=HIDDEN, **shared)
    losses["a prefix has read"] = _judged(reader, judging, loss)
    torch.manual_seed(seed)
    recover(whole, rows, sizes.reading, RATES["all"], **shared)
    losses["all weights have read"] = _judged(whole, judging, loss)
    return Readers(model, prefix_of(reader).cpu(), whole.cpu(), losses)


def rows_of(tokenizer, texts: Sequence[str], words: int) -> Tensor:
    """(n, words): the tokens of each text in pieces, between the two that mark its ends.

    What is left over of a text is dropped, so that no row needs padding.
    """
    room, rows = words - 2, []
    for text in texts:
        ids = tokenizer(text[:LETTERS], add_special_tokens=False)["input_ids"]
        rows += [ids[i : i + room] for i in range(0, len(ids) - room + 1, room)]
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return torch.tensor([[start, *row, end] for row in rows])


@torch.no_grad()
def _judged(model: nn.Module, rows: Tensor, loss: Callable, batch: int = 32) -> float:
    """Mean over batches, with the same tokens masked each time."""
    model.eval()
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(0)
        return float(np.mean([loss(model, part).item() for part in rows.split(batch)]))


def points_of(
    readers: Readers,
    tokenizer,
    splits: Splits,
    sizes: Sizes = SIZES,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """Way -> % right of a balanced test, after a few labelled texts, the same for all ways."""
    fewest = int(np.bincount([example.label for example in splits.test]).min())
    train = few_shot(splits.train, sizes.labels, seed)
    test = few_shot(splits.test, min(fewest, sizes.judged), 0)
    few, labels = encode_examples(tokenizer, train, sizes.words, device)
    unseen, truth = encode_examples(tokenizer, test, sizes.words, device)
    points = {}
    for way in ("prefix", "read, then prefix", "full", "read, then full"):
        classifier = built(readers, way, int(truth.max()) + 1, seed).to(device)
        prefix = way.endswith("prefix")
        names = None if prefix else backbone_above(classifier)
        options = {"batch": sizes.batch, "seed": seed, "trainable": names}
        tune(classifier, few, labels, sizes.steps, RATES["prefix" if prefix else "all"], **options)
        scores = scored(predicted(classifier, unseen).cpu(), truth.cpu())
        points[way] = 100 * scores["accuracy"]
    return points


def built(readers: Readers, way: str, n_labels: int, seed: int) -> Classifier:
    """A classifier as a way starts: on the model or the copy that has read, with a prefix or not.

    What is drawn at random depends on the seed alone.
    """
    model = copy.deepcopy(readers.whole if way == "read, then full" else readers.model)
    torch.manual_seed(seed)
    if way == "prefix":
        prefix_(model, LENGTH, mlp=HIDDEN)
        drop_mlp_(model)
    elif way == "read, then prefix":
        start_(model, readers.prefix)
    torch.manual_seed(seed)  # the layer on top starts alike in all ways
    return Classifier(model, n_labels)
