"""Exercises of lab 408."""

import math

import numpy as np

from lablib.exercises import Exercise, expect


def _stored(ins: int, outs: int, base_ins: int, base_outs: int) -> tuple[float, float]:
    m, grown = ins / base_ins, outs / base_outs
    if m == 1:  # an embedding: each of its outputs is one entry, not a sum that grows
        return math.sqrt(grown), 1.0
    times = 1 / m  # a sum of m times as many terms
    return (m if grown > 1 else math.sqrt(m)), times


def _test_stored(candidate) -> None:
    why = "from 16 x 16 to 64 x 64: W moves a quarter as far, so V = 4 W moves as before"
    expect(candidate(64, 64, 16, 16), (4.0, 0.25), why)
    why = "an embedding from 100 x 16 to 100 x 64: each entry is an output; deviation as the base's"
    expect(candidate(100, 64, 100, 16), (2.0, 1.0), why)
    random = np.random.default_rng()
    base, m, ids = 8 * int(random.integers(2, 9)), float(random.integers(5, 12)), 250
    wide = int(base * m)
    known = [
        ((m, 1 / m), "that starts as what was drawn; a readout's V begins as large as the base's"),
        ((1.0, 1 / m), "drawn with 1/sqrt(wide), V has to become as large as with 1/sqrt(base)"),
        ((math.sqrt(m), 1 / math.sqrt(m)), "the step moves all terms of a sum the same way: 1/m"),
        ((math.sqrt(m), 1.0), "the readout sums over the width: too many terms for one rate"),
    ]
    right = _stored(wide, ids, base, ids)
    why = "a readout sums over the width (1/m), and V begins as large as the base's"
    expect(candidate(wide, ids, base, ids), right, why, known=known)
    why = "a feed-forward layer's inner width is another one, but it grows m times as well"
    expect(candidate(wide, 3 * wide, base, 3 * base), (m, 1 / m), why)


stored = Exercise(
    reference=_stored,
    test=_test_stored,
    question="The scales of the norms: which rule would you give to them?",
    hint="Which of the two sides has grown? Only a sum over a grown side has too many terms.",
    minutes=10,
    difficulty="medium",
)


def _exponent(widths: list, before: list, after: list) -> float:
    moves = [np.sqrt(np.mean((b - a) ** 2)) for a, b in zip(before, after)]
    return float(np.polyfit(np.log(widths), np.log(moves), 1)[0])


def _test_exponent(candidate) -> None:
    still = [np.zeros((5, width)) for width in (8, 16, 32)]
    ones = [x + 0.1 for x in still]
    expect(candidate([8, 16, 32], still, ones), 0.0, "every entry moves by 0.1 at each width")
    grown = [x + 0.1 * x.shape[1] for x in still]
    expect(candidate([8, 16, 32], still, grown), 1.0, "twice the width, twice the move")
    random = np.random.default_rng()
    widths = sorted(int(w) for w in random.choice(np.arange(10, 200), 4, replace=False))
    before = [3.0 + random.normal(size=(50, w)) for w in widths]
    power = float(random.uniform(0.3, 0.8))
    after = [x + w**power * random.normal(size=x.shape) / 50 for x, w in zip(before, widths)]
    sizes = [np.sqrt(np.mean(x**2)) for x in after]
    sums = [np.linalg.norm(b - a) for a, b in zip(before, after)]

    def slope(values):
        return float(np.polyfit(np.log(widths), np.log(values), 1)[0])

    known = [
        (slope(sizes), "how far they moved, not how large they are"),
        (slope(sums), "a norm grows with the number of entries: take their mean square"),
    ]
    right = _exponent(widths, before, after)
    why = "the slope of log move against log width"
    expect(candidate(widths, before, after), right, why, known=known)


exponent = Exercise(
    reference=_exponent,
    test=_test_exponent,
    question="Whose exponent would stay at 0 without muP, too: which layer sums over no width?",
    hint="`np.mean` of squared differences, its root, then `np.polyfit` of two logarithms.",
    minutes=10,
    difficulty="easy",
)


def _foretell(n: np.ndarray, loss: np.ndarray, b: float, large: float) -> float:
    a, c = np.polyfit(n**b, loss, 1)
    return float(a * large**b + c)


def _test_foretell(candidate) -> None:
    n = np.array([1.0, 4.0, 16.0])
    why = "1/sqrt(N) is 1, 1/2, 1/4; losses 4, 3, 2.5 are 2/sqrt(N) + 2"
    expect(candidate(n, np.array([4.0, 3.0, 2.5]), -0.5, 64.0), 2.25, why)
    random = np.random.default_rng()
    n = np.sort(random.uniform(1e4, 1e6, 5))
    b = -float(random.uniform(0.2, 0.6))
    loss = 2 + 30 * n**b + random.normal(size=5) * 0.02
    right = _foretell(n, loss, b, 1e7)
    straight = np.polyval(np.polyfit(np.log(n), np.log(loss), 1), np.log(1e7))
    no_floor = float((n**b @ loss) / (n**b @ n**b) * 1e7**b)
    known = [
        (float(np.exp(straight)), "a straight line of logarithms has no floor c"),
        (no_floor, "the floor c is missing"),
    ]
    why = "with b given, loss is a straight line of N^b"
    expect(candidate(n, loss, b, 1e7), right, why, known=known)


foretell = Exercise(
    reference=_foretell,
    test=_test_foretell,
    question="b is not given in truth. How would you search for it?",
    hint="`np.polyfit(x, y, 1)` gives slope and intercept; here x is `n**b`.",
    minutes=6,
    difficulty="easy",
)


def _deeper(blocks: int, base_blocks: int) -> tuple[float, float]:
    times = math.sqrt(base_blocks / blocks)  # independent outputs add up as their squares do
    rate = base_blocks / blocks / times  # moves the same way add up as they are: blocks * times
    return times, rate


def _test_deeper(candidate) -> None:
    random = np.random.default_rng()
    drawn = int(random.choice([5, 7, 11, 13, 17, 19, 23, 29])), int(random.integers(2, 4))
    for blocks, base_blocks in ((8, 2), drawn):
        less = base_blocks / blocks
        root = math.sqrt(less)
        known = [
            ((less, 1.0), "the sum moves as far, but begins too small: of independent outputs the "
             "squares add up"),
            ((root, 1.0), "the start is right. Moves are all the same way: they add up to "
             "blocks * times * rate"),
            ((root, less), "`times` makes each move smaller already: blocks * times * rate is to "
             "stay"),
            ((1.0, less), "the moves are right; but with times = 1, how large is the start?"),
            ((1 / root, 1 / root), "upside down: a deeper model has more to add up"),
        ]  # fmt: skip
        why = "blocks * times^2 at the start, blocks * times * rate in a step: both as the base's"
        right = _deeper(blocks, base_blocks)
        expect(candidate(blocks, base_blocks), right, why, known=known)


deeper = Exercise(
    reference=_deeper,
    test=_test_deeper,
    question="A block also reads what those before it wrote: are their moves then independent, all "
    "the same, or neither?",
    hint="Sum up n independent numbers of variance 1, and n equal ones: how large is either sum?",
    minutes=12,
    difficulty="open",
)
