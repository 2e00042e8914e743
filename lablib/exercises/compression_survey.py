"""Exercises of lab 808."""

import numpy as np
import torch
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


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
