"""Exercises of lab 307."""

import torch
from torch import Tensor

from lablib.exercises import Exercise, expect


def _parameters(masks: Tensor, dim: int) -> tuple[int, int]:
    active = int(masks.sum(1).max())  # units of the largest expert
    stored = int((masks.sum(0) > 0).sum())  # units that some expert keeps
    return 3 * dim * active, 3 * dim * stored


def _test_parameters(candidate) -> None:
    masks = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0]])
    why = "Two experts of 2 units each, 3 units in use, dim 10: a unit has a row of gate, a row of "
    why += "up and a column of down, 30 numbers"
    expect(candidate(masks, 10), (60, 90), why)
    masks = (torch.rand(5, 23) < 0.4).float()
    masks[0, :15], masks[1] = 1, masks[0]
    active, stored = _parameters(masks, 7)
    mean = int(21 * masks.sum(1).mean())
    known = [
        ((active, int(21 * masks.sum())), "a unit that several experts keep is stored once"),
        ((active // 3, stored // 3), "a unit has three vectors: of gate, up and down"),
        ((mean, stored), "a token can meet the largest expert: that is what must fit"),
        ((active, 21 * 23), "a unit that no expert keeps can be deleted"),
    ]
    expect(candidate(masks, 7), (active, stored), "3 * dim numbers a unit", known=known)


parameters = Exercise(
    reference=_parameters,
    test=_test_parameters,
    question="What does the union loss keep the second number near, and what would it be without?",
    hint="`masks.sum(1)` counts each expert's units; `masks.sum(0) > 0` says which units are kept "
    "by any.",
    minutes=6,
    difficulty="easy",
)


def _keep_gradient(logits: Tensor, noise: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    soft = ((logits + noise) / temperature).sigmoid()
    return upstream * soft * (1 - soft) / temperature


def _test_keep_gradient(candidate) -> None:
    zero = torch.zeros(3)
    wanted = torch.tensor([0.5, -1.0, 0.0])
    why = (
        "At logit 0 without noise the sigmoid is 1/2, its slope 1/4, and divided by T = 0.5 it is "
    )
    why += "1/2: half of what comes from above"
    expect(candidate(zero, zero, torch.tensor([1.0, -2.0, 0.0]), 0.5), wanted, why)
    logits, noise, upstream = torch.randn(3, 8)
    hard = (((logits + noise) / 0.4).sigmoid() > 0.5).float()
    soft = ((logits + noise) / 0.4).sigmoid()
    known = [
        (upstream * hard, "the mask is hard, its gradient is the soft one's: units that are off "
         "would never come back"),
        (upstream * soft * (1 - soft), "logits were divided by the temperature: so is the slope"),
        (upstream, "the gradient passes through the rounding, and then through the sigmoid, too"),
    ]  # fmt: skip
    hint = "d sigmoid(z) / dz = s (1 - s), with z = (logit + noise) / T"
    right = _keep_gradient(logits, noise, upstream, 0.4)
    expect(candidate(logits, noise, upstream, 0.4), right, hint, known=known)


keep_gradient = Exercise(
    reference=_keep_gradient,
    test=_test_keep_gradient,
    question="Training starts at logits of 3. How large is the factor there, without noise?",
    hint="Only the last step, rounding to 0 or 1, is skipped on the way back.",
    minutes=10,
    difficulty="medium",
)


def _split_shared(masks: Tensor) -> Tensor:
    shared = masks.prod(0, keepdim=True)  # (1, width): kept by every expert
    return torch.cat([shared, masks * (1 - shared)])  # (1 + experts, width)


def _test_split_shared(candidate) -> None:
    masks = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]])
    wanted = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
    expect(candidate(masks), wanted, "Units 0 and 3 are kept by both experts")
    masks = (torch.rand(4, 30) < 0.6).long()
    masks[:, :3] = 1
    right, kept = _split_shared(masks), (masks.sum(0, keepdim=True) > 0).long()
    known = [
        (torch.cat([kept, masks * (1 - kept)]), "shared are the units that all keep, not any"),
        (torch.cat([right[:1], masks]), "take the shared units out of the experts, or they are "
         "computed twice"),
        (right.roll(-1, 0), "the shared part comes first"),
    ]  # fmt: skip
    hint = "shared + rest must be the masks again, and no unit may be in both"
    expect(candidate(masks), right, hint, known=known)


split_shared = Exercise(
    reference=_split_shared,
    test=_test_split_shared,
    question="Every token computes the shared part. What does a machine gain from knowing it?",
    hint="A product over experts is 1 only where all are 1.",
    minutes=6,
    difficulty="easy",
)
