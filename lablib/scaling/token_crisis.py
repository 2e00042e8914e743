"""To Repeat or Not To Repeat (Xue et al., 2023): what repeated text does, and what helps.

Lab 404. The regularizers of section 4, put on a model from outside: `dropout` and `drop_path` are
two definitions, `noisy_` hooks one of them in, `smoothed_loss` is a loss, and weight decay is the
optimizer's. Section 3.2's models of equal FLOPs: `share_blocks_` has fewer parameters, experts
(`lablib.scaling.generalized_scaling.hash_experts_`) have more. `t5_parameters` counts the paper's.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import GPT, anatomy
from lablib.paths import data_dir
from lablib.training.losses import next_token_loss


def dropout(x: Tensor, p: float) -> Tensor:
    """Each entry is lost with probability p; the others grow, so that the mean stays.

    x: any shape -> the same. Source: Srivastava et al. (2014), in its inverted form.
    """
    kept = torch.rand_like(x) >= p  # one draw an entry
    # E[kept / (1 - p)] = 1
    return x * kept / (1 - p)


def drop_path(x: Tensor, p: float) -> Tensor:
    """A sequence loses all that a layer would add to it, with probability p.

    x: (batch, length, dim) -> the same. Source: stochastic depth (Huang et al., 2016), in training
    scaled as dropout is.
    """
    draws = torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device)  # one draw a sequence
    return x * (draws >= p) / (1 - p)


def smoothed_loss(model: nn.Module, tokens: Tensor, smoothing: float) -> Tensor:
    """Next-token loss against a target that gives `smoothing` of its mass to all ids alike.

    tokens: (batch, length + 1) int64. In evaluation mode it is the plain loss, so that held-out
    losses can be compared. Source: label smoothing (Szegedy et al., 2016).
    """
    if not model.training:
        return next_token_loss(model, tokens)
    log_p = model(tokens[:, :-1]).log_softmax(-1)  # (batch, length, vocab)
    right = log_p.gather(-1, tokens[:, 1:, None])  # (batch, length, 1)
    # -(1 - s) log p(target) - s mean over ids of log p
    return -((1 - smoothing) * right.mean() + smoothing * log_p.mean())


class Noise:
    """A forward hook that drops from a part's output in training; `p` may change at any time."""

    def __init__(self, p: float, drop: Callable[[Tensor, float], Tensor] = dropout):
        if not 0 <= p < 1:
            raise ValueError(f"p is {p}: from 0 to below 1")
        self.p, self.drop = p, drop

    def __call__(self, part: nn.Module, given: tuple, made: Tensor | tuple) -> Tensor | tuple:
        if not part.training or self.p == 0:
            return made
        if isinstance(made, tuple):  # attention of transformers: (output, weights)
            return self.drop(made[0], self.p), *made[1:]
        return self.drop(made, self.p)


def noisy_(model: nn.Module, p: float, drop: Callable[[Tensor, float], Tensor] = dropout) -> Noise:
    """Drop from what each attention and feed-forward layer adds to the stream, in place.

    Dropout also takes entries of the embedding, as T5 does. Returns the one `Noise` that all parts
    share. Raises ValueError for a p outside [0, 1).
    """
    noise = Noise(p, drop)
    layers = range(len(anatomy.blocks(model)))
    parts = [anatomy.part(model, i, role) for i in layers for role in ("attention", "mlp")]
    parts += [anatomy.embedding(model)] if drop is dropout else []
    for part in dict.fromkeys(parts):  # a part that blocks share is hooked once
        part.register_forward_hook(noise)
    return noise


def switched_on(noise: Noise, p: float, step: int) -> object:
    """The callback that sets the noise to p from a step on: late dropout, section 4.

    Give it to `fit(..., callbacks=[...])`, with a noise that starts at 0.
    """
    from lablib.scaling.late_dropout import SwitchedOn  # it imports Lightning

    return SwitchedOn(noise, p, step)


def share_blocks_(model: nn.Module) -> nn.Module:
    """One block in the place of all: FLOPs stay, parameters go. Section 3.2."""
    blocks = anatomy.blocks(model)
    for place in range(1, len(blocks)):
        blocks[place] = blocks[0]
    return model


class Degradation(NamedTuple):
    """What repeating cost: the last loss minus the lowest, and minus that of unique text."""

    since_best: float
    to_fresh: float


def degradation(curve: Sequence[float], fresh: float) -> Degradation:
    """curve: held-out losses of a run on repeated text; fresh: the last one on unique text."""
    return Degradation(curve[-1] - min(curve), curve[-1] - fresh)


def byte_losses(model: GPT, text: bytes) -> Tensor:
    """Nats of each byte but the first, given those before it: (len(text) - 1,).

    Raises ValueError when the text is shorter than two bytes or longer than the model's context.
    """
    if not 2 <= len(text) <= model.config.max_length + 1:
        raise ValueError(f"{len(text)} bytes: give 2 to {model.config.max_length + 1}")
    ids = torch.tensor(list(text))[None]
    with torch.no_grad():
        logits = model(ids[:, :-1])[0]  # (length, 256)
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")


# T5 v1.1 (Raffel et al., 2020; their released configurations): dim, feed-forward, layers, heads.
T5 = {"base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16), "xl": (2048, 5120, 24, 32)}


def t5_parameters(size: str, experts: int = 0, every: int = 4) -> int:
    """Parameters of T5 v1.1 with so many more feed-forward networks in every fourth layer.

    How the paper places its experts is our reconstruction from the totals that it prints; routers,
    of dim numbers an expert, are not counted.
    """
    dim, width, layers, heads = T5[size]
    attention, feed_forward = 4 * dim * 64 * heads, 3 * dim * width
    encoder = layers * (attention + feed_forward + 2 * dim)
    decoder = layers * (2 * attention + feed_forward + 3 * dim)
    # embedding and head, not tied; final norms; two tables of 32 relative positions
    rest = 2 * 32128 * dim + 2 * dim + 2 * 32 * heads
    return encoder + decoder + rest + 2 * (layers // every) * experts * feed_forward


@lru_cache
def published() -> dict[str, dict[str, str]]:
    """The paper's printed values by name: each value, unit and source."""
    path = data_dir() / "published" / "token-crisis.csv"
    rows = csv.DictReader(path.read_text("utf-8").splitlines())
    return {row["name"]: row for row in rows}
