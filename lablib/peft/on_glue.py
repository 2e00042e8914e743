"""RoBERTa-base tuned in several ways on one task: what labs show at the gpu tier."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lablib.data.tasks import Example, Splits
from lablib.models.classifier import Classifier, Encoded, encode, encoder, predicted
from lablib.models.scores import scored
from lablib.peft.tuning import backbone_above, tune

Way = tuple[Callable[[nn.Module], None] | None, float]


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

    ways: name -> what puts its modules into an encoder, or None to tune all blocks; and a rate.
    name: of the encoder. Every way starts from the same weights, and sees the same batches.
    """
    model, tokenizer = encoder(name)
    learned, labels = _encoded(tokenizer, splits.train, length, device)
    unseen, truth = _encoded(tokenizer, splits.test, length, device)
    floats = labels.is_floating_point()
    if floats:
        labels = (labels - labels.mean()) / labels.std()  # ranks stay
    n_labels, points = 1 if floats else int(labels.max()) + 1, {}
    for way, (put, rate) in ways.items():
        torch.manual_seed(seed)
        classifier = Classifier(copy.deepcopy(model), n_labels)
        if put is not None:
            put(classifier.model)
        names = backbone_above(classifier) if put is None else None
        classifier.to(device)
        tune(classifier, learned, labels, steps, rate, batch=batch, seed=seed, trainable=names)
        scores = scored(predicted(classifier, unseen).cpu(), truth.cpu())
        points[way] = 100 * scores["spearman" if floats else "accuracy"]
    return points


def _encoded(
    tokenizer, examples: list[Example], length: int, device: str
) -> tuple[Encoded, Tensor]:
    """Short ones first, so that little is padded where they are judged."""
    rows = sorted(examples, key=lambda e: len(e.text) + len(e.pair))
    encoded = encode(tokenizer, [e.text for e in rows], [e.pair for e in rows], length)
    labels = torch.tensor([e.label for e in rows], device=device)
    return Encoded(*(part.to(device) for part in encoded)), labels
