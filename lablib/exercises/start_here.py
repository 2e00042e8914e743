"""Exercises of lab 00."""

import numpy as np

from lablib.exercises import Exercise
from lablib.language_models.bigram import bits as _bits


def _perplexity(bits: float) -> float:
    return 2.0**bits


def _test_perplexity(candidate) -> None:
    assert abs(candidate(0.0) - 1) < 1e-9, (
        f"at 0 bits nothing is uncertain, so the perplexity is 1; yours is {candidate(0.0)}"
    )
    choices = int(np.random.default_rng().integers(3, 50))
    found = candidate(float(np.log2(choices)))
    assert abs(found - choices) < 1e-6, (
        f"{choices} equally likely characters cost log2({choices}) = {np.log2(choices):.3f} bits, "
        f"and their perplexity is {choices}; yours is {found:.3f}"
    )


def _test_bits(candidate) -> None:
    random = np.random.default_rng()
    table = random.integers(0, 20, size=(4, 4))
    model = random.dirichlet(np.ones(4), size=4)
    found, expected = candidate(table, model), _bits(table, model)
    nats = expected * np.log(2)
    assert abs(found - nats) > 1e-6, "that is in nats: bits take the logarithm to base 2"
    assert abs(found + expected) > 1e-6, "a cost is positive: the logarithm of a probability is not"
    assert abs(found / max(table.sum(), 1) - expected) > 1e-6, (
        "that is the total: divide by the number of pairs for bits a character"
    )
    assert abs(found - expected) < 1e-6, (
        f"expected {expected:.4f} bits, yours gives {found:.4f}: each pair's -log2 probability "
        "counts as often as the pair occurs, so weigh by table / table.sum()"
    )


perplexity = Exercise(reference=_perplexity, test=_test_perplexity)
bits = Exercise(reference=_bits, test=_test_bits)
