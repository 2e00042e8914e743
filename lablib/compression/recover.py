"""Training after compression: the same tokens, steps and schedule for every method of the theme."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.modes import kept_modes
from lablib.peft.adapter import fold_
from lablib.peft.adapter import trainable as adapted
from lablib.peft.lora import lora_
from lablib.training.clipping import clip_gradients
from lablib.training.optimizers import adamw
from lablib.training.schedules import learning_rate_factor

WARMUP = 0.05  # of the steps

Loss = Callable[[nn.Module, Tensor], Tensor]


def language_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Nats a token: rows (batch, length + 1) -> a mean."""
    return cross_entropy(anatomy.logits(model, rows[:, :-1]), rows)


def cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
    """The same of logits (batch, length, vocab) that are there already."""
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def drawn(n_rows: int, batch: int, steps: int, seed: int | None) -> list[Tensor]:
    """Places of each step's rows: every row once, in an order of the seed's, then anew.

    seed: None leaves them in order, again and again.
    """
    random, rounds = torch.Generator(), -(-batch * steps // max(n_rows, 1))
    order = [*torch.arange(n_rows)] * rounds
    if seed is not None:
        random.manual_seed(seed)
        order = [place for _ in range(rounds) for place in torch.randperm(n_rows, generator=random)]
    return [torch.stack(order[start : start + batch]) for start in range(0, batch * steps, batch)]


def recover(
    model: nn.Module,
    rows: Tensor,
    steps: int,
    rate: float,
    *,
    batch: int = 8,
    trainable: str | Collection[str] = "all",
    rank: int = 8,
    seed: int | None = 0,
    loss: Loss = language_loss,
    penalty: Callable[[int], Tensor] | None = None,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train in place with AdamW: 5 % of the steps to warm up, a cosine to a tenth, clipping at 1.

    rows: (n, length + 1); which of them a step sees follows from the seed alone; None takes them as
        they come.
    trainable: "all", "lora" (adapters of all projections, of this rank, merged at the end), or the
        names of parameters; the others stay as they are.
    penalty: of a step, added to the loss, but not to the gradient that is clipped: else a large
        one would leave the text nothing. after_step: called with the step and its rate.
    Returns the loss of every step, without the penalty. Weights do not decay.
    """
    losses, warmup = [], max(1, round(WARMUP * steps))
    with _training(model, trainable, rank, seed) as parameters:
        optimizer = adamw(rate, weight_decay=0.0)(model)
        for step, places in enumerate(drawn(len(rows), batch, steps, seed)):
            now = rate * learning_rate_factor(step, steps, warmup=warmup)
            for group in optimizer.param_groups:
                group["lr"] = now
            value = loss(model, rows[places])
            value.backward()
            clip_gradients(parameters, 1.0)
            if penalty is not None:
                penalty(step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if after_step is not None:
                after_step(step, now)
            losses.append(value.item())
    return losses


@contextlib.contextmanager
def _training(
    model: nn.Module, trainable: str | Collection[str], rank: int, seed: int | None
) -> Iterator[list[nn.Parameter]]:
    """The parameters that train; afterwards each asks for a gradient as before."""
    before = {id(p): p.requires_grad for p in model.parameters()}
    with kept_modes(model), torch.enable_grad():
        model.train()
        try:
            chosen = _chosen(model, trainable, rank, seed)
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
            yield [p for p in model.parameters() if p.requires_grad]
        finally:
            if trainable == "lora":
                fold_(model)
            for parameter in model.parameters():
                parameter.requires_grad_(before.get(id(parameter), True))
                parameter.grad = None


def _chosen(
    model: nn.Module, trainable: str | Collection[str], rank: int, seed: int | None
) -> set[int]:
    if trainable == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(seed or 0)
            lora_(model, rank=rank)
            trainable = list(adapted(model))
    named = dict(model.named_parameters())
    if trainable == "all":
        trainable = named
    if isinstance(trainable, str):
        raise ValueError(f'trainable is "all", "lora" or names, not {trainable!r}')
    if missing := [name for name in trainable if name not in named]:
        raise ValueError(f"the model has no parameter {missing[0]}")
    return {id(named[name]) for name in trainable}
