"""Exercises of lab 201."""

import numpy as np

from lablib.exercises import Exercise
from lablib.theory import markov_chains as mc


def _n_states(vocabulary: int, context: int) -> int:
    return sum(vocabulary**length for length in range(1, context + 1))


def _test_n_states(candidate) -> None:
    random = np.random.default_rng()
    vocabulary, context = (int(value) for value in random.integers(2, 7, size=2))
    found, expected = candidate(vocabulary, context), _n_states(vocabulary, context)
    assert found != vocabulary**context, (
        f"{found} counts full contexts alone; prompts shorter than K = {context} are states, too"
    )
    assert found != expected + 1, "the empty sequence is no state: a model needs one token at least"
    assert found == expected, f"T = {vocabulary}, K = {context}: expected {expected}, not {found}"


def _stationary(matrix: np.ndarray) -> np.ndarray:
    share = np.full(len(matrix), 1 / len(matrix))
    for _ in range(2000):
        share = share @ matrix
    return share


def _test_stationary(candidate) -> None:
    matrix = np.random.default_rng().dirichlet(np.ones(4), size=4)
    found = np.asarray(candidate(matrix.copy()), float)
    assert found.shape == (4,), f"one share a state: shape (4,), yours is {found.shape}"
    assert abs(found.sum() - 1) < 1e-6, f"shares sum to 1; yours sum to {found.sum():.3f}"
    after = found @ matrix
    assert np.abs(after - found).max() < 1e-6, (
        f"one step changes yours from {found.round(3)} to {after.round(3)}; the stationary one "
        "stays. Rows are where you come from, so a step is share @ matrix"
    )


def _predict_next(prompt: np.ndarray, size: int) -> np.ndarray:
    return mc.frequency_predictions(np.asarray(prompt)[None], size)[0, -1]


def _test_predict_next(candidate) -> None:
    fresh = np.asarray(candidate(np.array([0, 1]), 3), float)
    assert np.allclose(fresh, 1 / 3), (
        f"nothing has followed 1 yet, so add-one smoothing says 1/3 each; yours says {fresh}"
    )
    prompt = np.random.default_rng().integers(0, 3, size=40)
    found, expected = np.asarray(candidate(prompt, 3), float), _predict_next(prompt, 3)
    assert abs(found.sum() - 1) < 1e-9, f"probabilities sum to 1; yours sum to {found.sum():.3f}"
    assert np.allclose(found, expected), (
        f"after {prompt[-1]}: expected {expected.round(3)}, yours gives {found.round(3)}; count "
        "only what followed earlier occurrences of the last symbol, then add one to each count"
    )


n_states = Exercise(reference=_n_states, test=_test_n_states)
stationary = Exercise(reference=_stationary, test=_test_stationary)
predict_next = Exercise(reference=_predict_next, test=_test_predict_next)
