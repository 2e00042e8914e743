"""What a method costs, and what it gives: memory, bytes to keep, time, a held-out loss.

Memory is counted, so it is the same on every machine: parameters, their gradients, the optimizer's
state, and what autograd saves for the backward pass. Beside it stands what was observed, which the
allocator has a say in.
"""

from __future__ import annotations

import mmap
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from lablib.modes import kept_modes, kept_requires_grad
from lablib.peft.adapter import (
    WeightAdapter,
    adapters,
    freeze_base_,
    merge_,
    remove_,
    save_adapter,
    trainable,
)
from lablib.resources import measure, release_memory

Method = Callable[[nn.Module], None]  # puts adapters into a model, in place
Loss = Callable[[nn.Module], Tensor]
Learn = Callable[[nn.Module], object]  # trains what asks for gradients, in place
Judge = Callable[[nn.Module], float]  # a held-out loss, or another number of a trained model

ADAM = 2 * 4  # bytes a number that trains: two moments in float32


def full(model: nn.Module) -> None:
    """The method that brings nothing: all weights train."""


def account(model: nn.Module, loss: Loss) -> dict[str, int]:
    """Bytes of one training step of what asks for gradients, by kind.

    Keys: parameters (buffers among them), gradients, optimizer (AdamW's moments), saved (by
    autograd for the backward pass, each storage once, parameters not again), total.
    """
    kept = _storages([*model.parameters(), *model.buffers()])
    training = [p for p in model.parameters() if p.requires_grad]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(model)  # holds what was saved, so that no address comes twice
    del value
    bytes_of = {
        "parameters": sum(kept.values()),
        "gradients": sum(p.numel() * p.element_size() for p in training),
        "optimizer": sum(p.numel() * ADAM for p in training),
        "saved": sum(saved.values()),
    }
    return bytes_of | {"total": sum(bytes_of.values())}


def bill(model: nn.Module, loss: Loss, names: Collection[str] | None = None) -> str:
    """In words: how many numbers train, and what a training step holds by `account`.

    names: of the parameters that train; None: what adapters brought. The model is left as it was.
    """
    chosen = set(trainable(model) if names is None else names)
    with kept_requires_grad(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        row = account(model, loss)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    n, whole = sum(size for size, asks in sizes if asks), sum(size for size, _ in sizes)
    weights, beside = row["parameters"] / 1e6, (row["total"] - row["parameters"]) / 1e6
    return (
        f"{n:,} numbers train, {n / whole:.2%} of all; a step holds {beside:,.1f} MB beside "
        f"{weights:,.1f} MB of weights"
    )


def _storages(tensors) -> dict[int, int]:
    storages = [t.untyped_storage() for t in tensors]
    return {s.data_ptr(): s.nbytes() for s in storages}


def adapter_bytes(model: nn.Module) -> int:
    """The size of the file that `save_adapter` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        save_adapter(model, file)
        return file.stat().st_size


def merge_error(model: nn.Module, outputs: Callable[[nn.Module], Tensor]) -> float | None:
    """The largest difference of outputs after merging; None where something can't be merged."""
    found = adapters(model).values()
    if not found or not all(isinstance(a, WeightAdapter) for a in found):
        return None
    with torch.no_grad(), kept_modes(model):
        model.eval()
        before = outputs(model)
        try:
            merge_(model)
        except ValueError:  # such as over a base in 4 bits
            return None
        after = outputs(model)
    for adapter in found:
        adapter.unmerge()
    return (after - before).abs().max().item()


def measure_method(
    model: nn.Module,
    method: Method,
    loss: Loss,
    outputs: Callable[[nn.Module], Tensor] | None = None,
    *,
    learn: Learn | None = None,
    judge: Judge | None = None,
    observed: bool = False,
) -> dict:
    """A method's row; the model is given back as it was.

    Keys: n_trainable, share (of all numbers), file_bytes, those of `account`, merge_error (after
    learning), held_out (what `judge` says then), rise_bytes (how far memory rose in a step of
    AdamW, where `observed` asks for one). None is what was not asked for, or can't be told. What
    the adapters bring trains; of a method that brings nothing, all weights.
    """
    own = list(model.parameters())
    with kept_requires_grad(model):
        method(model)
        try:
            brought = bool(adapters(model))
            _train_only(model, brought)
            n = sum(p.numel() for p in model.parameters() if p.requires_grad)
            row = {"n_trainable": n, "share": n / sum(p.numel() for p in model.parameters())}
            row |= {"file_bytes": adapter_bytes(model) if brought else _bytes(model)}
            row |= account(model, loss)
            row |= {"rise_bytes": rise(lambda: _step(model, loss)) if observed else None}
            before = [] if brought or learn is None else [p.detach().clone() for p in own]
            if learn is not None:
                learn(model)
            row |= {"held_out": judge(model) if judge else None}
            row |= {"merge_error": merge_error(model, outputs) if outputs else None}
            with torch.no_grad():
                for parameter, bits in zip(own, before):
                    parameter.copy_(bits)
            return row
        finally:
            remove_(model)
            for parameter in own:
                parameter.grad = None


def measure_methods(
    model: nn.Module,
    methods: Mapping[str, Method],
    loss: Loss,
    outputs: Callable[[nn.Module], Tensor],
    *,
    learn: Learn | None = None,
    judge: Judge | None = None,
    repeats: int = 3,
) -> dict[str, dict]:
    """`measure_method` of each, observed, with the seconds of `times`: step and inference.

    Times come first, since their first round also reads weights from the disk.
    """
    taken = times(model, methods, loss, outputs, repeats)
    options: dict = {"learn": learn, "judge": judge, "observed": True}
    return {
        name: measure_method(model, method, loss, outputs, **options) | taken[name]
        for name, method in methods.items()
    }


def _train_only(model: nn.Module, brought: bool) -> None:
    if brought:
        freeze_base_(model)
    else:
        model.requires_grad_(True)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def times(
    model: nn.Module,
    methods: Mapping[str, Method],
    loss: Loss,
    outputs: Callable[[nn.Module], Tensor],
    repeats: int = 5,
) -> dict[str, dict[str, float]]:
    """Median seconds of a training step and of inference, each method's, taken in turns.

    A step is forward, backward and AdamW's update of what trains. Seconds are the processor's own,
    which others' work on the machine hardly lengthens; where CUDA works, those of the clock. Ratios
    of two methods can be believed. The model is given back as it was.
    """
    seconds: dict[str, dict[str, list[float]]] = {n: {"step": [], "inference": []} for n in methods}
    with kept_requires_grad(model):
        for round_ in range(repeats + 1):  # the first one warms up
            for name, method in methods.items():
                method(model)
                _train_only(model, bool(adapters(model)))
                taken = _once(model, loss, outputs)
                remove_(model)
                if round_:
                    for what, value in taken.items():
                        seconds[name][what].append(value)
    return {n: {what: median(v) for what, v in row.items()} for n, row in seconds.items()}


def _once(model: nn.Module, loss: Loss, outputs) -> dict[str, float]:
    def infer():
        with torch.no_grad():
            outputs(model)

    return {"step": _spent(lambda: _step(model, loss)), "inference": _spent(infer)}


def _step(model: nn.Module, loss: Loss) -> None:
    """Forward, backward and a step of AdamW that moves nothing."""
    named = trainable(model) or dict(model.named_parameters())
    parameters = list({id(p): p for p in named.values()}.values())  # a shared one once
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def _spent(work: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        return measure({"work": work}, repeats=1)["work"][0]
    start = time.process_time()
    work()
    return time.process_time() - start


def rise(work: Callable[[], object], every: float = 0.002) -> int | None:
    """By how many bytes memory rises while `work` runs: a GPU's, where something lies on one.

    Else this process's resident memory, looked at every so many seconds; None where the system
    doesn't tell (/proc). What is freed and used again isn't seen to rise there.
    """
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - start
    status = Path("/proc/self/statm")
    if not status.exists():
        return None
    done, seen = threading.Event(), []

    def look() -> None:
        while not done.wait(every):
            seen.append(int(status.read_text().split()[1]))

    release_memory()
    start = int(status.read_text().split()[1])
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return mmap.PAGESIZE * (max([start, *seen]) - start)
