"""`fit`: train any module, on any batches, through Lightning."""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lablib.modes import kept_modes
from lablib.training import feed as feeds
from lablib.training import optimizers, state
from lablib.training.history import History
from lablib.training.losses import Loss, next_token_loss
from lablib.training.schedules import learning_rate_factor


def fit(
    model: nn.Module,
    data: Any,
    *,
    steps: int,
    loss: Loss | None = None,
    lr: float | None = None,
    optimizer: optimizers.MakeOptimizer | None = None,
    warmup: int | None = None,
    schedule: str = "cosine",
    clip: float | None = 1.0,
    accumulate: int = 1,
    seed: int = 0,
    held_out: Iterable | None = None,
    held_out_every: int | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    precision: str | None = None,
    compile: bool | None = None,
    progress: bool = True,
    **trainer: Any,
) -> History:
    """Train `model` in place for `steps` optimizer steps, and return what happened.

    A model in evaluation mode trains in training mode; in one in training mode, parts that are in
    evaluation mode stay so. Afterwards each module has its own mode back.
    data: batches - any iterable (begun again when it ends), a DataLoader, `Batches` or a Lightning
        DataModule, whose held-out batches are then used, too. A batch is a tensor, or tuples, lists
        and mappings that hold one.
    loss: (model, batch) -> the mean, or (sum, count) where padding makes batches count unequally;
        without it the next-token loss of (batch, length + 1) tokens. Scalars that modules leave in
        `auxiliary_loss` are added.
    lr: the peak rate of `adamw()`, 3e-3 by default; or
    optimizer: a function of the model that makes any optimizer of torch, `adamw(lr=1e-2,
        weight_decay=0)` or `lambda model: torch.optim.SGD(model.parameters(), lr=0.1)`.
    warmup, schedule: steps of warmup (5 % by default); "cosine", "wsd", "constant" or
        "inverse-sqrt", which scale the optimizer's own rate. clip: largest norm of the gradient.
    accumulate: batches a step.
    held_out: batches whose mean loss is taken at the end, and each `held_out_every` steps.
    checkpoint: a folder. Every `every` steps all state is written there; when the same call is made
        again, training goes on from there, bit for bit on one machine and thread count. Another
        call, with another rate or seed say, is refused there.
    precision: Lightning's; by default bf16 on GPUs that have it, fp16 on older ones, else float32.
    compile: torch.compile the model; by default on CUDA for 3,000 steps or more: compiling a small
        model took 17 s of an H200's machine, and saved 6 ms a step.
    trainer: Lightning's Trainer options, such as devices and strategy.
    Raises NonFiniteLoss, which names step, batch and learning rate; ValueError for settings that
    can't be, and when data runs dry.
    """
    from lablib.training import loop

    data, held_out = loop.loaders(data, held_out)
    held_out = _kept(held_out)
    warmup = math.ceil(0.05 * steps) if warmup is None else warmup
    _refuse(model, steps, accumulate, clip, warmup, lr, optimizer)
    _refuse_held_out(held_out, held_out_every)
    loss = loss or next_token_loss
    on_gpu = _on_gpu(trainer)
    precision = precision or _precision(on_gpu)
    fused = str(precision) not in ("16", "16-mixed")
    optimizer = optimizer or optimizers.adamw(3e-3 if lr is None else lr, fused=fused)
    history = History()
    run = loop.Training(
        model,
        loss,
        history,
        optimizer,
        factor=lambda step: learning_rate_factor(step, steps, schedule, warmup),
        check_every=_check_every(on_gpu),
        compile=(on_gpu and steps >= 3000) if compile is None else compile,
    )
    call = {"steps": steps, "accumulate": accumulate, "seed": seed, "schedule": schedule}
    call |= {"warmup": warmup, "clip": clip, "precision": precision}
    with _quiet(), torch.random.fork_rng(), kept_modes(model):
        torch.manual_seed(seed)
        feed = feeds.Feed(data, steps * accumulate, resumable=checkpoint is not None)
        saver = None
        if checkpoint is not None:
            saver = state.Checkpoints(checkpoint, every, _described(model, data, optimizer, call))
            history.resumed_from = saver.restore(run, feed)
        held = loop.HeldOut(held_out, held_out_every, loss)
        watch = loop.Watcher(feed, held, saver, steps, progress)
        if not model.training:
            model.train()
        start = time.perf_counter()
        if history.resumed_from < steps:
            options = {
                "accelerator": "auto" if on_gpu else "cpu",
                "devices": 1,
                "precision": precision,
                "max_steps": steps - history.resumed_from,
                "accumulate_grad_batches": accumulate,
                "gradient_clip_val": clip,
                "callbacks": [watch, *trainer.pop("callbacks", [])],
            }
            loop.train(run, feed, options | trainer)
        run.flush()
        held.take(model, history, len(history.losses), final=True)
        history.seconds = time.perf_counter() - start
    return history


def _refuse(model, steps, accumulate, clip, warmup, lr, optimizer) -> None:
    """One sentence for each setting that can't be."""
    if steps < 0:
        raise ValueError(f"steps is {steps}: give 0 or more")
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: give 1 batch a step or more")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}: give a norm above 0, or None for no clipping")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}: give 0 steps or more")
    if lr is not None and optimizer is not None:
        raise ValueError("lr is given beside an optimizer, which has its own: give one of them")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter of the model needs a gradient, so nothing can be trained")


def _refuse_held_out(held_out: Iterable | None, every: int | None) -> None:
    if every is not None and held_out is None:
        raise ValueError(f"held_out_every is {every}, but there are no held_out batches")
    if every is not None and every < 1:
        raise ValueError(f"held_out_every is {every}: give 1 step or more")
    if isinstance(held_out, (list, tuple)) and not held_out:
        raise ValueError("held_out is empty: there is no batch to evaluate on")


def _kept(held_out: Iterable | None) -> Iterable | None:
    """Held-out batches that can be gone through again: a one-shot iterator's are read now."""
    if isinstance(held_out, Iterator):
        if hasattr(held_out, "state_dict"):
            raise ValueError(
                f"held_out is a {type(held_out).__name__}, which has no end: use `sequential`"
            )
        return list(held_out)
    return held_out


def _described(model: nn.Module, data: Any, optimizer, call: dict) -> dict[str, str]:
    """All that the result depends on and that can be told, as text."""
    described = optimizers.describe(optimizer(model)) | feeds.describe(data)
    parameters = {"parameters": sum(p.numel() for p in model.parameters())}
    return described | {key: str(value) for key, value in (call | parameters).items()}


def _on_gpu(trainer: dict) -> bool:
    return torch.cuda.is_available() and trainer.get("accelerator", "auto") in (
        "auto",
        "gpu",
        "cuda",
    )


def _check_every(on_gpu: bool) -> int:
    """Steps between looks at the loss: reading it from a GPU waits for it."""
    return 16 if on_gpu else 1


def _precision(on_gpu: bool) -> str:
    if not on_gpu:
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's remarks on hardware and loaders are not what a reader of a lab needs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
