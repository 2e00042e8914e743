import numpy as np
import pytest

from lablib.exercises import start_here
from lablib.language_models import bigram


def test_a_bigram_model_by_hand():
    table = bigram.counts(["Abab!"])
    a, b, mark = (bigram.ALPHABET.index(c) for c in "ab!")
    assert (table[a, b], table[b, a], table[b, mark], table.sum()) == (2, 1, 1, 4)
    model = bigram.probabilities(table, alpha=1.0)
    assert model[a, b] == pytest.approx(3 / (2 + len(bigram.ALPHABET)))
    assert np.allclose(model.sum(1), 1) and np.allclose(bigram.unigram(table).sum(1), 1)
    uniform = np.full_like(model, 1 / len(model))
    assert bigram.bits(table, uniform) == pytest.approx(np.log2(len(model)))
    with pytest.raises(ValueError, match="alpha must be above 0"):
        bigram.probabilities(table, 0)


def test_samples_follow_the_table():
    table = bigram.counts(["abab" * 50])
    text = bigram.sample(bigram.probabilities(table, 1e-9), 20, seed=0, start="a")
    assert text == "ba" * 10


WRONG = {
    "perplexity": [lambda bits: np.exp(bits), lambda bits: bits, lambda bits: 2.0**-bits],
    "bits": [
        lambda table, model: -(table * np.log(model)).sum() / table.sum(),
        lambda table, model: -(table * np.log2(model)).sum(),
        lambda table, model: (table * np.log2(model)).sum() / table.sum(),
        lambda table, model: -np.log2(model).mean(),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(start_here, name), WRONG[name])
