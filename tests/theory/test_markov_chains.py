import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lablib.exercises import markov_chains as exercises
from lablib.theory import markov_chains as mc
from lablib.theory.convergence import classes, eliminate


@given(st.integers(1, 5), st.integers(1, 4))
def test_states_are_numbered_once_each(vocabulary, context):
    every = [
        tokens
        for length in range(1, context + 1)
        for tokens in itertools.product(range(vocabulary), repeat=length)
    ]
    assert [mc.state(tokens, vocabulary) for tokens in every] == list(range(len(every)))
    assert [mc.sequence(number, vocabulary) for number in range(len(every))] == every
    assert mc.n_states(vocabulary, context) == len(every)


def test_the_papers_number_of_states():
    assert mc.n_states(8, 5) == 37_448 == 8 * (8**5 - 1) // 7
    assert mc.n_states(2, 3) == 14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mc.sequence(5, 0), "no state has number 5 among 0 tokens"),
        (lambda: mc.sequence(-1, 2), "no state has number -1"),
        (lambda: mc.state((), 2), "no sequence of tokens below 2"),
        (lambda: mc.state((0, 2), 2), "no sequence of tokens below 2"),
        (lambda: mc.n_states(0, 3), "1 token at least, not 0"),
    ],
)
def test_what_is_no_state_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def model_of(vocabulary, seed=0):
    """A model in which order and the whole window matter."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, vocabulary, generator=generator)

    def model(tokens):
        places = torch.arange(1, tokens.shape[1] + 1)[None, :, None]
        return (table[tokens] * places).cumsum(1)

    return model


@pytest.mark.parametrize(("vocabulary", "context"), [(2, 1), (2, 3), (3, 2), (4, 3)])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
def test_the_sparse_matrix_is_the_definitions(vocabulary, context, temperature):
    model = model_of(vocabulary)
    defined = mc.markov_chain(model, vocabulary, context, temperature)
    logits = mc.next_token_logits(model, context, range(vocabulary))
    fast = mc.transition_matrix(logits, context, temperature)
    assert np.abs(fast.toarray() - defined).max() < 1e-12
    assert np.allclose(defined.sum(1), 1, atol=1e-12)


def test_the_definition_by_hand():
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # after token 0, after token 1
    found = mc.markov_chain(lambda tokens: logits[tokens], 2, 1)
    up, down = 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))
    assert np.allclose(found, [[up, 1 - up], [1 - down, down]])


def test_logits_are_those_of_the_model_after_each_state():
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))

    def model(tokens):  # depends on the first and the last token, so order matters
        return table[tokens] + 10 * table[tokens[:, :1]]

    symbols = [7, 2, 9]
    logits = mc.next_token_logits(model, 3, symbols, batch_size=5)
    for number in range(mc.n_states(3, 3)):
        tokens = [symbols[token] for token in mc.sequence(number, 3)]
        expected = model(torch.tensor([tokens]))[0, -1, symbols]
        assert np.allclose(logits[number], expected)


def test_wrong_sizes_and_temperatures_are_refused(random_logits):
    with pytest.raises(ValueError, match="6 rows of logits, but T = 2 and K = 3 make 14 states"):
        mc.transition_matrix(random_logits(2, 2), 3)
    for temperature in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            mc.transition_matrix(random_logits(2, 2), 2, temperature=temperature)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(random_logits, bad):
    logits = random_logits(2, 2)
    logits[3, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        mc.transition_matrix(logits, 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        mc.probabilities(np.full(2, -np.inf))


def test_a_forbidden_token_has_no_probability():
    assert mc.probabilities(np.array([0.0, -np.inf])).tolist() == [1.0, 0.0]


def test_at_a_low_temperature_every_full_context_still_recurs(random_logits):
    found = classes(mc.transition_matrix(random_logits(2, 3, scale=4), 3, temperature=0.005))
    assert found.recurrent.sum() == 1 and len(found.recurrent_states) == 8


def test_the_papers_37_448_states_take_under_ten_seconds():
    from lablib.models import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=8, dim=32, n_layers=2, n_heads=2, max_length=8))
    start = time.process_time()  # of this process alone: other tests run beside it
    logits = mc.next_token_logits(model, 5, range(8))
    matrix = mc.transition_matrix(logits, 5)
    found = classes(matrix)
    assert time.process_time() - start < 10
    assert matrix.shape == (37_448, 37_448) and matrix.nnz == 8 * 37_448
    assert len(found.recurrent_states) == 8**5 and found.recurrent.sum() == 1


A_MILLION = """
from lablib.resources import peak_memory
from lablib.models import GPT, GPTConfig
from lablib.theory import markov_chains as mc
model = GPT(GPTConfig(vocab_size=10, dim=16, n_layers=1, n_heads=2, max_length=8))
matrix = mc.transition_matrix(mc.next_token_logits(model, 6, range(10)), 6)
assert matrix.shape[0] == 1_111_110
print(peak_memory() / 1e9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux gives it")
def test_a_million_states_fit_in_the_memory_of_a_small_machine():
    ran = subprocess.run([sys.executable, "-c", A_MILLION], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 1.2


def unsmoothed(prompt, size):
    after = [b for a, b in itertools.pairwise(prompt) if a == prompt[-1]]
    return np.bincount(after, minlength=size) / max(len(after), 1)


def smoothed_unigram(prompt, size):
    return (np.bincount(prompt, minlength=size) + 1) / (len(prompt) + size)


def changes_its_input(prompt, size):
    answer = exercises.predict_next.reference(prompt, size)
    prompt[-1] = 0
    prompt[0] = 1
    return answer


WRONG = {
    "n_states": [
        lambda vocabulary, context: vocabulary**context,
        lambda vocabulary, context: mc.n_states(vocabulary, context) + 1,
        lambda vocabulary, context: mc.n_states(vocabulary, context - 1),
        lambda vocabulary, context: vocabulary * context,
    ],
    "stationary": [
        lambda matrix: np.full(len(matrix), 1 / len(matrix)),
        lambda matrix: 2 * eliminate(matrix),
        lambda matrix: matrix.mean(0),
        lambda matrix: eliminate(matrix)[:, None],
        lambda matrix: eliminate(matrix).round(2),
        lambda matrix: np.full(len(matrix), 1 / len(matrix)) @ matrix @ matrix,
    ],
    "predict_next": [
        unsmoothed,
        smoothed_unigram,
        changes_its_input,
        lambda prompt, size: np.ones(size) / size,
        lambda prompt, size: exercises.predict_next.reference(prompt[:-1], size),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
