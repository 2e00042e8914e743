"""What a training step of a billion weights takes on a GPU: labs 712 and 714 at the gpu tier.

Two numbers a way to tune: bytes by `measure.account`, and the most that CUDA's allocator had given
out at once. TinyLlama has a Llama's shapes; its rows are tokens at random, since memory does not
ask what a text says. All in float32; nothing is tuned.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lablib.compression.recover import language_loss, recover
from lablib.models import anatomy, pretrained
from lablib.peft.adapter import adapters, freeze_base_, trainable
from lablib.peft.catalogue import put_
from lablib.peft.lora import lora_
from lablib.peft.measure import Method, account, full
from lablib.peft.on_gpu import Speaker, on_gpu
from lablib.peft.peft_position import prune_
from lablib.peft.qlora import nf4_, qlora_
from lablib.resources import release_memory

NAME = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
RATE = 1e-4  # of all that trains: memory is the same at any


class Sizes(NamedTuple):
    """Of a step: rows, and tokens that are read of each. Of LoRA: its rank. share: pruned."""

    rows: int = 2
    length: int = 256
    rank: int = 8
    share: float = 0.5


SIZES = Sizes()


class Held(NamedTuple):
    """What a step holds: bytes by kind of `account`, and what CUDA had given out at most.

    account: empty where not even a forward pass fitted. peak: None where a step did not fit, or
    where there is no CUDA.
    """

    account: dict[str, int]
    peak: int | None = None


def on_bases(sizes: Sizes = SIZES) -> dict[str, Method]:
    """Lab 712: all weights, and LoRA over three bases, which are made smaller before."""
    pair = {"roles": ("query", "value"), "rank": sizes.rank}
    return {
        "full tuning": full,
        "LoRA": partial(lora_, **pair),
        "LoRA over 4 bits": _both(nf4_, partial(qlora_, **pair)),
        "LoRA over a pruned base": _both(
            partial(prune_, share=sizes.share), partial(lora_, **pair)
        ),
    }


def _both(*puts: Callable[[nn.Module], object]) -> Method:
    def way(model: nn.Module) -> None:
        for put in puts:
            put(model)

    return way


def of_kinds() -> dict[str, Method]:
    """Lab 714: all weights, and methods of the catalogue, of each of the guide's classes."""
    names = ("serial adapter", "prefix", "(IA)3", "norms", "LoRA", "ladder side")
    return {"full tuning": full} | {name: partial(put_, name=name) for name in names}


@on_gpu("That takes a GPU, so no step of a billion weights was made here.")
def say_memory(lab: Speaker, device: str, ways: Mapping[str, Method], sizes: Sizes = SIZES) -> None:
    """A line a way, with what a step holds."""
    model, _ = pretrained(NAME)
    rows = rows_of(model, sizes)
    for name, put in ways.items():
        release_memory()  # the last copy: a ladder and its rungs know each other
        lab.say(line(name, held(model, put, rows, device), device))


def line(name: str, step: Held, device: str) -> str:
    """A way's bytes in gigabytes: by account, by kind, and as CUDA counted."""
    if not step.account:
        return f"{name}: more than this GPU has."
    weights, gradients, moments, saved, total = (b / 1e9 for b in step.account.values())
    told = f"{name}: {total:.2f} GB by account (weights {weights:.2f}, for what trains "
    told += f"{gradients + moments:.2f}, for going back {saved:.2f})"
    if step.peak is not None:
        return f"{told}, at most {step.peak / 1e9:.2f} GB at once by CUDA's counter."
    return f"{told}; " + ("nobody counted here." if device == "cpu" else "this GPU has less.")


def rows_of(model: nn.Module, sizes: Sizes = SIZES, seed: int = 0) -> Tensor:
    """(rows, length + 1): tokens at random, the same for all ways."""
    random, vocab = torch.Generator().manual_seed(seed), anatomy.embedding(model).num_embeddings
    return torch.randint(vocab, (sizes.rows, sizes.length + 1), generator=random)


def copied(model: nn.Module, device: str) -> nn.Module:
    """A copy on a device, made there: what is large never lies twice in the main memory."""
    there: dict[int, object] = {
        id(t): t.detach().to(device, copy=True) for t in [*model.parameters(), *model.buffers()]
    }
    there |= {id(p): nn.Parameter(there[id(p)]) for p in model.parameters()}
    return copy.deepcopy(model, there)


def held(model: nn.Module, put: Method, rows: Tensor, device: str = "cpu") -> Held:
    """What a step of a way holds, in a copy of the model, which goes again.

    What was on the GPU before isn't counted.
    """
    before, counted, peak = _given(), {}, None
    with contextlib.suppress(torch.OutOfMemoryError):
        torch.manual_seed(0)
        adapted, rows = copied(model, device), rows.to(device)
        put(adapted)
        counted = accounted(adapted, rows)
        stepped(adapted, rows)
        peak = _most() - before if device == "cuda" else None
    return Held(counted, peak)


def accounted(model: nn.Module, rows: Tensor) -> dict[str, int]:
    """`account` of a step on all rows, of what a method brought, else of all weights."""
    freeze_base_(model) if adapters(model) else model.requires_grad_(True)
    return account(model, lambda model: language_loss(model, rows))


def stepped(model: nn.Module, rows: Tensor) -> list[float]:
    """Two steps of AdamW on all rows, in place; the second alone can be seen in CUDA's peak.

    Moments are there only then, as in all steps that follow. Returns the two losses.
    """

    def forget(step: int, rate: float) -> None:
        if step == 0 and rows.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    names = list(trainable(model)) or "all"
    options = {"batch": len(rows), "trainable": names, "after_step": forget}
    return recover(model, rows, 2, RATE, **options)


def _given() -> int:
    """Bytes that CUDA has given out now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _most() -> int:
    """Bytes that it had given out at most since its peak was forgotten."""
    return torch.cuda.max_memory_allocated()
