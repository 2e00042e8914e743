"""Exercises of lab 713."""

import random
from itertools import product

import numpy as np

from lablib.exercises import Exercise, expect


def _classify(traits):
    def one(methods, shared, own, weight):
        if methods > 1:
            return 3  # hybrid
        if shared:
            return 4  # unified
        if own:
            return 1  # partial
        return 2 if weight else 0  # reparameterized, else additive

    return np.array([one(*row) for row in traits])


NAMED = {
    "MAM, a prefix and an adapter": ((2, 0, 0, 0), 3),
    "ProPELT, one adapter behind masks in all blocks": ((1, 1, 0, 0), 4),
    "BitFit, the base's biases": ((1, 0, 1, 1), 1),
    "LoRA, a weight plus a thin product": ((1, 0, 0, 1), 2),
    "a prompt, rows before the text": ((1, 0, 0, 0), 0),
}


def _test_classify(candidate) -> None:
    for name, (traits, wanted) in NAMED.items():
        expect(candidate(np.array([traits])), np.array([wanted]), f"That row is {name}")
    rows = [(m, *rest) for m in (1, 2, 3) for rest in product((0, 1), repeat=3)]
    for _ in range(3):
        random.shuffle(rows)
        traits = np.array(rows[: random.randint(12, len(rows))])
        why = "Ask in the order of the text, and stop at the first yes"
        known = [(_classify(traits * [1, 1, 1, 0]), "a change of a weight is not additive")]
        expect(candidate(traits.copy()), _classify(traits), why, known=known)


classify = Exercise(
    reference=_classify,
    test=_test_classify,
    question="(IA)3 multiplies keys, values and inner activations by vectors. Is that a weight "
    "that is changed, or something new among the activations?",
    hint="Four questions for each row, one after the other; the first yes decides. A loop will do.",
    minutes=8,
    difficulty="easy",
)


def _shared_masks(dim, rank, blocks):
    entries = 2 * dim * rank
    biases = rank + dim
    trained = entries + biases + blocks * entries
    kept = 32 * (entries + biases) + blocks * entries
    return trained, kept


def _test_shared_masks(candidate) -> None:
    why = (
        "of width 2, rank 1 and three blocks: two matrices hold 4 numbers, biases 3; scores are 4 "
    )
    why += "a block. So 7 + 12 numbers train, and 7 * 32 + 12 bits stay"
    expect(candidate(2, 1, 3), (19, 236), why)
    for _ in range(3):
        dim, rank, blocks = (random.randint(low, 90) for low in (20, 3, 2))
        entries, biases = 2 * dim * rank, rank + dim
        trained, kept = _shared_masks(dim, rank, blocks)
        known = [
            ((kept, trained), "the numbers that train first, then the bits to keep"),
            ((trained, 32 * trained), "a score trains as a number, but a mask is kept as bits"),
            ((entries + biases, kept), "scores train, too: one for each entry, in each block"),
            ((trained - biases, kept - 32 * biases), "both projections have a bias, shared by all"),
            (
                (entries + biases + entries, 32 * (entries + biases) + entries),
                "each block has masks of its own",
            ),
            ((trained, kept // 8), "bits, not bytes"),
        ]
        expect(candidate(dim, rank, blocks), (trained, kept), why, known=known)


shared_masks = Exercise(
    reference=_shared_masks,
    test=_test_shared_masks,
    question="From how many blocks on is sharing smaller on disk than an adapter in each block?",
    hint="A prototype has W_down (rank, dim), W_up (dim, rank) and a bias for each. A mask has an "
    "entry for each number of a matrix, but none for the biases.",
    minutes=10,
    difficulty="medium",
)


def _adam_bytes(shapes, rank):
    base = sum(rows * columns for rows, columns in shapes)
    added = sum(rank * (rows + columns) for rows, columns in shapes)
    return 16 * base, 4 * base + 16 * added


def _test_adam_bytes(candidate) -> None:
    why = "one weight of 3 by 5, rank 1: 15 numbers of 16 bytes each, or 15 of 4 bytes and 8 of 16"
    expect(candidate([(3, 5)], 1), (240, 188), why)
    for _ in range(3):
        shapes = [(random.randint(9, 60), random.randint(9, 60)) for _ in range(3)]
        rank = random.randint(2, 7)
        full, lora = _adam_bytes(shapes, rank)
        base, added = full // 16, (lora - full // 4) // 16
        known = [
            ((lora, full), "full tuning first, then LoRA"),
            ((full, 16 * added), "LoRA's frozen base is held, too"),
            ((full, lora - 4 * added), "A and B are numbers, with gradients and two means"),
            ((12 * base, 4 * base + 12 * added), "a number, its gradient, and two means: 16 bytes"),
            ((full, lora + 4 * base), "a frozen weight has no gradient"),
        ]
        expect(candidate(shapes, rank), (full, lora), why, known=known)


adam_bytes = Exercise(
    reference=_adam_bytes,
    test=_test_adam_bytes,
    question="What is left out of this sum, and why does it hardly change with the method?",
    hint="In float32 a number takes 4 bytes. A number that trains also has a gradient and Adam's "
    "two running means; a frozen one has nothing else.",
    minutes=8,
    difficulty="easy",
)
