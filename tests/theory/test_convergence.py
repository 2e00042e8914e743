import numpy as np
import pytest
from scipy import sparse

from lablib.theory import convergence
from lablib.theory.markov_chains import n_states, transition_matrix


def reachable(dense):
    reach = (dense > 0) | np.eye(len(dense), dtype=bool)
    for middle in range(len(dense)):
        reach |= np.outer(reach[:, middle], reach[middle])
    return reach


@pytest.mark.parametrize(("vocabulary", "context"), [(2, 3), (3, 2)])
def test_classes_equal_brute_force(random_logits, vocabulary, context):
    matrix = transition_matrix(random_logits(vocabulary, context), context)
    found = convergence.classes(matrix)
    reach = reachable(matrix.toarray())
    same = found.label[:, None] == found.label[None]
    assert np.array_equal(same, reach & reach.T)
    closed = [not (reach[i] & ~reach[:, i]).any() for i in range(len(reach))]
    assert np.array_equal(found.recurrent[found.label], closed)
    full = np.arange(n_states(vocabulary, context - 1), matrix.shape[0])
    assert np.array_equal(found.recurrent_states, full), "exactly the full contexts recur"


def test_two_recurrent_classes_have_no_unique_distribution():
    with pytest.raises(ValueError, match="2 recurrent classes"):
        convergence.stationary_distribution(sparse.csr_matrix(np.eye(2)))


@pytest.mark.parametrize(("vocabulary", "context"), [(2, 4), (3, 3), (4, 5)])
def test_stationary_distribution_against_quantecon(random_logits, vocabulary, context):
    quantecon = pytest.importorskip("quantecon", reason="the test extra is not installed")
    matrix = transition_matrix(random_logits(vocabulary, context), context)
    ours = convergence.stationary_distribution(matrix)
    states = convergence.classes(matrix).recurrent_states
    theirs = quantecon.MarkovChain(matrix[states][:, states]).stationary_distributions[0]
    assert np.abs(ours[states] - theirs).max() < 1e-9
    assert np.abs(matrix.T @ ours - ours).max() < 1e-12
    assert ours[: states[0]].max(initial=0) == 0


def test_elimination_and_iteration_agree(random_logits):
    matrix = transition_matrix(random_logits(3, 3), 3)
    states = convergence.classes(matrix).recurrent_states
    inner = matrix[states][:, states]
    direct = convergence.eliminate(inner.toarray())
    assert np.abs(direct - convergence.iterate(inner, 1e-13, 100_000)).max() < 1e-10
    with pytest.raises(ValueError, match="did not settle in 3 steps"):
        convergence.iterate(inner, 1e-13, 3)


def test_elimination_leaves_its_input_as_it_was():
    matrix = np.array([[0.5, 0.5], [0.2, 0.8]])
    assert np.allclose(convergence.eliminate(matrix), [2 / 7, 5 / 7])
    assert matrix[0, 1] == 0.5


def test_distances_are_those_of_the_matrix_powers(random_logits):
    matrix = transition_matrix(random_logits(2, 3), 3)
    stationary = convergence.stationary_distribution(matrix)
    found = convergence.worst_distance(matrix, stationary, 20)
    dense = matrix.toarray()[6:, 6:]
    for n, distance in enumerate(found):
        power = np.linalg.matrix_power(dense, n)
        assert distance == pytest.approx(np.abs(power - stationary[6:]).sum(1).max() / 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distances_fall_below_the_papers_bound_and_below_doeblins(random_logits, temperature):
    logits = random_logits(2, 3, scale=0.5)
    matrix = transition_matrix(logits, 3, temperature)
    steps = np.arange(61)
    epsilon = convergence.smallest_k_step_probability(logits, 3, temperature)
    stationary = convergence.stationary_distribution(matrix)
    distance = convergence.worst_distance(matrix, stationary, 60)
    paper = convergence.convergence_bound(epsilon, 3, steps)
    doeblin = convergence.doeblin_bound(matrix, 3, steps)
    assert (distance <= doeblin + 1e-12).all()
    assert (distance <= paper + 1e-12).all()
    assert (doeblin[3:] <= paper[3:]).all()


def test_the_bound_falls_as_fast_as_the_distance_where_it_is_tight():
    logits = np.array([[2.0, 0.0], [0.0, 2.0]])  # T = 2, K = 1: both leave with probability epsilon
    matrix = transition_matrix(logits, 1)
    epsilon = convergence.smallest_k_step_probability(logits, 1)
    distance = convergence.worst_distance(matrix, np.array([0.5, 0.5]), 30)
    bound = convergence.convergence_bound(epsilon, 1, np.arange(31))
    assert epsilon == pytest.approx(1 / (1 + np.exp(2)))
    assert np.allclose(distance[1:] / bound[1:], (1 - 2 * epsilon) / 2)


@pytest.mark.parametrize("epsilon", [0.001, 0.03, 0.2, 0.5])
def test_the_bound_first_holds_after_the_steps_that_are_said(epsilon):
    needed = int(convergence.steps_until_bound(epsilon, 3, 0.25))
    bound = convergence.convergence_bound(epsilon, 3, np.array([needed - 1, needed]))
    assert bound[1] <= 0.25 < bound[0]
    assert convergence.steps_until_bound(0.0, 3, 0.25) == np.inf


def test_epsilon_is_the_smallest_entry_of_the_kth_power(random_logits):
    logits = random_logits(3, 3)
    matrix = transition_matrix(logits, 3)
    states = convergence.classes(matrix).recurrent_states
    power = np.linalg.matrix_power(matrix.toarray(), 3)[np.ix_(states, states)]
    epsilon = convergence.smallest_k_step_probability(logits, 3)
    assert epsilon == pytest.approx(power.min(), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0, 3.0])
def test_mixing_time_is_the_first_step_at_which_all_starts_are_near(random_logits, temperature):
    matrix = transition_matrix(random_logits(2, 3, seed=4), 3, temperature)
    stationary = convergence.stationary_distribution(matrix)
    found = convergence.mixing_time(matrix, stationary, threshold=0.1)
    worst = convergence.worst_distance(matrix, stationary, found)
    assert worst[found] <= 0.1 < worst[found - 1]
    with pytest.raises(ValueError, match="don't mix this chain"):
        convergence.mixing_time(matrix, stationary, threshold=1e-9, limit=2)


@pytest.mark.parametrize("leave", [1e-3, 1e-9])
def test_mixing_time_of_a_chain_that_can_be_worked_out(leave):
    matrix = sparse.csr_matrix([[1 - leave, leave], [leave, 1 - leave]])
    found = convergence.mixing_time(matrix, np.array([0.5, 0.5]), 0.01, limit=10**12)
    expected = np.log(0.02) / np.log1p(-2 * leave)  # (1 - 2 leave)^n / 2 = 0.01
    assert found == pytest.approx(np.ceil(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, s: convergence.mixing_time(m * np.nan, s), "rows that sum to 1"),
        (lambda m, s: convergence.worst_distance(m * np.nan, s, 3), "rows that sum to 1"),
        (lambda m, s: convergence.stationary_distribution(m * 2), "rows that sum to 1"),
        (lambda m, s: convergence.mixing_time(m, s * np.nan), "sums to nan"),
        (lambda m, s: convergence.mixing_time(m, s, threshold=np.nan), "not nan"),
        (lambda m, s: convergence.convergence_bound(np.nan, 3, 5), "not nan"),
        (lambda m, s: convergence.steps_until_bound(0.1, 3, 0.0), "distance 0.0 below 1"),
    ],
)
def test_what_is_no_chain_is_refused(call, message):
    matrix = sparse.csr_matrix([[0.5, 0.5], [0.2, 0.8]])
    with pytest.raises(ValueError, match=message):
        call(matrix, convergence.stationary_distribution(matrix))
