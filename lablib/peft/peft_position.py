"""Open questions of efficient tuning (a position paper, 2023), in functions that run.

Lab 712. A training step multiplies three times by each weight: forward, 2 operations a weight and
token; back to the activations, 2; and for the weight's own gradient, 2. Freezing saves the last
alone, 4/6 remain (`step_flops`). The paper's challenges, and what stands for each here:

    architectures         ranks found by search, not set alike     ranked_lora_, successive_halving
    learning settings     one task after another; many clients     continual, federated
    compression           low-rank changes of a small base         prune_, qlora.py
    multi-modal models    a reader of images                       layernorm_tuning.py, lab 706
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lablib.models import anatomy
from lablib.peft.adapter import adapter_state, matrix, method, remove_, save_adapter
from lablib.peft.lora import LoRALinear

Data = TypeVar("Data")
Learn = Callable[[nn.Module, Data], object]
Score = Callable[[nn.Module, Data], float]
State = dict[str, Tensor]


class Leaf(NamedTuple):
    """An open question of a challenge: the claim that asks it, or where else it is.

    paper: whose claim, by its slug. where: of what lab 712 doesn't ask itself. hoped: which sign of
    method minus baseline would be good news.
    """

    challenge: str
    question: str
    claim: str = ""
    where: str = ""
    hoped: str = "lower"
    paper: str = "peft-position"


MAP = (
    Leaf("architectures", "one design for all tasks", where="lab 713"),
    Leaf("architectures", "one rate for all texts", "rates"),
    Leaf("architectures", "ranks found by search", "search"),
    Leaf("learning settings", "few examples", where="labs 708, 709 and 711"),
    Leaf("learning settings", "text after text", "forgetting"),
    Leaf("learning settings", "data that may not travel", "clients", hoped="higher"),
    Leaf("learning settings", "retrieval", where="labs 1002 and 1003"),
    Leaf("compression", "a base in 4 bits", "quantized"),
    Leaf("compression", "a pruned base", "pruned"),
    Leaf("compression", "a distilled base", where="not here"),
    Leaf("several media", "images", "beats-lora", where="lab 706", paper="layernorm-tuning"),
)


def step_flops(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, int]:
    """Operations of products of matrices in one training step: forward, backward, total.

    Of what asks for gradients; on the meta device too, where nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        value = loss(model)
        forward = counter.get_total_flops()
        value.backward()
    total = counter.get_total_flops()
    for parameter in model.parameters():
        parameter.grad = None
    return {"forward": forward, "backward": total - forward, "total": total}


class Bytes(NamedTuple):
    """What a parameter of the base, and one that trains, takes while training."""

    base: float
    trained: float


ADAM = 2 + 4 + 4 + 4  # gradient in 16 bits; a copy of the weight and two moments in 32
COSTS = {  # way -> bytes, and the share that trains where it isn't all
    "full tuning": Bytes(2, ADAM),
    "LoRA": Bytes(2, 2 + ADAM),
    "LoRA over 4 bits": Bytes(4.127 / 8, 2 + ADAM),
}


def training_bytes(n: float, way: str, share: float = 0.01) -> float:
    """Of weights, gradients and Adam's state, without activations.

    n: parameters of the base. way: of COSTS. share: of them that LoRA trains beside them.
    """
    base, trained = COSTS[way]
    return n * (base + trained * (1 if way == "full tuning" else share))


@method
def ranked_lora_(
    model: nn.Module, ranks: Sequence[int], roles: Sequence[str] = (), alpha: float = 1.0
) -> None:
    """LoRA with a rank of its own in each block; 0 leaves a block alone.

    alpha: of a rank of 1, so that the factor alpha / r is the same in all blocks.
    Raises ValueError when there are not as many ranks as blocks.
    """
    if len(ranks) != (n := len(anatomy.blocks(model))):
        raise ValueError(f"{len(ranks)} ranks are given, and the model has {n} blocks")
    start = f"{anatomy.family(model).blocks}."
    for name, layer in anatomy.projections(model, *roles).items():
        if rank := ranks[int(name.removeprefix(start).split(".")[0])]:
            anatomy.replace(model, name, LoRALinear(layer, rank, alpha * rank))


def allocations(n_blocks: int, budget: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Different ways to share `budget` ranks out over blocks, the even one first.

    Raises ValueError when there are fewer than `count`, or none that is even.
    """
    if budget % n_blocks:
        raise ValueError(f"{budget} ranks can't be shared evenly by {n_blocks} blocks")
    draw, found = np.random.default_rng(seed), [(budget // n_blocks,) * n_blocks]
    for _ in range(100 * count):
        cuts = np.sort(draw.choice(budget + n_blocks - 1, n_blocks - 1, replace=False))
        bars = [-1, *cuts, budget + n_blocks - 1]  # stars between bars
        found.append(tuple(int(b - a - 1) for a, b in pairwise(bars)))
        if len(different := list(dict.fromkeys(found))) == count:
            return different
    raise ValueError(f"there are no {count} ways to share {budget} ranks by {n_blocks} blocks")


Candidate = TypeVar("Candidate")


def successive_halving(
    candidates: Sequence[Candidate], score: Callable[[Candidate, int], float], steps: int
) -> tuple[Candidate, list[dict[Candidate, float]]]:
    """The best candidate, and the scores of each round: half go on, with twice the steps.

    score: (candidate, steps) -> what is to be low. steps: of the first round.
    Source: Jamieson and Talwalkar (2016).
    """
    left, rounds = list(candidates), []
    while len(left) > 1:
        rounds.append({candidate: score(candidate, steps) for candidate in left})
        left = sorted(left, key=rounds[-1].get)[: len(left) // 2]
        steps *= 2
    return left[0], rounds


@torch.no_grad()
def prune_(model: nn.Module, share: float, *roles: str) -> dict[str, Tensor]:
    """Set the smallest weights of each projection to zero, in place.

    share: of each matrix. Returns name -> mask (out, in) of what stays.
    """
    kept = {}
    for name, layer in anatomy.projections(model, *roles).items():
        weight = matrix(layer)
        stays = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        stays[weight.abs().flatten().argsort()[: round(share * weight.numel())]] = False
        kept[name] = stays.view(weight.shape)
        weight.mul_(kept[name])
    return kept


def continual(
    model: nn.Module,
    tasks: Mapping[str, Data],
    learn: Learn,
    score: Score,
    put: Callable[[nn.Module], None] | None = None,
) -> list[dict[str, float]]:
    """Learn one task after another; what each of them scores after each, seen ones and others.

    put: adds adapters; each task then gets its own, kept apart and put back to score the task, and
        a task that is still to come is scored by the base. None trains the model as it is.
    """
    kept: dict[str, State] = {}

    def scored(task: str) -> float:
        if task not in kept:
            return score(model, tasks[task])
        put(model)
        load_state(model, kept[task])
        value = score(model, tasks[task])
        remove_(model)
        return value

    table = []
    for task, data in tasks.items():
        if put is not None:
            put(model)
        learn(model, data)
        if put is not None:
            kept[task] = {n: t.clone() for n, t in adapter_state(model).items()}
            remove_(model)
        table.append({other: scored(other) for other in tasks})
    return table


def forgotten(table: Sequence[Mapping[str, float]]) -> float:
    """Mean rise of a loss, of all tasks but the last: at the end, over right after learning."""
    tasks = list(table[0])[:-1]
    return float(np.mean([table[-1][t] - table[i][t] for i, t in enumerate(tasks)]))


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy values into the model's tensors of these names."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in state.items():
        named[name].copy_(value)


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> State:
    """Weighted mean, tensor by tensor; weights: how much each counts, alike where None."""
    given = torch.tensor(weights or [1.0] * len(states), dtype=torch.float64)
    shares = (given / given.sum()).tolist()
    return {
        name: sum(share * state[name] for share, state in zip(shares, states, strict=True))
        for name in states[0]
    }


class Saved(NamedTuple):
    """Bytes of a saved file: what says which tensors it has, and their numbers."""

    header: int
    tensors: int


def saved_bytes(model: nn.Module) -> Saved:
    """Of the file that `save_adapter` writes; the header says method, options and base, too."""
    with TemporaryDirectory() as folder:
        save_adapter(model, file := Path(folder) / "adapter.safetensors")
        content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")  # the format: a length, then so much JSON
    return Saved(header, len(content) - header)


class Rounds(NamedTuple):
    """scores: after each round, of each client. sent: bytes, both ways, in all rounds."""

    scores: list[dict[str, float]]
    sent: int


def federated(
    model: nn.Module,
    names: Collection[str],
    clients: Mapping[str, Data],
    learn: Learn,
    score: Score,
    rounds: int,
) -> Rounds:
    """Each client trains a copy of the named parameters on its data; the mean goes on.

    Data stay where they are: parameters alone are sent, to each client and back. Clients count
    alike. Source: FedAvg (McMahan et al., 2017).
    """
    named = {n: p for n, p in model.named_parameters() if n in set(names)}
    there = {n: p.detach().clone() for n, p in named.items()}
    scores, sent = [], 0
    for _ in range(rounds):
        back = []
        for data in clients.values():
            load_state(model, there)
            learn(model, data)
            back.append({n: p.detach().clone() for n, p in named.items()})
            sent += 2 * sum(t.nbytes for t in there.values())
        there = average(back)
        load_state(model, there)
        scores.append({client: score(model, data) for client, data in clients.items()})
    return Rounds(scores, sent)
