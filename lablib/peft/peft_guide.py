"""A guide to efficient tuning (Lialin et al., 2023): what a method costs, by more than its size.

A training step holds, in bytes, with mixed-precision Adam,
    2 N_frozen + (2 + 2 + 4 + 4 + 4) N_trained + saved
where `saved` is what the backward pass needs: of every block above the lowest that trains, however
few numbers that is. So four questions tell more of a method than how many numbers it trains:
    storage    is its file smaller than the model?
    memory     does a step hold less than one of full tuning?
    backprop   does no gradient pass the model's own blocks?
    inference  once trained, can it vanish into the weights, and does it?
`traits` answers them for a method that is in a model, by looking.

Lab 714. Kinds of methods are in `lablib.peft.catalogue`; here is how they lie on a map, and S4
(Chen et al., 2023), which gives four groups of blocks methods of their own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from lablib.compression.recover import language_loss
from lablib.models import GPTConfig, anatomy
from lablib.models.hub import empty_model
from lablib.peft.adapter import (
    Adapter,
    WeightAdapter,
    adapters,
    fold_,
    freeze_base_,
    method,
    n_trainable,
    trainable,
)
from lablib.peft.bottleneck import pfeiffer_
from lablib.peft.catalogue import KINDS, METHODS, Probe, put_, upper
from lablib.peft.lora import lora_
from lablib.peft.measure import account, adapter_bytes
from lablib.peft.prefix import prefix_
from lablib.peft.subset import Tuned, biases_

ADAM = {"weight": 2, "gradient": 2, "master copy": 4, "first moment": 4, "second moment": 4}
OVERHEAD = 1.02  # times the base's seconds, from which on inference counts as slower


def training_bytes(
    n_frozen: float, n_trained: float, saved: float = 0.0, frozen_bits: float = 16
) -> float:
    """Bytes of a step of mixed-precision Adam: 2 N_frozen + 16 N_trained + saved.

    frozen_bits: of a frozen weight, 4 where it is quantized. saved: for the backward pass, bytes.
    """
    return n_frozen * frozen_bits / 8 + n_trained * sum(ADAM.values()) + saved


class MixedAdam:
    """AdamW on float32 copies of weights that are kept in half precision.

    parameters: in bfloat16 or float16, with gradients of the same type.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float):
        self.parameters = list(parameters)
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        self.adam = torch.optim.AdamW(self.masters, lr=rate, weight_decay=0.0)

    @torch.no_grad()
    def step(self) -> None:
        """Change the copies, then round them into the weights; gradients stay as they are."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
        self.adam.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)
            master.grad = None

    def held(self) -> dict[str, int]:
        """Bytes that are held between two steps, by the names of `ADAM`; a step has been made."""
        states = [self.adam.state[master] for master in self.masters]
        kinds = {
            "weight": self.parameters,
            "gradient": [p.grad for p in self.parameters],
            "master copy": self.masters,
            "first moment": [state["exp_avg"] for state in states],
            "second moment": [state["exp_avg_sq"] for state in states],
        }
        return {kind: sum(t.nbytes for t in tensors) for kind, tensors in kinds.items()}


def step_bytes(model: nn.Module, rows: Tensor) -> dict[str, int]:
    """`account` of a step on rows (n, length + 1); without a method in it all of a model trains."""
    brought = bool(adapters(model))
    freeze_base_(model) if brought else model.requires_grad_(True)
    return account(model, lambda model: language_loss(model, rows))


def reaches(model: nn.Module, rows: Tensor) -> list[int]:
    """The blocks whose own output a gradient passes, while what asks for one trains."""
    passed: list[int] = []

    def watch(place: int) -> Callable:
        def look(module, args, output):
            h = output[0] if isinstance(output, tuple) else output
            if h.requires_grad:
                h.register_hook(lambda gradient: passed.append(place))

        return look

    hooks = [b.register_forward_hook(watch(i)) for i, b in enumerate(anatomy.blocks(model))]
    try:
        language_loss(model, rows).backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return sorted(set(passed))


def vanishes(adapter: Adapter) -> bool:
    """Whether it can be written into the weights that are there, so that no shape changes."""
    if isinstance(adapter, Tuned):  # a bias that the model lacks would be new
        return all(adapter.base._parameters.get(name) is not None for name in adapter.own())
    return isinstance(adapter, WeightAdapter)


def mergeable(model: nn.Module) -> bool:
    """Whether everything that a method put in vanishes."""
    found = adapters(model).values()
    return bool(found) and all(map(vanishes, found))


def ready_to_serve(model: nn.Module) -> nn.Module:
    """The model as it would answer: what can be is written into its weights, shapes as before."""
    if mergeable(model):
        for name, adapter in adapters(model).items():
            if isinstance(adapter, Tuned):
                for own, parameter in adapter.own().items():
                    adapter.base._parameters[own].data.copy_(parameter.data)
                adapter.take_out(model, name)
        fold_(model)
    return model.eval()


def as_if_trained(put: Callable[[nn.Module], None], by: float) -> Callable[[nn.Module], None]:
    """The method, with noise of this deviation on what it trains: its start may change nothing."""

    def way(model: nn.Module) -> None:
        put(model)
        with torch.no_grad():
            for parameter in {id(p): p for p in trainable(model).values()}.values():
                parameter += by * torch.randn_like(parameter)

    return way


def traits(model: nn.Module, rows: Tensor, full_bytes: float) -> dict:
    """The four questions, of a method that is in a model, and the numbers behind the answers.

    rows: (n, length + 1), of a step. full_bytes: what the same step holds when all weights train.
    Keys: trained, file (bytes), bytes (of a step), saved; storage, memory, backprop and vanishes
    are True for the cheap answer.
    """
    step = step_bytes(model, rows)
    weights = sum(p.nbytes for p in model.parameters())
    row = {"trained": n_trainable(model), "file": adapter_bytes(model), "bytes": step["total"]}
    return row | {
        "saved": step["saved"],
        "storage": row["file"] < weights / 2,
        "memory": row["bytes"] < full_bytes,
        "backprop": not reaches(model, rows),
        "vanishes": mergeable(model),
    }


@torch.no_grad()
def inference_seconds(
    models: Mapping[str, nn.Module],
    tokens: Tensor,
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each model's pass over tokens (n, length), in turns.

    Each round begins with another model, so that none always follows the same one. clock: such as
    `time.thread_time`, this thread's own seconds, where other processes want the processor too.
    """
    names, taken = list(models), {name: [] for name in models}
    for round_ in range(repeats + 1):  # the first one warms up
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            start = clock()
            anatomy.logits(models[name], tokens)
            if round_:
                taken[name].append(clock() - start)
    return {name: median(seconds) for name, seconds in taken.items()}


def table(
    model: nn.Module, rows: Tensor, names: Sequence[str], probe: Probe | None = None
) -> dict[str, dict]:
    """`traits` of methods of the catalogue, by name, and of full tuning; each in a copy."""
    everything = step_bytes(copy.deepcopy(model), rows)
    made = {}
    for name in names:
        adapted = copy.deepcopy(model)
        put_(adapted, name, probe)
        made[name] = traits(adapted, rows, everything["total"])
    weights, n = (sum(f(p) for p in model.parameters()) for f in (_nbytes, Tensor.numel))
    cheap = dict.fromkeys(("storage", "memory", "backprop"), False) | {"vanishes": True}
    whole = {"trained": n, "file": weights, "bytes": everything["total"]}
    return {"full tuning": whole | {"saved": everything["saved"]} | cheap} | made


def _nbytes(tensor: Tensor) -> int:
    return tensor.nbytes


# S4: groups of blocks, each with methods of its own.


GROUPS = (  # the one that is known of T5-base; the paper itself was not at hand
    ("adapter", "LoRA"),
    ("adapter", "prefix"),
    ("adapter", "prefix", "biases"),
    ("prefix", "biases", "LoRA"),
)


def spindle(n_blocks: int) -> list[range]:
    """Four groups of neighboring blocks, those in the middle larger: about 1, 2, 2 and 1 sixths.

    Raises ValueError for fewer than four blocks.
    """
    if n_blocks < 4:
        raise ValueError(f"{n_blocks} blocks are too few for four groups")
    end = max(1, round(n_blocks / 6))
    cuts = (0, end, end + (n_blocks - 2 * end + 1) // 2, n_blocks - end, n_blocks)
    return [range(*pair) for pair in pairwise(cuts)]


def within_(model: nn.Module, put: Callable[[nn.Module], None], chosen: Sequence[int]) -> None:
    """Put a method into these blocks alone: into all, then out of the others again."""
    before = {id(adapter) for adapter in adapters(model).values()}
    put(model)
    stems = tuple(f"{anatomy.family(model).blocks}.{i}." for i in chosen)
    for name, adapter in reversed(list(adapters(model).items())):
        if id(adapter) not in before and not f"{name}.".startswith(stems):
            adapter.take_out(model, name)


def _s4(
    model: nn.Module, rank: int = 8, length: int = 8, groups: Sequence[Sequence[str]] = GROUPS
) -> None:
    put = {
        "adapter": lambda m: pfeiffer_(m, rank),
        "prefix": lambda m: prefix_(m, length),
        "LoRA": lambda m: lora_(m, _attending(m), rank=rank),
        "biases": biases_,
    }
    noted, parts = getattr(model, "peft_methods", []), spindle(len(anatomy.blocks(model)))
    for name, build in put.items():
        chosen = [
            i for part, names in zip(parts, groups, strict=True) if name in names for i in part
        ]
        within_(model, build, chosen)
    model.peft_methods = noted  # `s4_` notes itself


def _attending(model: nn.Module) -> tuple[str, ...]:
    fused = "query_key_value" in anatomy.family(model).projections
    return ("query_key_value",) if fused else ("query", "value")


@method
def s4_(
    model: nn.Module, rank: int = 8, length: int = 8, groups: Sequence[Sequence[str]] = GROUPS
) -> None:
    """Put adapters, prefixes, biases and LoRA into four groups of blocks, as `groups` says.

    rank: of LoRA, and the adapters' width; length: of the prefix. groups: names for each group.
    Raises ValueError for a model of fewer than four blocks, and for T5.
    """
    if anatomy.family(model).name.startswith("T5"):
        raise ValueError("T5's attention takes no prefix, and S4 has one in three of its groups")
    _s4(model, rank, length, groups)


# The map.


AREAS = dict.fromkeys(KINDS[:3], "addition") | {
    "structured selection": "selection",
    "unstructured selection": "selection",
    "reparametrization": "reparametrization",
}
CIRCLES = {"addition": (-0.85, 0.45), "selection": (0.85, 0.45), "reparametrization": (0.0, -0.85)}
RADIUS = 1.25
SPOTS = {  # areas -> where its names stand: x, y of the first, and in how many columns
    ("addition",): (-1.45, 1.45, 2),
    ("selection",): (1.35, 1.0, 1),
    ("reparametrization",): (-0.3, -0.95, 2),
    ("addition", "reparametrization"): (-0.62, -0.3, 1),
    ("addition", "selection"): (0.0, 0.75, 1),
    ("reparametrization", "selection"): (0.62, -0.3, 1),
    ("addition", "reparametrization", "selection"): (0.0, 0.1, 1),
}


def areas(name: str) -> tuple[str, ...]:
    """The circles that a method of the catalogue lies in, in order of the alphabet."""
    return tuple(sorted({AREAS[kind] for kind in METHODS[name].kinds}))


def layout(names: Iterable[str], dx: float = 0.62, dy: float = 0.155) -> dict[str, tuple]:
    """Method -> (x, y) on a map of three circles, at `CIRCLES` with `RADIUS`."""
    found: dict[str, tuple[float, float]] = {}
    standing: dict[tuple[str, ...], int] = {}
    for name in names:
        place = areas(name)
        x, y, columns = SPOTS[place]
        row, column = divmod(standing.setdefault(place, 0), columns)
        standing[place] += 1
        found[name] = (x + dx * column, y - dy * row)
    return found


# What fits: costs that were counted on a small model, at the size of a large one.


SIZES = {
    "Llama 3.2, 1.2 billion": GPTConfig(128_256, 2048, 16, 32, 8, ffn_dim=8192),
    "Llama 2, 7 billion": GPTConfig(32_000, 4096, 32, 32, ffn_dim=11_008, tied=False),
    "Llama 2, 70 billion": GPTConfig(32_000, 8192, 80, 64, 8, ffn_dim=28_672, tied=False),
}


@lru_cache(maxsize=64)
def trained_at(name: str, size: str) -> int:
    """How many numbers a method of the catalogue trains in one of `SIZES`; nothing is allocated.

    Counted on shapes of one block and of two, since every further block adds as many. A ladder's
    and FISH's numbers, which depend on the weights, follow from the same shapes.
    """
    config = SIZES[size]
    if name == "full tuning":
        return empty_model(config).n_parameters()
    if name == "intrinsic SAID":
        return 4000  # wherever it is, as in the catalogue
    one, two = (_trained(name, replace(config, n_layers=n)) for n in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def _trained(name: str, config: GPTConfig) -> int:
    model = empty_model(config)
    numbers = sum(layer.weight.numel() for layer in anatomy.projections(model).values())
    if name == "FISH":
        return numbers // 100  # one percent of every projection
    if name == "ladder side":  # a quarter of the width: a 16th of the blocks, and what leads there
        narrow = config.dim // 4
        ways = (config.n_layers + 2) * config.dim * narrow
        return numbers // 16 + ways + config.n_layers * (3 * narrow + 1) + 2 * narrow + config.dim
    lengths = 0
    if name == "DoRA":  # LoRA, and the length of every row
        name, pair = "LoRA", anatomy.projections(model, *_attending(model))
        lengths = sum(len(layer.weight) for layer in pair.values())
    put_(model, name)
    return n_trainable(model) + lengths


def per_token(model: nn.Module, shorter: nn.Module, rows: Tensor) -> tuple[float, float]:
    """Saved bytes a token: of one block for each feature of its width, and of all the rest.

    model, shorter: with a method, and the same with one block less. rows: (2 n, length + 1).
    Half of the rows and all of them tell what grows with tokens from what doesn't.
    """
    half = len(rows) // 2
    tokens, width = half * (rows.shape[1] - 1), anatomy.embedding(model).weight.shape[1]
    slopes = []
    for m in (model, shorter):
        few, many = (step_bytes(m, part)["saved"] for part in (rows[:half], rows))
        slopes.append((many - few) / tokens)
    block = slopes[0] - slopes[1]
    return block / width, slopes[0] - block * len(anatomy.blocks(model))


def slopes_of(
    model: nn.Module, names: Sequence[str], rows: Tensor, probe: Probe | None = None
) -> dict[str, tuple[float, float]]:
    """`per_token` of methods of the catalogue and of full tuning, by name; the model stays."""
    made = {}
    for name in ("full tuning", *names):
        pair = [copy.deepcopy(model), upper(model, 1)]
        for m in pair if name in METHODS else []:
            put_(m, name, probe)
        made[name] = per_token(*pair, rows)
    return made


@dataclass(frozen=True)
class Cost:
    """What a method costs at one of `SIZES`, in bytes.

    model: its weights. frozen, trained, saved: of a step, by kind. file: of what is kept.
    """

    model: float
    frozen: float
    trained: float
    saved: float
    file: float

    @property
    def step(self) -> float:
        """Of a training step, in all."""
        return self.frozen + self.trained + self.saved

    def fits(self, card: float, tasks: int, merged: bool) -> bool:
        """Whether a card of so many bytes is enough, to train and to serve."""
        return max(self.step, self.serving(tasks, merged)) <= card

    def serving(self, tasks: int, merged: bool) -> float:
        """Of all tasks in memory at once: merged, a copy of the model each; else a file each."""
        return tasks * self.model if merged else self.model + tasks * self.file


def cost_at(
    name: str, size: str, slope: tuple[float, float], tokens: int, vocab: int, bits: float = 16
) -> Cost:
    """A method's cost at one of `SIZES`, in half precision.

    slope: `per_token` of a small model in float32, of this vocabulary; half of a block's bytes
    count here, while the head's logits stay in float32 and grow with the vocabulary.
    bits: of a frozen weight.
    """
    config, trained = SIZES[size], trained_at(name, size)
    everything = trained_at("full tuning", size)
    frozen = 0 if name == "full tuning" else everything
    block, rest = slope
    a_token = block / 2 * config.dim * config.n_layers + rest * config.vocab_size / vocab
    ours, half = trained * sum(ADAM.values()), 2.0
    return Cost(everything * half, frozen * bits / 8, ours, tokens * a_token, trained * half)
