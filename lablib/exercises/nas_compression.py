"""Exercises of lab 805."""

import numpy as np

from lablib.compression.nas_compression import pareto as _pareto
from lablib.exercises import Exercise, Wrong, expect, same_kind


def _parameters(blocks, heads, groups, head_dim, neurons, channels):
    attention = channels * head_dim * (2 * heads + 2 * groups)
    return blocks * (attention + 3 * channels * neurons + 2 * channels)


def _test_parameters(candidate) -> None:
    why = (
        "a block of 2 heads of 4, 1 group, 10 neurons and 6 channels: query and output 6 x 8 each, "
        "key and value 6 x 4 each, three times 6 x 10, two norms of 6: 336"
    )
    expect(candidate(1, 2, 1, 4, 10, 6), 336, why)
    sizes = [
        int(np.random.randint(*ends)) for ends in ((2, 9), (1, 5), (2, 20), (30, 90), (16, 64))
    ]
    blocks, groups, head_dim, neurons, channels = sizes
    heads = 3 * groups
    right = _parameters(blocks, heads, groups, head_dim, neurons, channels)
    attention = channels * head_dim * (2 * heads + 2 * groups)
    known = [
        (right // blocks, "all blocks"),
        (blocks * (attention + 3 * channels * neurons), "each block has two norms"),
        (blocks * (attention + 2 * channels * neurons + 2 * channels), "a SwiGLU layer has three "
         "matrices: gate, up and down"),
        (blocks * (channels * head_dim * 4 * heads + 3 * channels * neurons + 2 * channels),
         "keys and values have a head for each group, not for each query"),
    ]  # fmt: skip
    expect(candidate(blocks, heads, groups, head_dim, neurons, channels), right, why, known=known)


parameters = Exercise(
    reference=_parameters,
    test=_test_parameters,
    question="Half of the channels, or half of the neurons and heads: which leaves fewer?",
    hint="Seven matrices and two norms. Write each one's two sides down.",
    minutes=8,
    difficulty="easy",
)


def _front(points):
    return _pareto(points)


def _all_pairs(points):
    return sorted(
        (
            i
            for i, (x, y) in enumerate(points)
            if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        ),
        key=lambda i: points[i],
    )


def _test_front(candidate) -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.5, 2.5), (1.5, 3.5)]
    why = "(2.5, 2.5) is larger and worse than (2, 2); (1.5, 3.5) than (1, 3)"
    expect(candidate(list(points)), [1, 2, 0], why)
    drawn = np.random.default_rng(np.random.randint(1 << 30)).permutation(400).reshape(200, 2)
    points = [(float(x), float(y)) for x, y in drawn]
    right = _front(points)
    known = [
        (_all_pairs([(-x, -y) for x, y in points]), "that is the worst side: lower is better"),
        (sorted(right), "in order of their first coordinate, smallest first"),
        ([points[i] for i in right], "places, not points"),
        (right[::-1], "smallest first"),
    ]
    expect(candidate(list(points)), right, why, known=known)


front = Exercise(
    reference=_front,
    test=_test_front,
    question="How long does a comparison of each point with each other take for a million points?",
    hint="Sort by the first coordinate. Which of the others can still beat the next one?",
    minutes=12,
    difficulty="medium",
)


def _swap(neurons, step, choices, random):
    up, down = random.permutation(len(neurons))[:2]
    changed = list(neurons)
    to_up, to_down = neurons[up] + step, neurons[down] - step
    if to_up in choices and to_down in choices:
        changed[up], changed[down] = to_up, to_down
    return tuple(changed)


def _test_swap(candidate) -> None:
    choices = (88, 176, 264, 352)
    moved = 0
    for seed in range(40):
        random = np.random.default_rng([seed, np.random.randint(1 << 20)])
        given = tuple(int(n) for n in random.choice(choices, 6))
        found = candidate(given, 88, choices, random)
        same_kind(found, given)
        if not all(isinstance(n, (int, np.integer)) for n in found):
            raise Wrong(f"{found} are no whole numbers of neurons")
        if len(found) != len(given) or sum(found) != sum(given):
            raise Wrong("the sum of neurons is the budget: what one block gets another one gives")
        if not {*found} <= {*choices}:
            raise Wrong(f"{found} has a number that is not among the choices: leave it then")
        off = [abs(a - b) for a, b in zip(found, given, strict=True)]
        if sorted(off)[-2:] not in ([0, 0], [88, 88]) or sum(off) > 2 * 88:
            raise Wrong("one block gets one step more, one other block one step less")
        moved += found != given
    if moved < 10:
        raise Wrong("it hardly ever changes anything: draw two different blocks")


swap = Exercise(
    reference=_swap,
    test=_test_swap,
    question="From one configuration, can swaps reach every other one of the same budget?",
    hint="Two different blocks, drawn with random.permutation; check both new values.",
    minutes=12,
    difficulty="medium",
)
