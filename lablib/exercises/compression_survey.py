"""Exercises of lab 808."""

import numpy as np
import torch
from torch.nn import functional as F

from lablib.exercises import Exercise, Wrong, expect


def _recipe_bytes(shape, keep, bits, group):
    out, size = shape
    codes = out * round(keep * size) * bits
    return (codes + out * size + 16 * out * -(-size // group)) / 8


def _test_recipe_bytes(candidate) -> None:
    why = (
        "2 rows of 64, half kept, 4 bits, groups of 32: 2 x 32 codes are 32 bytes, 128 bits of "
        "places 16 bytes, 2 x 2 scales 8 bytes"
    )
    expect(candidate((2, 64), 0.5, 4, 32), 56.0, why)
    shape = tuple(2 * int(n) + 1 for n in np.random.randint(20, 100, 2))
    kept, bits, group = 2 * int(np.random.randint(3, 9)), int(np.random.randint(2, 9)), 32
    keep = kept / shape[1]  # an odd number of bits in all: never whole bytes
    (out, size), right = shape, _recipe_bytes(shape, keep, bits, group)
    codes, places = out * round(keep * size) * bits, out * size
    scales = 16 * out * -(-size // group)
    known = [
        ((codes + scales) / 8, "which weights were kept? A bit for each weight tells"),
        ((codes + places) / 8, "each group has a scale of 16 bits"),
        (codes + places + scales, "that is bits"),
        ((out * size * bits + places + scales) / 8, "only the kept ones have codes"),
        ((codes + 16 * out * round(keep * size) + scales) / 8, "16 bits for each kept one's place "
         "is one way; a bit for each weight, kept or not, is what is asked"),
    ]  # fmt: skip
    expect(candidate(shape, keep, bits, group), right, why, known=known)


recipe_bytes = Exercise(
    reference=_recipe_bytes,
    test=_test_recipe_bytes,
    question="From which share of kept weights on is a bit for each weight cheaper than 16 bits "
    "for each kept one's place?",
    hint="Three things are stored: codes of what stays, a bit for each weight, scales.",
    minutes=8,
    difficulty="easy",
)


def _distillation(student, teacher, temperature):
    found, target = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return temperature**2 * (target.exp() * (target - found)).sum(-1).mean()


def _test_distillation(candidate) -> None:
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[np.log(3.0), 0.0]], dtype=torch.float32)
    why = "the teacher says 3/4 and 1/4, the student 1/2 twice: 3/4 ln 3/2 + 1/4 ln 1/2 is 0.131"
    expect(candidate(student, teacher, 1.0), torch.tensor(0.130812), why, atol=1e-5)
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    temperature = 2.0 + float(np.random.rand())
    right = _distillation(student, teacher, temperature)
    soft = [F.log_softmax(logits / temperature, -1) for logits in (student, teacher)]
    known = [
        (right / temperature**2, "softer distributions have smaller gradients: multiply by T^2"),
        (_distillation(teacher, student, temperature), "KL(teacher || student), not the other way"),
        (_distillation(student, teacher, 1.0), "divide both logits by T"),
        (temperature**2 * (soft[1].exp() * (soft[1] - soft[0])).mean(), "sum over tokens to come, "
         "then take the mean over rows"),
        (temperature**2 * -(soft[1].exp() * soft[0]).sum(-1).mean(), "that is the cross-entropy: "
         "take the teacher's own entropy off"),
    ]  # fmt: skip
    expect(candidate(student, teacher, temperature), right, why, known=known, atol=1e-5)


distillation = Exercise(
    reference=_distillation,
    test=_test_distillation,
    question="At a very high temperature, what does the student learn to copy: probabilities, or "
    "differences of logits?",
    hint="log_softmax of both, divided by T; then sum p_teacher (log p_teacher - log p_student).",
    minutes=10,
    difficulty="medium",
)


def _sweep(loss_of, temperatures, seeds):
    means = {t: sum(loss_of(t, seed) for seed in seeds) / len(seeds) for t in temperatures}
    return min(means, key=means.get), means


def _test_sweep(candidate) -> None:
    """Losses whose luckiest run, first seed and order say something else than their means."""
    losses = {1.0: [0.9, 1.1, 1.0], 2.0: [0.8, 0.8, 0.8], 4.0: [0.5, 1.2, 1.3]}
    why = "means are 1.0, 0.8 and 1.0: the second; the third has one lucky run"
    _expect_sweep(candidate, losses, why)
    for _ in range(2):
        level, temperatures = float(np.random.rand()), [float(t) for t in (0.5, 1, 2, 4, 8)]
        order = [int(place) for place in np.random.permutation(5)]
        spread = np.array([-0.4, 0.1, 0.3])
        drawn = {t: level + 0.1 * place + 0.01 * spread for t, place in zip(temperatures, order)}
        lucky = temperatures[order.index(4)]  # far behind on average, ahead in its first run
        drawn[lucky] = level + np.array([-1.0, 2.0, 2.0])
        _expect_sweep(candidate, drawn, "the lowest mean over all seeds")


def _expect_sweep(candidate, losses, why) -> None:
    asked = []

    def loss_of(temperature, seed):
        asked.append((temperature, seed))
        return float(losses[temperature][seed])

    found = candidate(loss_of, list(losses), [0, 1, 2])
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise Wrong(f"return the temperature and the means, (best, {{temperature: mean}}): {found}")
    best, means = _sweep(lambda t, seed: float(losses[t][seed]), losses, [0, 1, 2])
    if missing := {(t, seed) for t in losses for seed in range(3)} - set(asked):
        raise Wrong(f"as many tries each: {len(missing)} of {3 * len(losses)} runs were not made")
    if len(asked) > 3 * len(losses):
        raise Wrong(f"{len(asked)} runs, and {3 * len(losses)} are enough: each is a training")
    for temperature in losses:
        told = f"the mean at temperature {temperature:g}"
        expect(found[1].get(temperature, float("nan")), means[temperature], told)
    luckiest = min(losses, key=lambda t: min(losses[t]))
    known = [
        (luckiest, "that one has the luckiest run: compare means"),
        (max(means, key=means.get), "lower is better"),
    ]
    expect(found[0], best, why, known=known)


sweep = Exercise(
    reference=_sweep,
    test=_test_sweep,
    question="You report the best temperature's mean on the seeds that chose it. Is it too good?",
    hint="A dictionary of means first, one for each temperature; then the key of the smallest.",
    minutes=8,
    difficulty="easy",
)


def _round_inputs(x, bits):
    most = 2 ** (bits - 1) - 1
    step = x.abs().amax(-1, keepdim=True) / most
    return (x / step).round() * step


def _test_round_inputs(candidate) -> None:
    x = torch.tensor([[4.0, -1.0, 0.5], [0.1, 0.2, -0.6]])
    why = "3 bits: 3 levels on each side; a step is 4/3 in the first token and 0.2 in the second"
    right = torch.tensor([[4.0, -4 / 3, 0.0], [0.0, 0.2, -0.6]])
    expect(candidate(x, 3), right, why, atol=1e-5)
    for _ in range(2):
        bits = int(np.random.randint(3, 6))
        x = torch.randn(2, 5, 16) * (1 + 5 * torch.rand(2, 5, 1))
        most = 2 ** (bits - 1) - 1
        one = x.abs().max() / most
        step = x.abs().amax(-1, keepdim=True) / most
        column = x.abs().amax((0, 1)) / most
        known = [
            ((x / one).round() * one, "each token has a step of its own"),
            ((x / column).round() * column, "a step for each token, not for each feature"),
            ((x / step).round(), "those are codes: multiply by the step again"),
            ((x / step).trunc() * step, "to the nearest level, not towards zero"),
            ((x / (step * most / 2**bits)).round() * (step * most / 2**bits),
             "2^(bits - 1) - 1 levels on each side, since signs take a bit"),
        ]  # fmt: skip
        expect(candidate(x, bits), _round_inputs(x, bits), why, known=known, atol=1e-5)


round_inputs = Exercise(
    reference=_round_inputs,
    test=_test_round_inputs,
    question="One feature of a token is a hundred times as large as all others. What is left of "
    "these?",
    hint="The largest of a token's absolute values is the last level, number 2^(bits - 1) - 1.",
    minutes=10,
    difficulty="medium",
)
