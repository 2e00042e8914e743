"""`fit`: train any module, on any batches, through Lightning."""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lablib.training import state
from lablib.training.clipping import clip_gradients
from lablib.training.losses import Loss, auxiliary_loss, evaluate, n_tokens, next_token_loss
from lablib.training.schedules import learning_rate_factor


class NonFiniteLoss(ArithmeticError):
    """The loss became infinite or not a number; the weights are those before that step."""


@dataclass
class History:
    """What a training did.

    losses: one a step, in nats, auxiliary losses left out. held_out: (steps done, held-out loss).
    seconds, tokens: of this call alone, so that a resumed run does not count the earlier part.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    resumed_from: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Targets a second over this call, held-out evaluation included."""
        return self.tokens / self.seconds if self.seconds else 0.0


def fit(
    model: nn.Module,
    data: Any,
    *,
    steps: int,
    loss: Loss | None = None,
    lr: float = 3e-3,
    warmup: int | None = None,
    schedule: str = "cosine",
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
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

    data: batches - any iterable (begun again when it ends), a DataLoader, `Batches` or a Lightning
        DataModule, whose held-out batches are then used, too.
    loss: (model, batch) -> scalar; without it the next-token loss of (batch, length + 1) tokens.
        Scalars that modules leave in `auxiliary_loss` are added.
    lr, warmup, schedule: AdamW's peak rate; steps of warmup (5 % by default); "cosine", "wsd",
        "constant" or "inverse-sqrt". weight_decay applies to matrices alone. clip: largest norm of
        the gradient.
    accumulate: batches a step.
    held_out: batches whose mean loss is taken at the end, and each `held_out_every` steps.
    checkpoint: a folder. Every `every` steps all state is written there; when the same call is made
        again, training goes on from there, bit for bit on one machine and thread count.
    precision: Lightning's; by default bf16 on GPUs that have it, fp16 on older ones, else float32.
    compile: torch.compile the model; by default on CUDA alone.
    trainer: Lightning's Trainer options, such as devices and strategy.
    Raises NonFiniteLoss, which names step, batch and learning rate; ValueError when data runs dry.
    """
    from lightning import LightningDataModule, Trainer

    if isinstance(data, LightningDataModule):
        held_out = data.val_dataloader() if held_out is None else held_out
        data = data.train_dataloader()
    history = History()
    warmup = math.ceil(0.05 * steps) if warmup is None else warmup
    on_gpu = torch.cuda.is_available() and trainer.get("accelerator", "auto") in (
        "auto",
        "gpu",
        "cuda",
    )
    run = _module(
        model,
        loss or next_token_loss,
        history,
        optimizer={"lr": lr, "betas": betas, "weight_decay": weight_decay},
        factor=lambda step: learning_rate_factor(step, steps, schedule, warmup),
        check_every=16 if on_gpu else 1,
        compile=on_gpu if compile is None else compile,
    )
    with _quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        feed = _Feed(data, steps * accumulate)
        saver = state.Checkpoints(checkpoint, every) if checkpoint else None
        if saver:
            history.resumed_from = saver.restore(run, feed, accumulate)
        held = _HeldOut(held_out, held_out_every, loss or next_token_loss)
        watch = _watcher(run, feed, steps, accumulate, saver, held, progress)
        start = time.perf_counter()
        if history.resumed_from < steps:
            options = {
                "accelerator": "auto" if on_gpu else "cpu",
                "devices": 1,
                "precision": precision or _precision(on_gpu),
                "max_steps": steps - history.resumed_from,
                "accumulate_grad_batches": accumulate,
                "gradient_clip_val": clip,
                "callbacks": [watch, *trainer.pop("callbacks", [])],
            }
            Trainer(**_BARE | options | trainer).fit(run, train_dataloaders=feed)
        run.flush()
        held.take(model, history, len(history.losses), final=True)
        history.seconds = time.perf_counter() - start
    return history


_BARE = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "max_epochs": -1,
}


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


class _Feed:
    """Batches one after the other, begun again when they end, up to a known number.

    Its length is known, so Lightning fetches none ahead: the data's own state is then always that
    after the last batch used, which an exact resume needs.
    """

    def __init__(self, data: Any, total: int):
        self.data, self.total, self.used, self.tokens = data, total, 0, 0
        self.source: Iterator = iter(())

    def __len__(self) -> int:
        return self.total - self.used

    def __iter__(self) -> Iterator:
        for _ in range(len(self)):
            batch = self.draw()
            self.used += 1
            self.tokens += n_tokens(batch)
            yield batch

    def draw(self) -> Any:
        """The next batch of the data."""
        for _ in range(2):
            for batch in self.source:
                return batch
            self.source = iter(self.data)
        raise ValueError(f"the data gave no more batches after {self.used} of {self.total}")


@dataclass
class _HeldOut:
    batches: Iterable | None
    every: int | None
    loss: Loss

    def take(self, model: nn.Module, history: History, done: int, final: bool = False) -> None:
        due = final or (self.every and done % self.every == 0)
        taken = history.held_out and history.held_out[-1][0] == done
        if self.batches is not None and due and not taken:
            history.held_out.append((done, evaluate(model, self.batches, self.loss)))


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms' scales and biases don't."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [(matrices, weight_decay), (others, 0.0)]
    return [{"params": list(group), "weight_decay": decay} for group, decay in groups if group]


def _module(model, loss, history, *, optimizer, factor, check_every, compile):
    """The LightningModule; a function, so that Lightning is imported when training starts."""
    from lightning import LightningModule

    class Training(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.history, self.done = model, history, 0
            self.saved_optimizer: dict | None = None
            self.pending: list[torch.Tensor] = []
            self.__dict__["called"] = torch.compile(model) if compile else model
            sharded = [n for n, p in self.named_parameters() if hasattr(p, "process_group")]
            self._ddp_params_and_buffers_to_ignore = sharded  # DistributedDataParallel reads this

        def training_step(self, batch, batch_index):
            value = loss(self.called, batch)
            self.pending.append(value.detach())
            if len(self.pending) >= check_every * self.trainer.accumulate_grad_batches:
                self.flush()
            return value + auxiliary_loss(self.model)

        def flush(self) -> None:
            """Move finished losses to the history, one a step; stop at the first non-finite one."""
            size = self._trainer.accumulate_grad_batches if self._trainer else 1
            values = torch.stack(self.pending).tolist() if self.pending else []
            for place, value in enumerate(values):
                if not math.isfinite(value):
                    raise NonFiniteLoss(self._what(value, place, size))
            whole = len(values) // size * size
            means = [sum(values[at : at + size]) / size for at in range(0, whole, size)]
            self.history.losses.extend(means)
            self.pending = self.pending[whole:]

        def _what(self, value: float, place: int, size: int) -> str:
            step = len(self.history.losses) + place // size
            rate = optimizer["lr"] * factor(step)
            return (
                f"the loss is {value} at step {step + 1} (batch {step * size + place % size + 1}, "
                f"learning rate {rate:.3g}); try a lower learning rate or a longer warmup"
            )

        def configure_gradient_clipping(self, _, gradient_clip_val=None, **algorithm):
            if gradient_clip_val:
                clip_gradients(self.model.parameters(), gradient_clip_val)

        def configure_optimizers(self):
            groups = _groups(self.model, optimizer["weight_decay"])
            # In float16 the gradients are scaled, and a fused step would unscale after clipping.
            fused = self.trainer.precision != "16-mixed"
            made = torch.optim.AdamW(groups, optimizer["lr"], optimizer["betas"], fused=fused)
            if self.saved_optimizer:
                made.load_state_dict(self.saved_optimizer)
                for group in made.param_groups:
                    group["lr"] = group["initial_lr"] = optimizer["lr"]
            first = self.done
            plan = torch.optim.lr_scheduler.LambdaLR(made, lambda step: factor(first + step))
            return {"optimizer": made, "lr_scheduler": {"scheduler": plan, "interval": "step"}}

    return Training()


def _watcher(run, feed, steps, accumulate, saver, held, progress):
    """One callback for the bar, the checkpoints and the held-out loss."""
    from lightning import Callback

    class Watcher(Callback):
        bar = None

        def on_train_start(self, trainer, module):
            self.bar = _bar(steps, run.history.resumed_from) if progress else None
            self.start, self.shown = time.perf_counter(), 0.0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
            done = run.history.resumed_from + trainer.global_step
            if done == run.done:
                return
            run.done = done
            if self.bar is not None:
                self.tick(run.history)
            if held.every and done % held.every == 0:
                run.flush()
                held.take(run.model, run.history, done)
            if saver and done % saver.every == 0:
                run.flush()
                saver.save(run, feed, trainer.optimizers[0])

        def tick(self, history):
            self.bar.update(1)
            now = time.perf_counter()
            if now - self.shown > 0.5 and history.losses:
                self.shown = now
                speed = feed.tokens / (now - self.start)
                self.bar.set_postfix_str(f"loss {history.losses[-1]:.3f}, {speed:,.0f} tokens/s")

        def on_train_end(self, trainer, module):
            run.history.tokens = feed.tokens
            self.close()

        def on_exception(self, trainer, module, exception):
            self.close()
            if isinstance(exception, NonFiniteLoss) and saver and saver.last:
                kept = f"; the last good checkpoint is {saver.last}"
                exception.args = (exception.args[0] + kept,)

        def close(self):
            if self.bar is not None:
                self.bar.close()

    return Watcher()


def _bar(steps: int, done: int):
    """tqdm's bar: in notebooks and terminals; none where outputs are stored or piped."""
    import os

    from tqdm.auto import tqdm

    static = os.environ.get("LABLIB_STATIC") == "1"
    disable = True if static else None
    return tqdm(
        total=steps, initial=done, unit="step", disable=disable, mininterval=0.2, leave=False
    )
