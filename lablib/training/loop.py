"""The training loop: what Lightning's Trainer calls. The one module here that imports Lightning."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from lablib.training.clipping import clip_gradients
from lablib.training.feed import Feed
from lablib.training.history import History, NonFiniteLoss
from lablib.training.losses import Loss, auxiliary_loss, evaluate
from lablib.training.optimizers import MakeOptimizer
from lablib.training.state import Checkpoints

PATIENCE = 32  # float16 steps in a row that may be skipped while the loss scale is found
_BARE = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "max_epochs": -1,
}


class Training(LightningModule):
    """A model with its loss and its optimizer; stops before a step that would break the weights.

    factor: steps done -> share of the peak learning rate. check_every: steps between looks at the
    losses. Reading a number from a GPU waits for it, so looks are rare there; meanwhile a flag on
    the device makes fused optimizers leave the weights alone. Others are looked at each step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        history: History,
        optimizer: MakeOptimizer,
        factor: Callable[[int], float],
        check_every: int = 1,
        compile: bool = False,
    ):
        super().__init__()
        self.model, self.history, self.done = model, history, 0
        self.optimizer, self.factor, self.check_every = optimizer, factor, check_every
        # A partial, no attribute of its own: a compiled model is a module of the same parameters.
        self.loss_of = partial(loss, torch.compile(model) if compile else model)
        self.saved_optimizer: dict | None = None
        self.size = 1  # batches a step
        self.seen: list[tuple[Tensor, Tensor | int, Tensor]] = []  # loss, count, with auxiliary
        self.counts: list[Tensor | int] = []  # of this step's batches
        self.norms: list[Tensor] = []
        self.bad: Tensor | None = None
        self.fresh, self.skipped, self.last_batch = False, 0, -1
        sharded = [n for n, p in self.named_parameters() if hasattr(p, "process_group")]
        self._ddp_params_and_buffers_to_ignore = sharded  # DistributedDataParallel reads this

    def on_fit_start(self) -> None:
        self.size = self.trainer.accumulate_grad_batches

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """The batch's loss with auxiliary losses; the sum, not the mean, where it has a count."""
        value = self.loss_of(batch)
        value, count = value if isinstance(value, tuple) else (value, 1)
        total = value + auxiliary_loss(self.model) * count
        if batch_index % self.size == 0:
            self.counts = []
        self.counts.append(count)
        self.fresh = batch_index != self.last_batch  # L-BFGS computes a batch several times
        if self.fresh:
            self.seen.append((value.detach(), count, total.detach()))
            self.last_batch = batch_index
        return total

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_) -> None:
        """Clip; then look at losses and norm, while the weights are still those before the step."""
        self._divide_by_counts()
        norm = clip_gradients(self.model.parameters(), gradient_clip_val)
        if not self.fresh:
            return
        self.norms.append(norm)
        if self.bad is not None:
            self.bad = self.bad | ~(norm + self.seen[-1][2]).isfinite()
            optimizer.found_inf = self.bad.float()  # as a GradScaler sets it
        if len(self.norms) >= self.check_every:
            self.flush()

    def _divide_by_counts(self) -> None:
        """From the mean over batches of sums to the sum over all divided by their number."""
        if not isinstance(self.counts[0], Tensor):
            return
        count, processes = torch.stack(self.counts).sum(), 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(count)
            processes = torch.distributed.get_world_size()
        scale = self.size * processes / count.clamp(min=1)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)

    def flush(self) -> None:
        """Move finished steps to the history; raise NonFiniteLoss at the first that is not finite.

        The weights are then those before that step.
        """
        steps, self.norms = _numbers(self.norms), []
        batches = [_numbers(column) for column in zip(*self.seen)] or [[], [], []]
        self.seen = []
        for step, norm in enumerate(steps):
            part = slice(step * self.size, (step + 1) * self.size)
            values, counts, totals = (column[part] for column in batches)
            self._refuse("loss", values)
            self._refuse("loss with auxiliary losses", totals)
            if not sum(counts) and self.trainer.world_size == 1:
                raise ValueError(f"step {len(self.history.losses) + 1} has nothing counted in it")
            self._refuse_norm(norm)
            self.history.losses.append(sum(values) / (sum(counts) or 1))

    def _refuse(self, what: str, values: list[float]) -> None:
        for place, value in enumerate(values):
            if not math.isfinite(value):
                raise NonFiniteLoss(self._message(what, value, place))

    def _refuse_norm(self, norm: float) -> None:
        """In float16 a GradScaler skips such a step and lowers its scale, so a few are fine."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (PATIENCE if self.trainer.precision == "16-mixed" else 0):
            raise NonFiniteLoss(self._message("gradient's norm", norm, self.size - 1))

    def _message(self, what: str, value: float, place: int) -> str:
        step = len(self.history.losses)
        rate = self.peak * self.factor(step)
        return (
            f"the {what} is {value} at step {step + 1} (batch {step * self.size + place + 1}, "
            f"learning rate {rate:.3g}); try a lower learning rate or a longer warmup"
        )

    def configure_optimizers(self) -> dict:
        made = self.optimizer(self.model)
        rates = [group["lr"] for group in made.param_groups]
        self.peak = float(max(rates))
        if self.saved_optimizer:
            made.load_state_dict(self.saved_optimizer)
            for group, rate in zip(made.param_groups, rates):
                group["lr"] = group["initial_lr"] = rate
        self._choose_guard(made)
        first = self.done
        plan = torch.optim.lr_scheduler.LambdaLR(made, lambda step: self.factor(first + step))
        return {"optimizer": made, "lr_scheduler": {"scheduler": plan, "interval": "step"}}

    def _choose_guard(self, made: torch.optim.Optimizer) -> None:
        takes_flag = getattr(made, "_step_supports_amp_scaling", False)
        if self.trainer.precision == "16-mixed":
            if takes_flag:
                raise ValueError(
                    f"a fused {type(made).__name__} unscales float16 gradients after they are "
                    "clipped: make it with fused=False"
                )
        elif takes_flag and self.check_every > 1:
            place = next(self.model.parameters())
            self.bad = torch.zeros((), dtype=torch.bool, device=place.device)
        else:
            self.check_every = 1


def _numbers(column: Iterable[Tensor | int]) -> list[float]:
    """Read in one go: each reading from a GPU waits for it."""
    column = list(column)
    if column and isinstance(column[0], Tensor):
        return torch.stack(column).tolist()
    return column


class HeldOut:
    """Takes the held-out loss, when it is due, into the history."""

    def __init__(self, batches: Iterable | None, every: int | None, loss: Loss):
        self.batches, self.every, self.loss = batches, every, loss

    def take(self, model: nn.Module, history: History, done: int, final: bool = False) -> None:
        """At the end, and each `every` steps; never twice at one step."""
        due = final or (self.every and done % self.every == 0)
        taken = history.held_out and history.held_out[-1][0] == done
        if self.batches is not None and due and not taken:
            history.held_out.append((done, evaluate(model, self.batches, self.loss)))


class Watcher(Callback):
    """The bar, the checkpoints and the held-out loss of a training."""

    def __init__(
        self,
        feed: Feed,
        held: HeldOut,
        saver: Checkpoints | None,
        steps: int,
        progress: bool,
    ):
        self.feed, self.held, self.saver = feed, held, saver
        self.steps, self.progress, self.bar = steps, progress, None

    def on_train_start(self, trainer, module):
        self.bar = _bar(self.steps, module.history.resumed_from) if self.progress else None
        self.start, self.shown = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        done = module.history.resumed_from + trainer.global_step
        if done == module.done:
            return
        module.done = done
        if self.bar is not None:
            self.tick(module.history)
        if self.held.every and done % self.held.every == 0:
            module.flush()
            self.held.take(module.model, module.history, done)
        if self.saver and done % self.saver.every == 0:
            module.flush()
            self.saver.save(module, self.feed, trainer.optimizers[0])

    def tick(self, history: History) -> None:
        """One step further, and twice a second the loss and the speed."""
        self.bar.update(1)
        now = time.perf_counter()
        if now - self.shown > 0.5 and history.losses:
            self.shown = now
            speed = self.feed.tokens / (now - self.start)
            self.bar.set_postfix_str(f"loss {history.losses[-1]:.3f}, {speed:,.0f} tokens/s")

    def on_train_end(self, trainer, module):
        module.history.tokens = self.feed.tokens
        self.close()

    def on_exception(self, trainer, module, exception):
        self.close()
        if isinstance(exception, ArithmeticError) and self.saver and self.saver.last:
            kept = f"; the last good checkpoint is {self.saver.last}"
            exception.args = (exception.args[0] + kept,)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def _bar(steps: int, done: int):
    """tqdm's bar: in notebooks and terminals; none where outputs are stored or piped."""
    from tqdm.auto import tqdm

    static = os.environ.get("LABLIB_STATIC") == "1"
    disable = True if static else None
    return tqdm(
        total=steps, initial=done, unit="step", disable=disable, mininterval=0.2, leave=False
    )


def loaders(data: Any, held_out: Iterable | None) -> tuple[Any, Iterable | None]:
    """Training and held-out batches: a LightningDataModule's, set up first, or what was given."""
    if not isinstance(data, LightningDataModule):
        return data, held_out
    data.prepare_data()
    data.setup("fit")
    has_own = type(data).val_dataloader is not LightningDataModule.val_dataloader
    if held_out is None and has_own:
        held_out = data.val_dataloader()
    return data.train_dataloader(), held_out


def train(module: Training, feed: Feed, options: dict) -> None:
    """Run Lightning's Trainer, bare unless `options` say otherwise.

    Lightning turns Ctrl-C into SystemExit and ignores all later ones: both are undone.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        Trainer(**_BARE | options).fit(module, train_dataloaders=feed)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
