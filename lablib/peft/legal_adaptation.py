"""Prefix domain adaptation (Li et al., 2022): a deep prefix reads a domain before it sees labels.

Lab 709. Two steps, each with the model's own weights frozen. First the prefix P, key and value rows
of every block's attention, is trained on text without labels, by the objective that the model was
pretrained with:

    P* = argmin_P  - sum_t log p(x_t | context, P)

Then P* is where few-shot prefix tuning starts, with a classifier on top:

    min over P, head of  - sum_i log p(y_i | x_i, P, head),    P from P* instead of from noise

Section on the method; the deep prefix is that of P-tuning v2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import Loss, language_loss, recover
from lablib.data.tasks import Example
from lablib.models import anatomy
from lablib.models.classifier import Classifier, cached_below, encode_examples, predicted
from lablib.models.scores import scored
from lablib.peft.adapter import adapters, trainable
from lablib.peft.prefix import Prefix, drop_mlp_, prefix_
from lablib.peft.tuning import tune


def adapt_(
    model: nn.Module,
    rows: Tensor,
    length: int,
    steps: int,
    rate: float,
    *,
    hidden: int | None = 64,
    batch: int = 8,
    seed: int = 0,
    loss: Loss = language_loss,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """The first step: give the model a prefix, and let it alone read the domain.

    rows: (n, tokens + 1) int64, text of the domain. length: rows of the prefix in each block.
    hidden: of the MLP that computes them while they train; None trains the rows themselves.
    loss: the pretraining objective; `masked_loss` for a model that fills gaps.
    Returns each step's loss. Raises ValueError where a prefix is already.
    """
    torch.manual_seed(seed)
    prefix_(model, length, mlp=hidden)  # P_k, P_v = MLP(table): (length, width) a block
    names = list(trainable(model))  # P alone
    options = {"batch": batch, "trainable": names, "seed": seed, "after_step": after_step}
    losses = recover(model, rows, steps, rate, loss=loss, **options)  # - log p(x | context, P)
    if hidden is not None:
        drop_mlp_(model)
    return losses


class Start(NamedTuple):
    """A model that has read, or has not: itself and its prefix, and how its reading went."""

    model: nn.Module
    prefix: Tensor | None
    loss: float
    losses: list[float]


def start_(model: nn.Module, prefix: Tensor) -> None:
    """The second step's start: the model gets this prefix, to be tuned with a classifier.

    prefix: (blocks, 2, length, width), keys and values, as `prefix_of` gives them.
    Raises ValueError when it is of another model's shape.
    """
    blocks, _, length, width = prefix.shape
    prefix_(model, length)
    own = parts(model)
    if (blocks, width) != (len(own), own[0].keys.shape[1]):
        shape = f"{len(own)} blocks of width {own[0].keys.shape[1]}"
        raise ValueError(f"a prefix for {blocks} blocks of width {width}; the model has {shape}")
    with torch.no_grad():
        for part, (keys, values) in zip(own, prefix):
            part.keys.copy_(keys)  # P_k <- P_k*
            part.values.copy_(values)  # P_v <- P_v*


def parts(model: nn.Module) -> list[Prefix]:
    """The prefix of each block, from the first."""
    return [adapter for adapter in adapters(model).values() if isinstance(adapter, Prefix)]


def prefix_of(model: nn.Module) -> Tensor:
    """The model's prefix, a copy: (blocks, 2, length, width), keys and values.

    Raises ValueError when it has none.
    """
    if not (own := parts(model)):
        raise ValueError(f"{type(model).__name__} has no prefix")
    return torch.stack([torch.stack(part.rows()) for part in own]).detach().clone()


def prefix_size(length: int, width: int, n_blocks: int) -> int:
    """Numbers of a deep prefix: 2 l d a block. width: features of all heads' keys."""
    return 2 * length * width * n_blocks


def masked_loss(mask: int, special: Sequence[int] = (), share: float = 0.15) -> Loss:
    """The objective of models that fill gaps, for `adapt_`: nats a masked token.

    mask: the token that hides others. special: tokens that are never hidden. Of those chosen, eight
    of ten are hidden, one becomes another token at random, one stays (Devlin et al., 2019). At
    least one of a batch is chosen.
    """

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        asked, shown = masked(rows, mask, special, share, len(anatomy.embedding(model).weight))
        return F.cross_entropy(anatomy.logits(model, shown)[asked].float(), rows[asked])

    return loss


def masked(
    rows: Tensor, mask: int, special: Sequence[int], share: float, vocab: int
) -> tuple[Tensor, Tensor]:
    """Which tokens of rows (n, length) are asked for, bool, and the rows as they are shown."""
    open_to = ~torch.isin(rows, rows.new_tensor(list(special)))
    if not open_to.any():
        raise ValueError("there are special tokens only: nothing can be masked")
    drawn = torch.rand_like(rows, dtype=torch.float32).masked_fill(~open_to, 2.0)
    asked = (drawn < share) | (drawn == drawn.min())
    how = torch.rand_like(drawn)
    shown = torch.where(asked & (how < 0.8), mask, rows)
    other = torch.randint_like(rows, vocab)
    return asked, torch.where(asked & (how >= 0.9), other, shown)


def right_on_top(
    model: nn.Module,
    tokenizer,
    few: Sequence[Example],
    unseen: Sequence[Example],
    *,
    words: int = 64,
    steps: int = 60,
    rate: float = 1e-2,
    batch: int = 8,
    seed: int = 0,
) -> float:
    """% of unseen texts right by a linear layer that alone learns from a few, prefix or not.

    The model reads each text once, as it is: no weight and no prefix of it changes. words: tokens
    of a text, at most.
    """
    n_blocks, place, sides = len(anatomy.blocks(model)), next(model.parameters()).device, []
    for side in (few, unseen):
        tokens, labels = encode_examples(tokenizer, side, words, place)
        sides.append((cached_below(model, tokens, n_blocks, batch), labels))
    (learned, labels), (judged, truth) = sides
    torch.manual_seed(seed)
    n_labels = int(torch.cat([labels, truth]).max()) + 1
    classifier = Classifier(model, n_labels, below=n_blocks).to(place)
    names = [name for name, _ in classifier.named_parameters() if name.startswith("head.")]
    tune(classifier, learned, labels, steps, rate, batch=batch, seed=seed, trainable=names)
    return 100 * scored(predicted(classifier, judged).cpu(), truth.cpu())["accuracy"]


def with_prefix(model: nn.Module, prefix: Tensor | None) -> nn.Module:
    """A copy of a plain model that starts from this prefix, or has none."""
    copied = copy.deepcopy(model)
    if prefix is not None:
        start_(copied, prefix)
    return copied


def steps_until(losses: Sequence[float], level: float, window: int = 5) -> int:
    """Steps until the mean loss of `window` steps on end is at most `level`; all of them if never.

    Raises ValueError when there are fewer losses than the window.
    """
    if len(losses) < window:
        raise ValueError(f"{len(losses)} losses for a window of {window}")
    means = torch.tensor(losses).unfold(0, window, 1).mean(1)
    below = (means <= level).nonzero()
    return window + int(below[0]) if len(below) else len(losses)


def encoder_size(vocab: int, positions: int, dim: int, inner: int, n_blocks: int) -> int:
    """Numbers of an encoder of BERT's kind, its pooling layer included; one type of segment."""
    linear = dim * dim + dim
    norm = 2 * dim
    feed_forward = 2 * dim * inner + inner + dim
    block = 4 * linear + feed_forward + 2 * norm  # query, key, value and output
    return (vocab + positions + 1) * dim + norm + n_blocks * block + linear
