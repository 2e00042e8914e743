"""Exercises of lab 409."""

import copy
import math

import numpy as np
import torch
from torch import nn

from lablib.exercises import Exercise, Wrong, expect, same_kind

VOCAB, DIM = 60, 12


def _model(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """An embedding, a block for each width, a head: (n,) ids -> (n, VOCAB) logits."""
    blocks = [
        nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, w), activation(), nn.Linear(w, DIM))
        for w in widths
    ]
    return nn.Sequential(nn.Embedding(VOCAB, DIM), *blocks, nn.Linear(DIM, VOCAB))


def _size(parameters) -> int:
    return sum(p.numel() for p in parameters)


def _freeze_half(make, tokens, targets):
    model = make()
    for block in model[1:-1][1::2]:
        block.requires_grad_(False)
    nn.functional.cross_entropy(model(tokens), targets).backward()  # through frozen blocks, too
    every = [*model.parameters()]
    trained = [p for p in every if p.requires_grad]
    updated = sum(int((p.grad != 0).sum()) for p in trained)
    return sum(p.numel() for p in every), sum(p.numel() for p in trained), updated


def _test_freeze_half(candidate) -> None:
    random = np.random.default_rng()
    for n in (4, 6):
        widths = random.choice(np.arange(16, 40), n, replace=False)
        model = _model([int(width) for width in widths], nn.ReLU)

        def make(model=model):
            return copy.deepcopy(model)

        tokens, targets = torch.randint(VOCAB, (2, 6))
        total, trained, updated = right = _freeze_half(make, tokens, targets)
        found = candidate(make, tokens, targets)
        same_kind(found, right)
        expect(found[0], total, "Frozen ones are parameters, too, and so are embedding and head")
        why = "Count where `requires_grad` is true: embedding, head and every second block"
        expect(found[1], trained, why, known=_other_halves(model[1:-1], total))
        rows = len(tokens.unique()) * DIM
        known = [
            (trained, "the embedding has a row for every token. How many does this batch read?"),
            (trained - VOCAB * DIM + rows, "a ReLU that no token of the batch opens lets no "
             "gradient through, either: ask each parameter's `grad`"),
            (updated - rows, "the embedding is trained, below the frozen blocks: let gradients "
             "pass through them"),
        ]  # fmt: skip
        expect(found[2], updated, "Count where `grad`, after backward, is not 0", known=known)


def _other_halves(blocks: nn.Sequential, total: int) -> list[tuple[int, str]]:
    """What is trained when something else than every second block is frozen, and what to say."""
    half = [*blocks[1::2].parameters()]
    norms = [p for block in blocks[1::2] for p in block[0].parameters()]
    middle = len(blocks) // 2
    frozen = [
        (blocks[::2].parameters(), "the first block is trained, the second frozen, and so on"),
        (blocks[:middle].parameters(), "every second block, not the first half"),
        (blocks[middle:].parameters(), "every second block, not the last half"),
        ([p for p in half if p.ndim == 2], "freeze norms and biases, too"),
        ([p for p in half if not any(p is norm for norm in norms)], "freeze a block's norm, too"),
        ([], "freeze first: `requires_grad_(False)`"),
    ]
    return [(total - _size(parameters), why) for parameters, why in frozen]


freeze_half = Exercise(
    reference=_freeze_half,
    test=_test_freeze_half,
    question="AdamW with weight decay takes a step. Which numbers does it change?",
    hint="`model[1:-1]` are the blocks. Freeze, then `cross_entropy(model(tokens), targets)` and "
    "`backward()`; frozen parameters have no `grad`.",
    minutes=10,
    difficulty="medium",
)


def _count(in_features: int, out_features: int) -> tuple[int, int]:
    n = 2 ** math.ceil(math.log2(in_features))
    products = math.ceil(out_features / n)  # below each other
    return 2 * n * products, in_features * out_features


def _test_count(candidate) -> None:
    why = "4 numbers in, 4 out: two diagonals of 4, in the place of 16"
    expect(candidate(4, 4), (8, 16), why)
    why = "3 in and 8 out: padded to 4, two products of 8 numbers, in the place of 24"
    expect(candidate(3, 8), (16, 24), why)
    random = np.random.default_rng()
    ins, outs = int(random.integers(33, 60)), int(random.integers(130, 190))
    trained, dense = _count(ins, outs)
    known = [
        ((trained // 2, dense), "H D H D has two diagonals"),
        ((2 * 64, dense), "one product gives 64 outputs: several lie below each other"),
        ((2 * ins * math.ceil(outs / ins), dense), "the input is padded to a power of 2"),
        ((trained + 64 * 64, dense), "Hadamard matrices are not trained, nor even stored"),
    ]
    why = "2 n numbers for every n outputs, n the next power of 2"
    expect(candidate(ins, outs), (trained, dense), why, known=known)


count = Exercise(
    reference=_count,
    test=_test_count,
    question="And the time: how many additions does one product of n numbers take, about?",
    hint="`math.log2(in_features)`, rounded up, is the power; `math.ceil(out / n)` the products.",
    minutes=8,
    difficulty="easy",
)


def _flops(trained: float, frozen: float, tokens: float) -> float:
    forward = 2 * (trained + frozen)
    through = 2 * (trained + frozen)  # gradients of what comes in pass frozen weights, too
    weights = 2 * trained
    return (forward + through + weights) * tokens


def _test_flops(candidate) -> None:
    why = "10 trained and 10 frozen weights: 40 forward, 40 back through, 20 for the weights"
    expect(candidate(10, 10, 1), 100, why)
    random = np.random.default_rng()
    trained, frozen, tokens = (float(v) for v in random.integers(1000, 9000, 3))
    right = _flops(trained, frozen, tokens)
    known = [
        (6 * (trained + frozen) * tokens, "frozen weights get no gradient of their own"),
        (6 * trained * tokens, "frozen weights are multiplied with, too"),
        ((6 * trained + 2 * frozen) * tokens, "gradients must pass through frozen layers, back"),
        (right / tokens, "that is one token"),
    ]
    why = "2 a weight forward, 2 back to what came in, 2 for its own gradient if it has one"
    expect(candidate(trained, frozen, tokens), right, why, known=known)


flops = Exercise(
    reference=_flops,
    test=_test_flops,
    question="All frozen blocks first, all trained ones last: which of the three can be saved?",
    hint="Each weight takes a multiplication and an addition on each of up to three occasions.",
    minutes=8,
    difficulty="medium",
)


def _thaw(make, batches, share):
    model = make()
    held = {}  # of each frozen matrix: where it stays frozen, and what it is there
    for p in model.parameters():
        if p.ndim == 2 and not p.requires_grad:
            stays = torch.ones(p.numel(), dtype=torch.bool)
            stays[torch.randperm(p.numel())[: round(share * p.numel())]] = False
            held[p] = stays.view_as(p), p.detach().clone()
            p.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for tokens, targets in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
        with torch.no_grad():  # a gradient of 0 would not do: weight decay moves these, too
            for p, (stays, before) in held.items():
                p[stays] = before[stays]
    count = sum(p.numel() for p in trained) - sum(int(stays.sum()) for stays, _ in held.values())
    return count, model.state_dict()


def _test_thaw(candidate) -> None:
    random = np.random.default_rng()
    model = _model([int(width) for width in random.integers(20, 40, 4)], nn.GELU)
    for block in model[1:-1][1::2]:
        block.requires_grad_(False)

    def make():
        return copy.deepcopy(model)

    batches = [tuple(torch.randint(VOCAB, (2, 40))) for _ in range(3)]
    for share in (0.1, float(random.uniform(0.12, 0.2))):
        found = candidate(make, batches, share)
        right = _thaw(make, batches, share)
        same_kind(found, right)
        if not isinstance(found[1], dict) or found[1].keys() != right[1].keys():
            raise Wrong("return the weights as `model.state_dict()` has them")
        for name, p in model.named_parameters():
            same_kind(found[1][name], right[1][name])
            _check_moved(name, p, found[1][name], share)
        trained = _size(p for p in model.parameters() if p.requires_grad)
        frozen = _size(p for p in model.parameters() if p.ndim == 2 and not p.requires_grad)
        known = [
            (right[0] - trained, "what was trained before is trained still"),
            (trained + frozen, "of each frozen matrix only a share is trained now"),
            (trained, "thawed numbers are trained, too"),
        ]
        why = "Those trained before, and of each frozen matrix the rounded share"
        expect(found[0], right[0], why, known=known)


def _check_moved(name, p, after, share) -> None:
    """Raise Wrong unless the right numbers of a parameter have moved."""
    moved = after != p.detach()
    if p.requires_grad:
        if not moved.any():
            raise Wrong(f"{name} was trained, and has stayed as it was")
        return
    if p.ndim < 2:
        if moved.any():
            raise Wrong(f"{name} has moved: norms and biases of frozen blocks stay frozen")
        return
    wanted, n = round(share * p.numel()), int(moved.sum())
    if n == p.numel():
        raise Wrong(
            f"all of {name} has moved. A gradient of 0 is not enough: weight decay moves a weight "
            "without one"
        )
    if n != wanted:
        more = "; choose once, before the first step" if n > wanted else ""
        raise Wrong(f"{n} numbers of {name} have moved, not {wanted}{more}")
    if min(float(moved.any(side).float().mean()) for side in (0, 1)) < 0.3:
        raise Wrong(f"the thawed numbers of {name} lie side by side: draw them at random")


thaw = Exercise(
    reference=_thaw,
    test=_test_thaw,
    question="Would such a model lie nearer to the dense line of its trainable parameters than one "
    "with whole blocks frozen, or farther from it?",
    hint="`torch.randperm(n)[:k]` chooses k of n. The optimizer gets the whole matrix: after each "
    "step put back what must stay frozen.",
    minutes=20,
    difficulty="open",
)
