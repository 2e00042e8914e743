"""Exercises of lab 1003."""

import random

import numpy as np

from lablib.exercises import Exercise, expect


def _weighted_mean(states, n_tokens):
    weights = np.arange(1, n_tokens + 1)  # w_t = t
    return weights @ states[:n_tokens] / weights.sum()


def _test_weighted_mean(candidate) -> None:
    states = np.array([[1.0, 0.0], [4.0, 6.0], [100.0, 100.0]])
    why = "Two tokens, (1, 0) and (4, 6), and one of padding: (1 * 1 + 2 * 4) / 3 and 2 * 6 / 3"
    expect(candidate(states.copy(), 2), np.array([3.0, 4.0]), why)
    for _ in range(3):
        n, length, dim = random.randint(3, 6), random.randint(8, 11), random.randint(3, 5)
        states = np.random.randn(length, dim)
        wanted = _weighted_mean(states, n)
        places = np.arange(1, length + 1)
        known = [
            (states[:n].mean(0), "all tokens count the same in yours"),
            (places @ states / places.sum(), "rows after n_tokens are padding"),
            (np.arange(n) @ states[:n] / np.arange(n).sum(), "the first token counts 1, not 0"),
            (places[:n] @ states[:n] / n, "divide by the sum of the weights"),
            (places[:n][::-1] @ states[:n] / places[:n].sum(), "the last token counts most"),
        ]
        expect(candidate(states.copy(), n), wanted, why, known=known)


weighted_mean = Exercise(
    reference=_weighted_mean,
    test=_test_weighted_mean,
    question="What has the last token seen, in a decoder, that the first one has not?",
    hint="Weights 1, 2, ..., n_tokens; `weights @ states` sums rows by weight.",
    minutes=6,
    difficulty="easy",
)


def _two_minima(losses):
    half = len(losses) // 2
    small = 1 + int(np.argmin(losses[:half]))
    large = 1 + half + int(np.argmin(losses[half:]))
    return small, large


def _test_two_minima(candidate) -> None:
    why = "Of losses 3, 1, 5, 4 the lower half's least is at depth 2, the upper half's at depth 4"
    expect(candidate(np.array([3.0, 1.0, 5.0, 4.0])), (2, 4), why)
    for _ in range(4):
        n = random.choice([7, 9, 12, 15])
        losses = np.random.permutation(n) + np.random.rand(n) / 2
        half, (small, large) = n // 2, _two_minima(losses)
        lowest = np.argsort(losses)[:2]
        more = 1 + int(np.argmin(losses[: half + 1])), 2 + half + int(np.argmin(losses[half + 1 :]))
        known = [
            ((large, small), "the small depth first, then the large one"),
            ((small - 1, large - 1), "a depth counts blocks: the first entry is depth 1"),
            ((small, large - half), "the upper half's depth counts all blocks below it, too"),
            (more, "of an odd number, the upper half has one more"),
            (tuple(sorted(int(p) + 1 for p in lowest)), "one least loss in each half"),
        ]
        expect(candidate(losses.copy()), (small, large), why, known=known)


two_minima = Exercise(
    reference=_two_minima,
    test=_test_two_minima,
    question="What does the rule prune when losses fall from the first block to the last?",
    hint="`half = len(losses) // 2`; np.argmin counts from 0, a depth from 1.",
    minutes=8,
    difficulty="easy",
)


def _share_removed(dim, ffn_dim, n_blocks, vocab, n, embedding):
    block = 4 * dim * dim + 3 * dim * ffn_dim
    whole = n_blocks * block + embedding * vocab * dim
    return 100 * (n_blocks - n) * block / whole


def _test_share_removed(candidate) -> None:
    why = "Of width 2 and 4 blocks with 3 * 2 * 1 + 4 * 2 * 2 = 22 weights, one of which stays: "
    why += "66 of 88 go, or of 108 with a table of 10 rows"
    expect(candidate(2, 1, 4, 10, 1, False), 75.0, why)
    expect(candidate(2, 1, 4, 10, 1, True), 100 * 66 / 108, why)
    for _ in range(3):
        dim, ffn = random.randint(20, 60), random.randint(70, 160)
        blocks, vocab = random.randint(9, 14), random.randint(900, 3000)
        n = random.randint(2, 3)
        sizes = (dim, ffn, blocks, vocab, n)
        right, bare = (_share_removed(*sizes, embedding) for embedding in (True, False))
        kept = 100 - right
        two = 4 * dim * dim + 2 * dim * ffn
        known = [
            (bare, "embedding is True: its table counts in the whole, and stays"),
            (kept, "that is the share that stays"),
            (right / 100, "in per cent"),
            (
                100 * (blocks - n) * two / (blocks * two + vocab * dim),
                "the feed-forward layer has three matrices",
            ),
        ]
        expect(candidate(*sizes, True), right, why, known=known)
        expect(candidate(*sizes, False), bare, "Without its table, blocks are all there is")


share_removed = Exercise(
    reference=_share_removed,
    test=_test_share_removed,
    question="Which of two models of equal size loses more: the deep one with few words, or the "
    "shallow one with many?",
    hint="A block has four matrices (dim, dim) for attention and three (dim, ffn_dim); norms are "
    "left out here. The table of embeddings is (vocab, dim), and no cut makes it smaller.",
    minutes=8,
    difficulty="medium",
)
