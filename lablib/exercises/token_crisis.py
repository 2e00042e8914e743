"""Exercises of lab 404."""

import numpy as np
import torch
from torch import Tensor

from lablib.exercises import Exercise, expect


def _inverted_dropout(x: Tensor, draws: Tensor, p: float) -> Tensor:
    kept = draws >= p  # true with probability 1 - p
    return torch.where(kept, x / (1 - p), torch.zeros_like(x))


def _test_inverted_dropout(candidate) -> None:
    x, draws = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.1, 0.6, 0.4, 0.9])
    why = "At p = 0.5 the draws 0.1 and 0.4 are lost, and 2 and 4 are doubled"
    expect(candidate(x, draws, 0.5), torch.tensor([0.0, 4, 0, 8]), why)
    x, draws, p = torch.randn(6, 7), torch.rand(6, 7), 0.1 + 0.3 * torch.rand(1).item()
    kept = draws >= p
    known = [
        (x * kept, "the mean shrinks: what is left must grow by 1 / (1 - p)"),
        (x * ~kept / p, "lost is what has a draw below p, not what is kept"),
        (x * kept / p, "divide by the probability of being kept, 1 - p"),
        (x * kept * (1 - p), "that is what the first dropout did in use; in training divide"),
    ]
    hint = "an entry is kept where its draw is at least p"
    expect(candidate(x, draws, p), _inverted_dropout(x, draws, p), hint, known=known)


inverted_dropout = Exercise(
    reference=_inverted_dropout,
    test=_test_inverted_dropout,
    question="The mean stays. What happens to the variance of an entry whose value is 1?",
    hint="`draws >= p` is the mask; multiply by it, then make the expectation right.",
    minutes=6,
    difficulty="easy",
)


def _residual(x: Tensor, added: Tensor, draws: Tensor, p: float) -> Tensor:
    kept = (draws >= p)[:, None, None]  # (batch, 1, 1): a sequence as a whole
    return x + added * kept / (1 - p)


def _test_residual(candidate) -> None:
    x, added = torch.ones(2, 1, 2), torch.tensor([[[1.0, 2]], [[3, 4]]])
    why = "At p = 0.5 the first sequence keeps its stream of ones, the second gets twice 3 and 4"
    right = torch.tensor([[[1.0, 1]], [[7, 9]]])
    expect(candidate(x, added, torch.tensor([0.2, 0.8]), 0.5), right, why)
    batch, p = 5, 0.1 + 0.3 * torch.rand(1).item()
    x, added, draws = torch.randn(batch, 4, 3), torch.randn(batch, 4, 3), torch.rand(batch)
    draws[0], draws[1] = 0.01, 0.99
    kept = (draws >= p)[:, None, None]
    known = [
        (x + added * kept, "the mean of what is added shrinks: divide by 1 - p"),
        ((x + added) * kept / (1 - p), "the stream itself stays: only what the layer adds is lost"),
        (x + added * ~kept / (1 - p), "lost is the sequence whose draw is below p"),
    ]
    hint = "one draw decides for all places and features of a sequence"
    expect(candidate(x, added, draws, p), _residual(x, added, draws, p), hint, known=known)


residual = Exercise(
    reference=_residual,
    test=_test_residual,
    question="What does a sequence whose every layer is dropped still go through?",
    hint="Give the mask two more axes of length 1, so that it spreads over length and dim.",
    minutes=8,
    difficulty="medium",
)


def _counted(attention: int, feed_forward: int, layers: int, experts: int, shared: bool) -> tuple:
    stored = attention + experts * feed_forward
    used = layers * (attention + feed_forward)  # a token meets one expert a layer
    return stored if shared else layers * stored, used


def _test_counted(candidate) -> None:
    why = "Two layers of 100 and 200, with 4 experts: 2 (100 + 800) are stored, 2 (100 + 200) used"
    expect(candidate(100, 200, 2, 4, False), (1800, 600), why)
    attention, width = (int(n) for n in torch.randint(50, 500, (2,)))
    layers = int(torch.randint(3, 9, (1,)))
    once = attention + width
    known = [
        ((once, once), "a shared block is stored once and still used in each layer"),
        ((layers * once, layers * once), "one block stands in the place of all"),
    ]
    hint = "FLOPs follow what a token is multiplied with, memory what is stored"
    right = _counted(attention, width, layers, 1, True)
    expect(candidate(attention, width, layers, 1, True), right, hint, known=known)
    experts = int(torch.randint(3, 9, (1,)))
    right = _counted(attention, width, layers, experts, False)
    known = [
        ((right[0], right[0]), "a token meets one expert in each layer, not all"),
        ((experts * right[1], right[1]), "only the feed-forward part has experts"),
    ]
    expect(candidate(attention, width, layers, experts, False), right, hint, known=known)


counted = Exercise(
    reference=_counted,
    test=_test_counted,
    question="Which of the two numbers should say how much a model can learn by heart?",
    hint="First one layer: what is stored of it, and what does a token meet?",
    minutes=8,
    difficulty="medium",
)


def _switch_step(held_out: list[float], every: int, patience: int) -> int:
    lowest, since = float("inf"), 0
    for reading, loss in enumerate(held_out, 1):
        lowest, since = (loss, 0) if loss < lowest else (lowest, since + 1)
        if since == patience:
            return reading * every
    return len(held_out) * every


def _test_switch_step(candidate) -> None:
    why = "The lowest of 3, 2, 1, 2, 2 is the third reading. The fifth, in step 50, is the second "
    why += "that is not below it"
    expect(candidate([3.0, 2.0, 1.0, 2.0, 2.0], 10, 2), 50, why)
    why = "These losses fall to the end: the moment never comes, which is the last step"
    expect(candidate([3.0, 2.0, 1.0], 10, 2), 30, why)
    random = np.random.default_rng()
    patience, every, n = (int(v) for v in random.integers((3, 5, 8), (6, 50, 14)))
    fall = 5 - np.cumsum(random.uniform(0.1, 0.2, n))
    bump = int(random.integers(2, n - 2))
    fall[[bump, bump + 1]] = fall[[bump + 1, bump]]  # one reading is up, and the next down again
    wobble = np.where(np.arange(patience + 3) % 2, 0.1, 0.3) + random.uniform(0, 0.1, patience + 3)
    later = fall[-1] - np.array([0.6, 0.5])  # what nobody knows yet when the moment has come
    curve = [*fall.tolist(), *(fall[-1] + wobble).tolist(), *later.tolist()]
    right = _switch_step(curve, every, patience)
    last = len(curve) * every
    known = [
        (last, "the moment comes before the end. Count the readings since the lowest one, whether "
         "they rise or fall among themselves; one that is below it starts the count anew"),
        (last - every, "that is the lowest of all, and comes later: a run can't look ahead"),
        (n * every, "the lowest reading is a lowest one only when `patience` others have come"),
        ((bump + 2) * every, "a single reading may be up by chance: wait for `patience` of them"),
        (right // every, "that is a number of readings: there are `every` steps to each"),
        (right - every, "the first reading comes after `every` steps, not after none"),
    ]  # fmt: skip
    hint = "a run knows no loss that comes after the moment: go through the readings one by one"
    expect(candidate(curve, every, patience), right, hint, known=known)


switch_step = Exercise(
    reference=_switch_step,
    test=_test_switch_step,
    question="Try your moment, an earlier and a later one. Do they differ by more than seeds do?",
    hint="Keep two numbers: the lowest loss so far, and how many readings are not below it since.",
    minutes=12,
    difficulty="open",
)
