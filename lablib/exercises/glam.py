"""Exercises of lab 303."""

import numpy as np
import torch
from torch import Tensor

from lablib.exercises import Exercise, expect


def _second_share(gap: Tensor) -> Tensor:
    return 1 / (1 + gap.exp())  # e^b / (e^a + e^b), with a - b = gap


def _test_second_share(candidate) -> None:
    even = torch.zeros(3)
    expect(candidate(even), torch.full((3,), 0.5), "Two equal scores: the experts share evenly")
    third = torch.full((2,), 3.0).log()
    expect(candidate(third), torch.full((2,), 0.25), "A gap of log 3: shares of 3/4 and 1/4")
    gap = 4 * torch.rand(9)
    known = [
        (1 - _second_share(gap), "that is the share of the first; it is the larger one"),
        ((-gap).exp(), "that is the ratio of the two shares; they must sum to 1"),
    ]
    expect(candidate(gap), _second_share(gap), "e^b / (e^a + e^b) for a - b = gap", known=known)


second_share = Exercise(
    reference=_second_share,
    test=_test_second_share,
    question="The other 62 experts' scores are gone from the formula: through what do they learn?",
    hint="Both shares have e to their score in the numerator and the sum of the two below. Divide "
    "above and below by the second one's.",
    minutes=5,
    difficulty="easy",
)


def _total_and_active(
    layers: int, dim: int, ffn: int, inner: int, n_experts: int, vocabulary: int
) -> tuple[int, int]:
    shared = layers * 4 * dim * inner + vocabulary * dim  # attention, embedding
    shared += layers // 2 * (3 * dim * ffn + dim * n_experts)  # GEGLU blocks, gates
    expert = layers // 2 * 2 * dim * ffn
    return shared + n_experts * expert, shared + 2 * expert


def _test_total_and_active(candidate) -> None:
    why = "2 layers, dim 1, ffn 1, inner 1, no vocabulary: attention has 8, the GEGLU 3, the gate 4"
    expect(candidate(2, 1, 1, 1, 4, 0), (23, 19), why + ", each of 4 experts 2")
    random = np.random.default_rng()
    sizes = [int(random.integers(2, 40)) for _ in range(4)]
    sizes = 2 * sizes[0], 8 * sizes[1], 16 * sizes[2], 24 * sizes[3]
    n_experts, vocabulary = int(random.integers(3, 90)), int(random.integers(100, 999))
    total, active = _total_and_active(*sizes, n_experts, vocabulary)
    layers, dim, ffn, _ = sizes
    gated = layers // 2 * dim * ffn
    gates = layers // 2 * dim * n_experts
    known = [
        ((total + n_experts * gated, active + 2 * gated), "experts have two matrices, no GEGLU"),
        ((total - gates, active - gates), "the gate has dim weights for each expert"),
        ((total, total), "of the experts, two work on a token"),
        ((total - vocabulary * dim, active - vocabulary * dim), "the embedding counts, once"),
    ]
    hint = "Half of the blocks have GEGLU layers, half have experts; all have attention"
    expect(candidate(*sizes, n_experts, vocabulary), (total, active), hint, known=known)


total_and_active = Exercise(
    reference=_total_and_active,
    test=_test_total_and_active,
    question="Which of its parts makes GLaM's active weights more than those of the dense 8B?",
    hint="Attention: four matrices of dim * inner, in every block. GEGLU: three of dim * ffn, in "
    "every second one. Experts: two of dim * ffn each, and a gate, in the others. One embedding.",
    minutes=12,
    difficulty="medium",
)


def _kept_share(scores: np.ndarray, alpha: float) -> float:
    return float(np.mean((2 - scores) ** -alpha))  # P(x > t) = (1 + t)^-alpha at t = 1 - score


def _test_kept_share(candidate) -> None:
    ones, zeros = np.ones(4), np.zeros(4)
    expect(candidate(ones, 9.0), 1.0, "Every draw is above 0, so a page of score 1 always stays")
    expect(candidate(zeros, 3.0), 0.125, "A draw is above 1 with chance 2^-3")
    random = np.random.default_rng()
    scores, alpha = random.random(30), float(random.uniform(2, 10))
    known = [
        (float((2 - scores.mean()) ** -alpha), "take the mean of the chances, not of the scores"),
        (float(np.mean((1 + scores) ** -alpha)), "the threshold is 1 - score, not the score"),
        (float(1 - np.mean((2 - scores) ** -alpha)), "that share is thrown away"),
    ]
    hint = "A page stays with chance (1 + t)^-alpha, t = 1 - score; then the mean over pages"
    expect(candidate(scores, alpha), _kept_share(scores, alpha), hint, known=known)


kept_share = Exercise(
    reference=_kept_share,
    test=_test_kept_share,
    question="Why not keep exactly the pages above one half? Whose pages would never be read?",
    hint="Put t = 1 - score into P(x > t). It is an array; the expected share is its mean.",
    minutes=8,
    difficulty="medium",
)
