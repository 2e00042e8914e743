import numpy as np
import pytest

from lablib.theory.markov_chains import n_states


@pytest.fixture(scope="session")
def random_logits():
    """Tables of logits as an untrained model might give them."""

    def make(vocabulary, context, seed=0, scale=1.0):
        shape = n_states(vocabulary, context), vocabulary
        return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)

    return make
