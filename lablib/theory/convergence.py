"""How fast a Markov chain forgets where it started: classes, stationary distribution, bounds.

Source: section 3.1 of Large Language Models as Markov Chains (Zekri et al., 2024, version 2), where
not said otherwise. Matrices are sparse, (n_states, n_states), rows sum to 1.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from lablib.theory.markov_chains import n_states, probabilities, successors


@dataclass(frozen=True)
class Classes:
    """Communicating classes of a chain.

    label: (n_states,) the class of each state. recurrent: (n_classes,) whether a class is closed,
    so that the chain never leaves it; the others are transient.
    """

    label: np.ndarray
    recurrent: np.ndarray

    @property
    def recurrent_states(self) -> np.ndarray:
        """Numbers of the states that belong to a recurrent class."""
        return np.flatnonzero(self.recurrent[self.label])


def classes(matrix: sparse.csr_matrix) -> Classes:
    """The communicating classes: strongly connected components of the positive entries.

    Raises ValueError for a matrix that holds NaN, or whose rows don't sum to 1.
    """
    sums = np.asarray(matrix.sum(1)).ravel()
    if not (np.abs(sums - 1) < 1e-6).all():
        raise ValueError("a transition matrix has rows that sum to 1; one here does not, or is NaN")
    graph = matrix.copy()
    graph.eliminate_zeros()
    count, label = connected_components(graph, directed=True, connection="strong")
    entries = graph.tocoo()
    leaving = label[entries.row] != label[entries.col]
    recurrent = np.ones(count, bool)
    recurrent[label[entries.row[leaving]]] = False
    return Classes(label, recurrent)


def stationary_distribution(
    matrix: sparse.csr_matrix, tolerance: float = 1e-12, max_steps: int = 200_000
) -> np.ndarray:
    """The distribution that one step leaves as it is: (n_states,), zero on transient states.

    Up to 1,000 recurrent states it is eliminated directly; above that the lazy chain is iterated.
    Raises ValueError when several recurrent classes leave it undetermined, or when iteration does
    not settle (a chain at low temperature can take longer than anyone waits).
    """
    found = classes(matrix)
    if found.recurrent.sum() != 1:
        raise ValueError(f"{found.recurrent.sum()} recurrent classes: no unique distribution")
    states = found.recurrent_states
    inner = matrix[states][:, states]
    result = np.zeros(matrix.shape[0])
    few = len(states) <= 1000
    result[states] = eliminate(inner.toarray()) if few else iterate(inner, tolerance, max_steps)
    return result


def eliminate(matrix: np.ndarray) -> np.ndarray:
    """The stationary distribution of a small dense chain (n, n) of one class: (n,).

    States are taken out one by one, each one's traffic given to the others. No subtraction, so tiny
    entries keep their digits. Source: Grassmann, Taksar and Heyman (1985).
    """
    matrix = matrix.copy()
    size = len(matrix)
    for last in range(size - 1, 0, -1):
        matrix[:last, last] /= matrix[last, :last].sum()
        matrix[:last, :last] += np.outer(matrix[:last, last], matrix[last, :last])
    share = np.ones(size)
    for place in range(1, size):
        share[place] = share[:place] @ matrix[:place, place]
    return share / share.sum()


def iterate(matrix: sparse.csr_matrix, tolerance: float, max_steps: int) -> np.ndarray:
    """The stationary distribution of a large chain of one class, by repeated steps: (n,)."""
    transposed = matrix.T.tocsr()
    share = np.full(matrix.shape[0], 1 / matrix.shape[0])
    for _ in range(max_steps):
        # Staying put half of the time changes no stationary distribution, but rules out a period.
        after = (share + transposed @ share) / 2
        if np.abs(after - share).sum() < tolerance:
            return after / after.sum()
        share = after
    raise ValueError(
        f"the chain did not settle in {max_steps} steps: raise the temperature or max_steps"
    )


def worst_distance(matrix: sparse.csr_matrix, stationary: np.ndarray, steps: int) -> np.ndarray:
    """Total-variation distance to `stationary` after 0 to `steps` steps: (steps + 1,), in [0, 1].

    From the recurrent state that is farthest at each step. Half the sum of absolute differences:
    the largest gap between the two probabilities of any event.
    """
    states = classes(matrix).recurrent_states
    inner, target = matrix[states][:, states].T.tocsr(), stationary[states][:, None]
    shares = np.eye(len(states))  # one column a start
    distances = np.empty(steps + 1)
    for step in range(steps + 1):
        distances[step] = np.abs(shares - target).sum(0).max() / 2
        shares = inner @ shares
    return distances


def mixing_time(
    matrix: sparse.csr_matrix, stationary: np.ndarray, threshold: float = 0.25, limit: int = 100_000
) -> int:
    """Steps until the distance to `stationary` is at most `threshold` from every recurrent state.

    Dense powers by doubling, then bisection: up to some thousand states, and any number of steps.
    Raises ValueError when `limit` steps are not enough, or for no threshold or distribution.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"a threshold is a distance between 0 and 1, not {threshold}")
    if not abs(stationary.sum() - 1) < 1e-6:
        raise ValueError(f"stationary sums to {stationary.sum()}, so it is no distribution")
    states = classes(matrix).recurrent_states
    target = stationary[states]
    powers = [matrix[states][:, states].toarray()]

    def far(power: np.ndarray) -> bool:
        return np.abs(power - target).sum(1).max() / 2 > threshold

    while far(powers[-1]):
        if 2 ** len(powers) > limit:
            raise ValueError(f"{limit} steps don't mix this chain: raise its temperature")
        powers.append(_product(powers[-1], powers[-1]))
    if len(powers) == 1:
        return 1
    done, reached = 2 ** (len(powers) - 2), powers[-2]
    for exponent in range(len(powers) - 3, -1, -1):
        further = _product(reached, powers[exponent])
        if far(further):
            done, reached = done + 2**exponent, further
    return done + 1


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Matrix product whose rows sum to 1 again: doubling doubles an error in their sum, too."""
    power = first @ second
    return power / power.sum(1, keepdims=True)


def smallest_k_step_probability(
    logits: np.ndarray, context: int, temperature: float = 1.0
) -> float:
    """The bound's epsilon: the smallest entry of Q^K over full contexts i, j.

    K steps rewrite a full context, so each entry is one path's product, and the smallest is found
    backward, step by step, without forming Q^K.
    """
    rows = probabilities(logits, temperature)
    vocabulary = rows.shape[1]
    shorter = n_states(vocabulary, context - 1)
    after = successors(vocabulary, context)[shorter:] - shorter
    smallest = np.ones(vocabulary**context)
    for _ in range(context):
        smallest = (rows[shorter:] * smallest[after]).min(1)
    return float(smallest.min())


def convergence_bound(epsilon: float, context: int, steps: np.ndarray) -> np.ndarray:
    """The paper's bound on the distance after n steps: (1 - 2 epsilon)^(floor(n / K) - 1), n >= K.

    Below n = K the bound says nothing, so it is 1. Raises ValueError unless 0 <= epsilon <= 1/2.
    """
    if not 0 <= epsilon <= 0.5:
        raise ValueError(f"epsilon is a probability of two contexts or more, not {epsilon}")
    exponent = np.maximum(np.asarray(steps) // context - 1, 0)
    return (1 - 2 * epsilon) ** exponent


def steps_until_bound(epsilon: float, context: int, distance: float) -> float:
    """The number of steps after which `convergence_bound` is at most `distance`; infinite at 0."""
    if not 0 < distance < 1 or not 0 <= epsilon <= 0.5:
        raise ValueError(f"epsilon {epsilon} must be in 0 .. 1/2, distance {distance} below 1")
    if epsilon == 0:
        return float("inf")
    shrink = np.log1p(-2 * epsilon) if epsilon < 0.5 else -np.inf
    return float(context * (max(np.ceil(np.log(distance) / shrink), 1) + 1))


def doeblin_bound(matrix: sparse.csr_matrix, context: int, steps: np.ndarray) -> np.ndarray:
    """A bound from the same argument that keeps all of Q^K: (1 - sum_j min_i Q^K_ij)^floor(n / K).

    What all rows share is forgotten in K steps (Doeblin's minorization); the paper's epsilon keeps
    of it only the smallest entry. Starting states: the recurrent ones. Dense: up to some thousand.
    """
    states = classes(matrix).recurrent_states
    power = np.linalg.matrix_power(matrix[states][:, states].toarray(), context)
    shared = min(power.min(0).sum(), 1.0)
    return (1 - shared) ** (np.asarray(steps) // context)
