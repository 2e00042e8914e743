import numpy as np
import pytest
import torch

from lablib.theory import walks
from lablib.theory.convergence import stationary_distribution
from lablib.theory.markov_chains import state, transition_matrix


def test_a_walk_visits_states_as_often_as_the_stationary_distribution_says(random_logits):
    logits = random_logits(2, 3)
    matrix = transition_matrix(logits, 3)
    path = walks.sample_path(logits, 3, start=0, steps=40_000, seed=1)
    assert (np.asarray(matrix[path[:-1], path[1:]]) > 0).all(), "every step is a possible one"
    seen = np.bincount(path[100:], minlength=matrix.shape[0]) / len(path[100:])
    assert np.abs(seen - stationary_distribution(matrix)).sum() / 2 < 0.02


def test_walkers_with_the_same_dice_stay_together_once_they_meet(random_logits):
    logits = random_logits(3, 2)
    for seed in range(20):
        first, second = (
            walks.sample_path(logits, 2, start, steps=60, seed=seed) for start in (3, 11)
        )
        met = walks.meeting_step(first, second)
        assert 0 < met < 60
        assert (first[met:] == second[met:]).all() and (first[:met] != second[:met]).all()
    assert walks.meeting_step(np.array([0, 1]), np.array([1, 0])) is None


def logits_as_model(logits, vocabulary):
    """A model of the given table, whatever the window's length."""

    def model(tokens):
        rows = [state(row, vocabulary) for row in tokens.tolist()]
        return torch.from_numpy(logits[rows])[:, None]

    return model


def test_what_the_model_writes_is_distributed_as_the_matrix_says(random_logits):
    logits = random_logits(2, 3)
    texts = walks.generate_windowed(logits_as_model(logits, 2), 3, 2, walkers=200, steps=220)
    assert texts.shape == (200, 220)
    found = walks.state_frequencies(texts[:, 20:], 3, 2)
    expected = stationary_distribution(transition_matrix(logits, 3))[-8:]
    assert np.abs(found - expected).max() < 0.015


def test_walks_of_nothing_are_refused(random_logits):
    broken = np.full((6, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN or infinite"):
        walks.sample_path(broken, 2, start=0, steps=5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        walks.generate_windowed(logits_as_model(broken, 2), 2, 2, walkers=2, steps=3)
    with pytest.raises(ValueError, match="start 6 is no state: there are 6"):
        walks.sample_path(random_logits(2, 2), 2, start=6, steps=5)
