"""RoBERTa-base tuned in several ways on one task: what labs show at the gpu tier."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lablib.data.glue import load_glue
from lablib.data.tasks import Splits
from lablib.models.classifier import (
    Classifier,
    Encoded,
    encode_examples,
    encoder,
    predicted,
    shortest_first,
)
from lablib.models.scores import scored
from lablib.peft.catalogue import put_
from lablib.peft.on_gpu import Speaker, on_gpu
from lablib.peft.tuning import backbone_above, tune

TASKS = ("sst2", "mrpc", "stsb", "mnli")


class Way(NamedTuple):
    """A way to tune: what it puts into an encoder, and at which rate all of that trains.

    put: None to tune all blocks. penalty: of the encoder, added to the loss of every step.
    first: done with a classifier, the texts and the labels that it will learn from, before.
    last: done with the encoder after learning, before it is judged.
    """

    put: Callable[[nn.Module], None] | None
    rate: float
    penalty: Callable[[nn.Module], Tensor] | None = None
    first: Callable[[Classifier, Encoded, Tensor], None] | None = None
    last: Callable[[nn.Module], object] | None = None


def named(*names: str, rate: float = 5e-4) -> dict[str, Way]:
    """Ways that put methods of the catalogue in, by their names there; and all blocks tuned."""
    ways = {name: Way(partial(put_, name=name), rate) for name in names}
    return ways | {"all blocks": Way(None, 2e-5)}


@on_gpu("That takes a GPU, so nothing was tuned here.")
def say_points(
    lab: Speaker,
    device: str,
    ways: Mapping[str, Way],
    steps: int = 150,
    length: int = 64,
    seeds: int = 1,
) -> None:
    """A line a task of GLUE, with what `points_on` gives: the mean over seeds, and each of them.

    Five minutes a seed on a T4 are planned, and were never timed.
    """
    options = {"steps": steps, "length": length, "device": device}
    for task in TASKS:
        splits = load_glue(task, train=16 * steps)
        rows = [points_on(splits, ways, seed=seed, **options) for seed in range(seeds)]
        lab.say(f"{task}: " + ", ".join(_told(way, [row[way] for row in rows]) for way in rows[0]))


def _told(way: str, points: list[float]) -> str:
    each = f" ({' '.join(f'{one:.1f}' for one in points)})" if len(points) > 1 else ""
    return f"{way} {sum(points) / len(points):.1f}{each}"


def points_on(
    splits: Splits,
    ways: Mapping[str, Way],
    name: str = "FacebookAI/roberta-base",
    steps: int = 400,
    batch: int = 16,
    length: int = 96,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """Way -> % of the test split right; 100 times Spearman's correlation where labels are floats.

    name: of the encoder. Every way starts from the same weights, and sees the same batches.
    """
    model, tokenizer = encoder(name)
    learned, labels = encode_examples(tokenizer, shortest_first(splits.train), length, device)
    unseen, truth = encode_examples(tokenizer, shortest_first(splits.test), length, device)
    floats = labels.is_floating_point()
    if floats:
        labels = (labels - labels.mean()) / labels.std()  # ranks stay
    n_labels, points = 1 if floats else int(labels.max()) + 1, {}
    for label, way in ways.items():
        torch.manual_seed(seed)
        classifier = Classifier(copy.deepcopy(model), n_labels)
        if way.put is not None:
            way.put(classifier.model)
        classifier.to(device)
        if way.first is not None:
            way.first(classifier, learned, labels)
        options: dict = {"batch": batch, "seed": seed}
        options["trainable"] = backbone_above(classifier) if way.put is None else None
        if way.penalty is not None:
            options["penalty"] = partial(_penalty, way.penalty, classifier.model)
        tune(classifier, learned, labels, steps, way.rate, **options)
        if way.last is not None:
            way.last(classifier.model)
        scores = scored(predicted(classifier, unseen).cpu(), truth.cpu())
        points[label] = 100 * scores["spearman" if floats else "accuracy"]
    return points


def _penalty(of: Callable[[nn.Module], Tensor], model: nn.Module, step: int) -> Tensor:
    return of(model)
