import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from lablib.data import MarkovSource
from lablib.exercises import markov_chains as exercises
from lablib.theory import markov_chains as mc


def random_logits(vocabulary, context, seed=0, scale=1.0):
    shape = mc.n_states(vocabulary, context), vocabulary
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


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


@pytest.mark.parametrize(("vocabulary", "context"), [(2, 1), (2, 3), (3, 2), (4, 3)])
def test_transitions_equal_brute_force(vocabulary, context):
    logits = random_logits(vocabulary, context)
    dense = mc.transition_matrix(logits, context, temperature=0.7).toarray()
    expected = np.zeros_like(dense)
    for number, row in enumerate(logits.astype(float)):
        tokens = mc.sequence(number, vocabulary)
        weights = np.exp(row / 0.7)
        for token in range(vocabulary):
            after = (*tokens, token)[-context:]
            expected[number, mc.state(after, vocabulary)] += weights[token] / weights.sum()
    assert np.abs(dense - expected).max() < 1e-6
    assert np.allclose(dense.sum(1), 1, atol=1e-12)


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


def test_wrong_sizes_and_temperatures_are_refused():
    with pytest.raises(ValueError, match="6 rows of logits, but T = 2 and K = 3 make 14 states"):
        mc.transition_matrix(random_logits(2, 2), 3)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        mc.transition_matrix(random_logits(2, 2), 2, temperature=0)


def reachable(dense):
    reach = (dense > 0) | np.eye(len(dense), dtype=bool)
    for middle in range(len(dense)):
        reach |= np.outer(reach[:, middle], reach[middle])
    return reach


@pytest.mark.parametrize(("vocabulary", "context"), [(2, 3), (3, 2)])
def test_classes_equal_brute_force(vocabulary, context):
    matrix = mc.transition_matrix(random_logits(vocabulary, context), context)
    found = mc.classes(matrix)
    reach = reachable(matrix.toarray())
    same = found.label[:, None] == found.label[None]
    assert np.array_equal(same, reach & reach.T)
    closed = [not (reach[i] & ~reach[:, i]).any() for i in range(len(reach))]
    assert np.array_equal(found.recurrent[found.label], closed)
    full = np.arange(mc.n_states(vocabulary, context - 1), matrix.shape[0])
    assert np.array_equal(found.recurrent_states, full), "exactly the full contexts recur"


def test_two_recurrent_classes_have_no_unique_distribution():
    with pytest.raises(ValueError, match="2 recurrent classes"):
        mc.stationary_distribution(sparse.csr_matrix(np.eye(2)))


@pytest.mark.parametrize(("vocabulary", "context"), [(2, 4), (3, 3), (4, 5)])
def test_stationary_distribution_against_quantecon(vocabulary, context):
    quantecon = pytest.importorskip("quantecon", reason="the test extra is not installed")
    matrix = mc.transition_matrix(random_logits(vocabulary, context), context)
    ours = mc.stationary_distribution(matrix)
    states = mc.classes(matrix).recurrent_states
    theirs = quantecon.MarkovChain(matrix[states][:, states]).stationary_distributions[0]
    assert np.abs(ours[states] - theirs).max() < 1e-9
    assert np.abs(matrix.T @ ours - ours).max() < 1e-12
    assert ours[: states[0]].max(initial=0) == 0


def test_elimination_and_iteration_agree():
    matrix = mc.transition_matrix(random_logits(3, 3), 3)
    states = mc.classes(matrix).recurrent_states
    inner = matrix[states][:, states]
    direct = mc._eliminate(inner.toarray())
    assert np.abs(direct - mc._iterate(inner, 1e-13, 100_000)).max() < 1e-10
    with pytest.raises(ValueError, match="did not settle in 3 steps"):
        mc._iterate(inner, 1e-13, 3)


def test_distances_fall_below_the_papers_bound_and_below_doeblins():
    logits = random_logits(2, 3, scale=0.5)
    matrix = mc.transition_matrix(logits, 3)
    stationary = mc.stationary_distribution(matrix)
    steps = np.arange(61)
    epsilon = mc.smallest_k_step_probability(logits, 3)
    for start in mc.classes(matrix).recurrent_states:
        distance = mc.total_variation(matrix, stationary, int(start), 60)
        paper, doeblin = mc.convergence_bound(epsilon, 3, steps), mc.doeblin_bound(matrix, 3, steps)
        assert (distance <= doeblin + 1e-12).all()
        assert (distance <= paper + 1e-12).all()
        assert (doeblin[3:] <= paper[3:]).all()
    assert distance[0] > 0.5 > 1e-6 > distance[-1]


@pytest.mark.parametrize("epsilon", [0.001, 0.03, 0.2, 0.5])
def test_the_bound_first_holds_after_the_steps_that_are_said(epsilon):
    needed = int(mc.steps_until_bound(epsilon, 3, 0.25))
    bound = mc.convergence_bound(epsilon, 3, np.array([needed - 1, needed]))
    assert bound[1] <= 0.25 < bound[0]
    assert mc.steps_until_bound(0.0, 3, 0.25) == np.inf


def test_epsilon_is_the_smallest_entry_of_the_kth_power():
    logits = random_logits(3, 3)
    matrix = mc.transition_matrix(logits, 3)
    states = mc.classes(matrix).recurrent_states
    power = np.linalg.matrix_power(matrix.toarray(), 3)[np.ix_(states, states)]
    assert mc.smallest_k_step_probability(logits, 3) == pytest.approx(power.min(), rel=1e-5)


def test_a_walk_visits_states_as_often_as_the_stationary_distribution_says():
    logits = random_logits(2, 3)
    matrix = mc.transition_matrix(logits, 3)
    path = mc.sample_path(logits, 3, start=0, steps=40_000, seed=1)
    assert (np.asarray(matrix[path[:-1], path[1:]]) > 0).all(), "every step is a possible one"
    seen = np.bincount(path[100:], minlength=matrix.shape[0]) / len(path[100:])
    assert np.abs(seen - mc.stationary_distribution(matrix)).sum() / 2 < 0.02


def test_frequencies_learn_the_chain_at_the_rate_of_one_over_root_n():
    source = MarkovSource(4, seed=3)
    prompts = np.stack([source.sample(2048, seed=seed) for seed in range(40)])
    predictions = mc.frequency_predictions(prompts, 4)
    assert np.allclose(predictions.sum(-1), 1)
    risk = mc.in_context_risk(predictions, prompts, source.transition)
    law = mc.fit_power_law(*mc.octaves(risk, first=64))
    assert law.exponent == pytest.approx(-0.5, abs=0.06)
    perfect = source.transition[prompts]
    assert mc.in_context_risk(perfect, prompts, source.transition).max() < 1e-12


def test_frequency_predictions_by_hand():
    found = mc.frequency_predictions(np.array([[0, 1, 0, 0]]), 2)
    assert np.allclose(found[0], [[1 / 2, 1 / 2], [1 / 2, 1 / 2], [1 / 3, 2 / 3], [1 / 2, 1 / 2]])


def test_symbol_shares_by_hand():
    found = mc.symbol_share_predictions(np.array([[0, 1, 0]]), 2)
    assert np.allclose(found[0], [[2 / 3, 1 / 3], [1 / 2, 1 / 2], [3 / 5, 2 / 5]])


def test_in_context_predictions_are_the_softmax_over_the_symbols():
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    prompts = np.array([[0, 1, 1], [1, 0, 0]])
    found = mc.in_context_predictions(lambda tokens: table[tokens], [8, 3], prompts)
    expected = table[[8, 3]][:, [8, 3]].softmax(-1).numpy()[prompts]
    assert np.allclose(found, expected)


def test_a_separator_is_read_before_each_prediction():
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))

    def model(tokens):  # two tokens back and the last one, so the separator matters
        before = torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
        return table[before] + 2 * table[tokens]

    prompts = np.array([[0, 1, 1]])
    found = mc.in_context_predictions(model, [8, 3], prompts, separator=5)
    expected = (table[[8, 3, 3]] + 2 * table[5])[:, [8, 3]].softmax(-1).numpy()
    assert np.allclose(found[0], expected)


def test_text_in_few_symbols():
    assert mc.symbolize("To be, 2 B\n", 2).tolist() == [1, 0, 1, 0, 1]
    assert mc.symbolize("A  b.", 4).tolist() == [0, 2, 1, 3]
    for size, groups in mc.ALPHABETS.items():
        assert len(groups) == size and len("".join(groups.values())) == len(
            set("".join(groups.values()))
        )
    with pytest.raises(ValueError, match="no alphabet has 5 symbols"):
        mc.symbolize("text", 5)


def logits_as_model(logits, vocabulary):
    """A model of the given table, whatever the window's length."""

    def model(tokens):
        rows = [mc.state(row, vocabulary) for row in tokens.tolist()]
        return torch.from_numpy(logits[rows])[:, None]

    return model


def test_what_the_model_writes_is_distributed_as_the_matrix_says():
    logits = random_logits(2, 3)
    texts = mc.generate_windowed(logits_as_model(logits, 2), 3, 2, walkers=200, steps=220)
    assert texts.shape == (200, 220)
    found = mc.state_frequencies(texts[:, 20:], 3, 2)
    expected = mc.stationary_distribution(mc.transition_matrix(logits, 3))[-8:]
    assert np.abs(found - expected).max() < 0.015


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0, 3.0])
def test_mixing_time_is_the_first_step_at_which_all_starts_are_near(temperature):
    matrix = mc.transition_matrix(random_logits(2, 3, seed=4), 3, temperature)
    stationary = mc.stationary_distribution(matrix)
    found = mc.mixing_time(matrix, stationary, threshold=0.1)
    starts = mc.classes(matrix).recurrent_states
    curves = [mc.total_variation(matrix, stationary, int(s), found) for s in starts]
    worst = np.max(curves, axis=0)
    assert np.allclose(mc.worst_distance(matrix, stationary, found), worst)
    assert worst[found] <= 0.1 < worst[found - 1]
    with pytest.raises(ValueError, match="don't mix this chain"):
        mc.mixing_time(matrix, stationary, threshold=1e-9, limit=2)


@given(st.floats(-2, -0.1), st.floats(0.1, 5))
def test_a_power_law_is_found_again(exponent, coefficient):
    n = np.array([1, 2, 5, 10, 100])
    law = mc.fit_power_law(n, coefficient * n**exponent)
    assert law.exponent == pytest.approx(exponent)
    assert law(n) == pytest.approx(coefficient * n**exponent)


def test_a_power_law_needs_positive_values():
    with pytest.raises(ValueError, match="positive values at two different lengths"):
        mc.fit_power_law(np.array([1, 2]), np.array([0.0, 1.0]))


def test_octaves_average_within_doublings():
    centers, means = mc.octaves(np.arange(1, 65), first=8)
    assert np.allclose(means, [11.5, 23.5, 47.5]) and (np.diff(centers) > 0).all()


def test_the_papers_37_448_states_take_under_ten_seconds():
    from lablib.models import GPT, GPTConfig

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=8, dim=32, n_layers=2, n_heads=2, max_length=8))
    start = time.process_time()  # of this process alone: other tests run beside it
    logits = mc.next_token_logits(model, 5, range(8))
    matrix = mc.transition_matrix(logits, 5)
    found = mc.classes(matrix)
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


WRONG = {
    "n_states": [
        lambda vocabulary, context: vocabulary**context,
        lambda vocabulary, context: mc.n_states(vocabulary, context) + 1,
        lambda vocabulary, context: vocabulary * context,
    ],
    "stationary": [
        lambda matrix: np.full(len(matrix), 1 / len(matrix)),
        lambda matrix: 2 * mc._eliminate(matrix.copy()),
        lambda matrix: matrix.mean(0),
        lambda matrix: mc._eliminate(matrix.copy())[:, None],
    ],
    "predict_next": [unsmoothed, smoothed_unigram, lambda prompt, size: np.ones(size) / size],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
