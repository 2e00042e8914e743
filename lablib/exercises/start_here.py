"""Exercises of lab 00."""

import numpy as np

from lablib.exercises import Exercise, expect
from lablib.language_models.bigram import bits as _bits


def _perplexity(bits: float) -> float:
    return 2.0**bits


def _test_perplexity(candidate) -> None:
    random = np.random.default_rng()
    expect(candidate(0.0), 1.0, "At 0 bits nothing is uncertain: there is one choice")
    choices = int(random.integers(3, 50))
    bits = float(np.log2(choices))
    expect(
        candidate(bits),
        float(choices),
        f"{choices} equally likely characters cost log2({choices}) = {bits:.3f} bits",
        known=[(np.exp(bits), "bits are logarithms to base 2, yours raises e")],
    )
    bits = float(random.uniform(1.1, 4.9))
    expect(
        candidate(bits), 2.0**bits, f"That is for {bits:.3f} bits; a perplexity need not be whole"
    )


perplexity = Exercise(
    reference=_perplexity,
    test=_test_perplexity,
    question="A model saves one more bit a character: what happens to its perplexity?",
    hint="n equally likely choices cost log2(n) bits. Turn that around.",
    minutes=2,
    difficulty="easy",
)


def _test_bits(candidate) -> None:
    random = np.random.default_rng()
    table = random.integers(0, 20, size=(4, 4))
    model = random.dirichlet(np.ones(4), size=4)
    wanted = float(_bits(table, model))
    expect(
        candidate(table, model),
        wanted,
        "Each pair's -log2 probability counts as often as the pair occurs: weigh by its share of "
        "table.sum()",
        known=[
            (wanted * np.log(2), "that is in nats: bits take the logarithm to base 2"),
            (-wanted, "a cost is positive: the logarithm of a probability is not"),
            (wanted * table.sum(), "that is the total: divide by the number of pairs"),
        ],
    )


bits = Exercise(
    reference=_bits,
    test=_test_bits,
    question="Which model pays the fewest bits on a given table, and what is that number called?",
    hint="The mean over all pairs of the text: the sum of table * -log2(model), by how many pairs?",
    minutes=5,
    difficulty="medium",
)
