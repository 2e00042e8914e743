"""Large Language Models as Markov Chains (Zekri et al., 2024): a model is a finite chain.

Lab 201. A model with T tokens and a context of K is a Markov chain on the sequences of length 1 to
K (section 3): it appends a token, and drops the oldest one once K are there. The second half
follows section 4: how well a model learns a Markov chain from a prompt, as the prompt grows.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Model = Callable[[Tensor], Tensor]  # (batch, length) int64 -> logits (batch, length, vocabulary)


# Ways to write English in a few symbols. The first is Markov's own: in 1913 he counted vowels and
# consonants in 20,000 letters of Pushkin, and so drew the first Markov chain of a text.
ALPHABETS: dict[int, dict[str, str]] = {
    2: {"V": "aeiouy", "C": "bcdfghjklmnpqrstvwxz"},
    3: {"V": "aeiouy", "C": "bcdfghjklmnpqrstvwxz", "_": " "},
    4: {"V": "aeiouy", "C": "bcdfghjklmnpqrstvwxz", "_": " ", ".": ".,;:!?"},
    8: {
        "e": "e",
        "V": "aiouy",
        "N": "lmnr",
        "T": "bcdgkpqt",
        "S": "fhjsvwxz",
        "_": " ",
        ",": ",;:",
        ".": ".!?",
    },
}


def symbolize(text: str, size: int) -> np.ndarray:
    """Text written in the `size` symbols of ALPHABETS: (n,) int64; other characters are left out.

    White space counts as one space. Raises ValueError when there is no alphabet of that size.
    """
    if size not in ALPHABETS:
        raise ValueError(
            f"no alphabet has {size} symbols; there are {', '.join(map(str, ALPHABETS))}"
        )
    place = {c: i for i, group in enumerate(ALPHABETS[size].values()) for c in group}
    clean = " ".join(text.lower().split())
    return np.array([place[c] for c in clean if c in place], np.int64)


def n_states(vocabulary: int, context: int) -> int:
    """Sequences of length 1 to `context` over `vocabulary` tokens: T + T^2 + ... + T^K."""
    return sum(vocabulary**length for length in range(1, context + 1))


def state(tokens: Sequence[int], vocabulary: int) -> int:
    """The number of a sequence: shorter ones first, then in lexical order."""
    value = 0
    for token in tokens:
        value = value * vocabulary + int(token)
    return n_states(vocabulary, len(tokens) - 1) + value


def sequence(number: int, vocabulary: int) -> tuple[int, ...]:
    """The sequence of tokens that has this number: the inverse of `state`."""
    length = 1
    while number >= vocabulary**length:
        number -= vocabulary**length
        length += 1
    return tuple(number // vocabulary**back % vocabulary for back in reversed(range(length)))


@torch.inference_mode()
def next_token_logits(
    model: Model, context: int, symbols: Sequence[int], batch_size: int = 4096
) -> np.ndarray:
    """The model's logits after every state: (n_states, T) float32, rows in the order of `state`.

    symbols: (T,) token ids of the model that serve as the chain's vocabulary; only their logits are
    kept, so that the softmax is over them alone. The model sees each sequence from its start.
    """
    ids = torch.as_tensor(list(symbols))
    size = len(ids)
    rows = np.empty((n_states(size, context), size), np.float32)
    done = 0
    for length in range(1, context + 1):
        powers = size ** torch.arange(length - 1, -1, -1)
        for values in torch.arange(size**length).split(batch_size):
            tokens = ids[values[:, None] // powers % size]
            logits = model(tokens)[:, -1, ids]
            rows[done : done + len(values)] = logits.float().numpy()
            done += len(values)
    return rows


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax of logits / temperature over the last axis. Raises ValueError at temperature <= 0."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    scaled = (logits - logits.max(-1, keepdims=True)) / np.float32(temperature)
    weights = np.exp(scaled, dtype=np.float32)
    return weights / weights.sum(-1, keepdims=True)


def successors(vocabulary: int, context: int) -> np.ndarray:
    """(n_states, T) int32: the state that follows each state when each token is appended.

    Section 3.1: a sequence of K tokens drops its oldest one, a shorter one only grows.
    """
    shorter = n_states(vocabulary, context - 1)
    longest = np.arange(vocabulary**context) % vocabulary ** (context - 1)
    # The successors of the i-th shorter state are consecutive, and start at T (i + 1).
    first = np.concatenate([vocabulary * (np.arange(shorter) + 1), shorter + vocabulary * longest])
    return (first[:, None] + np.arange(vocabulary)).astype(np.int32)


def transition_matrix(
    logits: np.ndarray, context: int, temperature: float = 1.0
) -> sparse.csr_matrix:
    """The chain's transition matrix Q: (n_states, n_states), T entries a row, float64.

    logits: (n_states, T), from `next_token_logits`. Source: section 3.1.
    Raises ValueError when the number of rows is not that of a context of `context`.
    """
    states, vocabulary = logits.shape
    if states != n_states(vocabulary, context):
        raise ValueError(
            f"{states} rows of logits, but T = {vocabulary} and K = {context} make "
            f"{n_states(vocabulary, context)} states"
        )
    rows = probabilities(logits, temperature).astype(np.float64)
    rows /= rows.sum(1, keepdims=True)
    starts = np.arange(0, rows.size + 1, vocabulary, dtype=np.int32)
    columns = successors(vocabulary, context).ravel()
    return sparse.csr_matrix((rows.ravel(), columns, starts), shape=(states, states))


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
    """The communicating classes: strongly connected components of the positive entries."""
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

    Up to 1,000 recurrent states it is eliminated directly (Grassmann, Taksar and Heyman, 1985: no
    subtraction, so tiny entries keep their digits); above that the lazy chain is iterated.
    Raises ValueError when several recurrent classes leave it undetermined, or when iteration does
    not settle (a chain at low temperature can take longer than anyone waits).
    Source: section 3.2.
    """
    found = classes(matrix)
    if found.recurrent.sum() != 1:
        raise ValueError(f"{found.recurrent.sum()} recurrent classes: no unique distribution")
    states = found.recurrent_states
    inner = matrix[states][:, states]
    values = _eliminate(inner.toarray()) if len(states) <= 1000 else None
    if values is None:
        values = _iterate(inner, tolerance, max_steps)
    result = np.zeros(matrix.shape[0])
    result[states] = values
    return result


def _eliminate(matrix: np.ndarray) -> np.ndarray:
    size = len(matrix)
    for last in range(size - 1, 0, -1):
        matrix[:last, last] /= matrix[last, :last].sum()
        matrix[:last, :last] += np.outer(matrix[:last, last], matrix[last, :last])
    share = np.ones(size)
    for place in range(1, size):
        share[place] = share[:place] @ matrix[:place, place]
    return share / share.sum()


def _iterate(matrix: sparse.csr_matrix, tolerance: float, max_steps: int) -> np.ndarray:
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


def total_variation(
    matrix: sparse.csr_matrix, stationary: np.ndarray, start: int | np.ndarray, steps: int
) -> np.ndarray:
    """Total-variation distance to `stationary` after 0 to `steps` steps: (steps + 1,), in [0, 1].

    start: a state's number, or a distribution over the states.
    """
    share = np.zeros(matrix.shape[0]) if np.isscalar(start) else np.asarray(start, float)
    if np.isscalar(start):
        share[start] = 1.0
    transposed = matrix.T.tocsr()
    distances = np.empty(steps + 1)
    for step in range(steps + 1):
        distances[step] = np.abs(share - stationary).sum() / 2
        share = transposed @ share
    return distances


def smallest_k_step_probability(
    logits: np.ndarray, context: int, temperature: float = 1.0
) -> float:
    """The bound's epsilon (section 3.2): the smallest entry of Q^K over recurrent states i, j.

    K steps rewrite a full context, so each entry is one path's product, and the smallest is found
    backward, step by step, without forming Q^K.
    """
    rows = probabilities(logits, temperature).astype(np.float64)
    vocabulary = rows.shape[1]
    shorter = n_states(vocabulary, context - 1)
    after = successors(vocabulary, context)[shorter:] - shorter
    smallest = np.ones(vocabulary**context)
    for _ in range(context):
        smallest = (rows[shorter:] * smallest[after]).min(1)
    return float(smallest.min())


def convergence_bound(epsilon: float, context: int, steps: np.ndarray) -> np.ndarray:
    """The paper's bound on the distance after n steps: (1 - 2 epsilon)^(floor(n / K) - 1), n >= K.

    Below n = K the bound says nothing, so it is 1. Source: section 3.2.
    """
    steps = np.asarray(steps)
    exponent = np.maximum(steps // context - 1, 0)
    return (1 - 2 * epsilon) ** exponent


def steps_until_bound(epsilon: float, context: int, distance: float) -> float:
    """The number of steps after which `convergence_bound` is at most `distance`; infinite at 0."""
    if epsilon <= 0:
        return float("inf")
    shrink = np.log1p(-2 * epsilon) if epsilon < 0.5 else -np.inf
    return float(context * (max(np.ceil(np.log(distance) / shrink), 1) + 1))


def doeblin_bound(matrix: sparse.csr_matrix, context: int, steps: np.ndarray) -> np.ndarray:
    """A bound from the same argument that keeps all of Q^K: (1 - sum_j min_i Q^K_ij)^floor(n / K).

    What all rows share is forgotten in K steps (Doeblin's minorization); the paper's epsilon keeps
    of it only the smallest entry. Starting states: the recurrent ones. Dense: up to some thousand.
    """
    states = classes(matrix).recurrent_states
    power = matrix[states][:, states].toarray()
    power = np.linalg.matrix_power(power, context)
    shared = power.min(0).sum()
    return (1 - shared) ** (np.asarray(steps) // context)


def sample_path(
    logits: np.ndarray,
    context: int,
    start: int,
    steps: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """A walk over states: (steps + 1,) state numbers from `start`, one sampled token a step."""
    rows = probabilities(logits, temperature).astype(np.float64).cumsum(1)
    after = successors(logits.shape[1], context)
    path = np.empty(steps + 1, np.int64)
    path[0] = start
    for step, draw in enumerate(np.random.default_rng(seed).random(steps)):
        here = path[step]
        token = min(int(np.searchsorted(rows[here], draw, side="right")), rows.shape[1] - 1)
        path[step + 1] = after[here, token]
    return path


@torch.inference_mode()
def generate_windowed(
    model: Model, context: int, vocabulary: int, walkers: int, steps: int, seed: int = 0
) -> np.ndarray:
    """Text as the model itself writes it with a window of `context`: (walkers, steps) tokens.

    Each walker starts from a random token, and the model is called on its last `context` tokens for
    every new one. Nothing of the matrix is used, so it can be checked against this.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocabulary, (walkers, 1), generator=generator)
    for _ in range(steps):
        shares = model(text[:, -context:])[:, -1].float().softmax(-1)
        text = torch.cat([text, torch.multinomial(shares, 1, generator=generator)], 1)
    return text[:, 1:].numpy()


def state_frequencies(texts: np.ndarray, context: int, vocabulary: int) -> np.ndarray:
    """Share of each full context among the windows of texts (walkers, n): (T ** K,), sums to 1."""
    windows = np.lib.stride_tricks.sliding_window_view(texts, context, axis=1)
    values = windows @ vocabulary ** np.arange(context - 1, -1, -1)
    return np.bincount(values.ravel(), minlength=vocabulary**context) / values.size


def worst_distance(matrix: sparse.csr_matrix, stationary: np.ndarray, steps: int) -> np.ndarray:
    """The largest of all recurrent starts' distances after 0 to `steps` steps: (steps + 1,)."""
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

    Dense powers by doubling, then bisection: up to some thousand states. Raises ValueError when
    `limit` steps are not enough.
    """
    states = classes(matrix).recurrent_states
    target = stationary[states]
    powers = [matrix[states][:, states].toarray()]

    def far(power: np.ndarray) -> bool:
        return np.abs(power - target).sum(1).max() / 2 > threshold

    while far(powers[-1]):
        if 2 ** len(powers) > limit:
            raise ValueError(f"{limit} steps don't mix this chain: raise its temperature")
        powers.append(powers[-1] @ powers[-1])
    if len(powers) == 1:
        return 1
    done, reached = 2 ** (len(powers) - 2), powers[-2]
    for exponent in range(len(powers) - 3, -1, -1):
        further = reached @ powers[exponent]
        if far(further):
            done, reached = done + 2**exponent, further
    return done + 1


@torch.inference_mode()
def in_context_predictions(
    model: Model, symbols: Sequence[int], prompts: np.ndarray, separator: int | None = None
) -> np.ndarray:
    """What a model expects next after every position of prompts of symbols.

    symbols: (d,) token ids that stand for the chain's states. prompts: (batch, n) int states.
    separator: a token put after each symbol, such as a comma's.
    Returns (batch, n, d): the softmax over the symbols' logits. One prompt is run at a time.
    """
    ids = torch.as_tensor(list(symbols))
    rows = []
    for prompt in prompts:
        tokens = ids[torch.as_tensor(prompt)][:, None]
        if separator is not None:
            tokens = torch.cat([tokens, torch.full_like(tokens, separator)], 1)
        width = tokens.shape[1]
        logits = model(tokens.reshape(1, -1))[0, width - 1 :: width]
        rows.append(logits[:, ids].float().softmax(-1))
    return torch.stack(rows).cpu().numpy()


def frequency_predictions(prompts: np.ndarray, size: int, smoothing: float = 1.0) -> np.ndarray:
    """The frequency estimate: counts of what followed the present symbol so far, plus smoothing.

    prompts: (batch, n) int states below `size`. Returns (batch, n, size), rows sum to 1. At
    smoothing 1 it is the posterior mean under a uniform prior over transition rows.
    """
    batch, length = prompts.shape
    each = np.arange(batch)
    counts = np.full((batch, size, size), float(smoothing))
    out = np.empty((batch, length, size))
    for place in range(length):
        if place:
            counts[each, prompts[:, place - 1], prompts[:, place]] += 1
        row = counts[each, prompts[:, place]]
        out[:, place] = row / row.sum(1, keepdims=True)
    return out


def symbol_share_predictions(prompts: np.ndarray, size: int, smoothing: float = 1.0) -> np.ndarray:
    """The estimate that ignores transitions: how frequent each symbol was so far, plus smoothing.

    prompts: (batch, n) int states below `size`. Returns (batch, n, size), rows sum to 1.
    """
    counts = np.cumsum(np.eye(size)[prompts], axis=1) + smoothing
    return counts / counts.sum(-1, keepdims=True)


def in_context_risk(
    predictions: np.ndarray, prompts: np.ndarray, transition: np.ndarray
) -> np.ndarray:
    """Total-variation distance to the true next-symbol distribution, by position: (batch, n).

    predictions: (batch, n, d); transition: (d, d), or (batch, d, d) with a chain a prompt.
    Source: the in-context risk of section 4, at one position.
    """
    transition = np.broadcast_to(transition, (len(prompts), *transition.shape[-2:]))
    truth = transition[np.arange(len(prompts))[:, None], prompts]
    return np.abs(predictions - truth).sum(-1) / 2


@dataclass(frozen=True)
class PowerLaw:
    """value = coefficient * n ^ exponent."""

    coefficient: float
    exponent: float

    def __call__(self, n: np.ndarray) -> np.ndarray:
        return self.coefficient * np.asarray(n, float) ** self.exponent


def fit_power_law(n: np.ndarray, values: np.ndarray) -> PowerLaw:
    """Least squares on logarithms. n, values: (m,), positive, at least two different n.

    Raises ValueError otherwise.
    """
    n, values = np.asarray(n, float), np.asarray(values, float)
    if len(np.unique(n)) < 2 or min(n.min(), values.min()) <= 0:
        raise ValueError("a power law needs positive values at two different lengths at least")
    exponent, intercept = np.polyfit(np.log(n), np.log(values), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def octaves(risk: np.ndarray, first: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean risk over positions first..2 first, 2 first..4 first, ... : (centers, means).

    risk: (batch, n) or (n,). Centers are geometric means of the positions, counted from 1. Each
    octave weighs the same in a fit, so that the many late positions don't decide it alone.
    """
    mean = np.atleast_2d(risk).mean(0)
    edges = [first]
    while edges[-1] * 2 <= len(mean):
        edges.append(edges[-1] * 2)
    places = np.arange(1, len(mean) + 1)
    spans = [slice(low - 1, high - 1) for low, high in itertools.pairwise(edges)]
    centers = np.array([np.exp(np.log(places[span]).mean()) for span in spans])
    return centers, np.array([mean[span].mean() for span in spans])
