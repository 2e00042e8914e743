"""Exercises of lab 409."""

import math

import numpy as np

from lablib.exercises import Exercise, expect


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


def _transform(x: np.ndarray) -> np.ndarray:
    if len(x) == 1:
        return x
    first, second = np.split(x, 2)
    top, bottom = _transform(first + second), _transform(first - second)
    return np.concatenate([top, bottom]) / math.sqrt(2)


def _test_transform(candidate) -> None:
    why = "(3, 1) -> (3 + 1, 3 - 1) / sqrt(2)"
    expect(candidate(np.array([3.0, 1.0])), np.array([4.0, 2.0]) / math.sqrt(2), why)
    random = np.random.default_rng()
    x = random.normal(size=16)
    right = _transform(x)
    known = [
        (4 * right, "divide by sqrt(2) on each of the four levels: the length of x must stay"),
        (right / 4, "sqrt(2) a level, not 2"),
        (np.concatenate([x[:8] + x[8:], x[:8] - x[8:]]) / math.sqrt(2), "go on with the halves"),
    ]
    why = "halves a and b: the transforms of a + b and of a - b, over sqrt(2)"
    expect(candidate(x), right, why, known=known)


transform = Exercise(
    reference=_transform,
    test=_test_transform,
    question="What do you get when you transform twice?",
    hint="It may call itself: with one number there is nothing to do.",
    minutes=12,
    difficulty="medium",
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
