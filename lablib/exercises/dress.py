"""Exercises of lab 803."""

import math

import numpy as np
import torch

from lablib.exercises import Exercise, Wrong, expect


def _leak(down, hidden, goes):
    parts = [(hidden[:, part] @ down[:, part].t()).square().sum() for part in (goes, ~goes)]
    return (parts[0] / (parts[0] + parts[1])).sqrt()


def _test_leak(candidate) -> None:
    down = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    hidden = torch.tensor([[3.0, 2.0, 0.0]])
    goes = torch.tensor([True, False, False])
    why = "neuron 0 adds (3, 0), neuron 1 adds (4, 0): sqrt(9 / (9 + 16)) is 0.6"
    expect(candidate(down, hidden, goes), torch.tensor(0.6), why)
    for _ in range(2):  # a rounded answer passes one draw by chance
        down, hidden = torch.randn(4, 9), torch.randn(20, 9)
        goes = torch.arange(9) < 3
        right = _leak(down, hidden, goes)
        squares = [(hidden[:, part] @ down[:, part].t()).square().sum() for part in (goes, ~goes)]
        whole = (hidden @ down.t()).square().sum()
        alone = [
            (hidden[:, p].square().sum(0) * down[:, p].square().sum(0)).sum() for p in (goes, ~goes)
        ]
        known = [
            (right.square(), "take the root: a norm, not a square"),
            ((squares[0] / squares[1]).sqrt(), "divide by both parts: at 1 all of it goes"),
            ((squares[0] / whole).sqrt(), "the parts may cancel: their squares are added, so that "
             "the leak is at most 1"),
            (_leak(down, hidden, ~goes), "that is what stays"),
            ((alone[0] / (alone[0] + alone[1])).sqrt(), "neurons act together: add up first, then "
             "square"),
        ]  # fmt: skip
        expect(candidate(down, hidden, goes), right, why, known=known, atol=1e-5)


leak = Exercise(
    reference=_leak,
    test=_test_leak,
    question="All neurons that go put out exactly the negative of what the others do. What is the "
    "leak, and what the layer's output?",
    hint="Columns of `down` belong to neurons. What do those that go put out alone?",
    minutes=10,
    difficulty="easy",
)


def _head_penalty(query, key, value, output, group, share, head_dim):
    q = slice(group * share * head_dim, (group + 1) * share * head_dim)
    k = slice(group * head_dim, (group + 1) * head_dim)
    return sum(part.square().sum() for part in (query[q], key[k], value[k], output[:, q]))


def _test_head_penalty(candidate) -> None:
    share, head_dim, groups, dim = 2, 2, 3, 5
    heads = groups * share
    sizes = [(heads * head_dim, dim), (groups * head_dim, dim), (groups * head_dim, dim),
             (dim, heads * head_dim)]  # fmt: skip
    why = (
        "query heads 2g and 2g + 1 go with group g: their rows of query, their columns of output, "
        "and the group's rows of key and value"
    )
    ones = [torch.ones(size) for size in sizes]
    expect(candidate(*ones, 1, share, head_dim), torch.tensor(60.0), why)
    for _ in range(3):  # a rounded answer passes one draw by chance
        given = [torch.randn(size) for size in sizes]
        group = int(np.random.randint(1, groups))
        q, k, v, o = given
        right = _head_penalty(*given, group, share, head_dim)
        one = slice(group * head_dim, (group + 1) * head_dim)
        wide = slice(group * share * head_dim, (group + 1) * share * head_dim)
        known = [
            (sum(p.square().sum() for p in (q[one], k[one], v[one], o[:, one])),
             "a group has several query heads, and all go"),
            (sum(p.square().sum() for p in (q[wide], k[one], v[one], o[wide])),
             "output reads heads: they are its columns"),
            (sum(p.square().sum() for p in (q[wide], k[one], v[one])),
             "and what output reads there goes, too"),
            (sum(p.square().sum() for p in (q[wide], o[:, wide])),
             "without queries nobody asks for the group's keys and values"),
            (right.sqrt(), "the squared norm, not the norm"),
        ]  # fmt: skip
        expect(candidate(*given, group, share, head_dim), right, why, known=known, atol=1e-4)


head_penalty = Exercise(
    reference=_head_penalty,
    test=_test_head_penalty,
    question="One query head of a group goes and the other stays. Which rows of key go?",
    hint="Four matrices. In which do a head's places lie along rows, in which along columns?",
    minutes=12,
    difficulty="medium",
)


def _steps_to_empty(weight, amount, norm):
    if norm == 1:
        return math.ceil(abs(weight) / amount)
    return math.inf


def _test_steps_to_empty(candidate) -> None:
    why = (
        "|w| pulls by the same amount at every step: 0.05 at 0.02 a step is gone after 3. w^2 "
        "pulls in proportion to what is left, and something always is"
    )
    expect(candidate(0.05, 0.02, 1), 3, why)
    expect(candidate(0.05, 0.02, 2), math.inf, why)
    whole = int(np.random.randint(4, 40))
    weight, amount = -(whole - 0.3) * 0.01, 0.01
    known = [
        (whole - 1, "after that many steps a little is left: round up"),
        (round(abs(weight) / amount) + 1, "at the last step it stops at zero"),
        (math.ceil(weight / amount), "a negative weight is pulled upwards, just as far"),
    ]
    expect(candidate(weight, amount, 1), whole, why, known=known)
    expect(candidate(weight, amount, 2), math.inf, why)


steps_to_empty = Exercise(
    reference=_steps_to_empty,
    test=_test_steps_to_empty,
    question="After how many steps has a squared penalty of 2 % a step taken 99 % of a weight?",
    hint="Pull by a fixed amount, stop at zero; pull by a share, and what is left?",
    minutes=6,
    difficulty="easy",
)


def _smallest_weight(leak_of, weights):
    low, high = 0, len(weights) - 1  # the answer lies between
    while low < high:
        middle = (low + high) // 2
        if leak_of(weights[middle]) < 0.01:
            high = middle
        else:
            low = middle + 1
    return weights[low]


def _test_smallest_weight(candidate) -> None:
    """Leaks that fall with the weight, as a training would find them; each call counts."""
    for _ in range(4):
        n = int(np.random.randint(20, 60))
        weights = [round(10 ** (-5 + 4 * place / n), 7) for place in range(n)]
        place = int(np.random.randint(2, n - 2))  # the first with a leak below 1 %
        leaks = np.sort(np.random.uniform(0.011, 0.5, place))[::-1].tolist()
        leaks += np.sort(np.random.uniform(0.0, 0.0099, n - place))[::-1].tolist()
        asked = []

        def leak_of(weight, weights=weights, leaks=leaks, asked=asked):
            asked.append(weight)
            if weight not in weights:
                raise Wrong(f"{weight} is none of `weights`")
            return leaks[weights.index(weight)]

        found = candidate(leak_of, weights)
        known = [
            (weights[place - 1], "that one still leaks 1 % or more"),
            (weights[-1], "a smaller weight is enough, and leaves the text more"),
            (weights[0], "the leak is a share: 1 % is 0.01"),
        ]
        expect(found, weights[place], "the first of them with a leak below 0.01", known=known)
        most = math.ceil(math.log2(n)) + 1
        if len(asked) > most:
            raise Wrong(
                f"{len(asked)} trainings for {n} weights; {most} are enough: a larger weight never "
                "leaks more, so look in the middle"
            )


smallest_weight = Exercise(
    reference=_smallest_weight,
    test=_test_smallest_weight,
    question="Leaks of real trainings rise and fall by luck. What does your search do then?",
    hint="Is the one in the middle enough? Then the answer is there or before it; else after it.",
    minutes=12,
    difficulty="medium",
)
