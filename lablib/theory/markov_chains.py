"""Large Language Models as Markov Chains (Zekri et al., 2024): a model is a finite chain.

Lab 201. A model with T tokens that reads its last K is a Markov chain on the sequences of length 1
to K (section 3.1). `markov_chain` is that sentence as code; the rest builds the same matrix for
chains of a million states. How fast a chain forgets is in `convergence`, what it writes in `walks`,
and section 4, how well a model learns a chain from its prompt, in `in_context`.
Sections are those of version 2, February 2025.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

Model = Callable[[Tensor], Tensor]  # (batch, length) int64 -> logits (batch, length, vocabulary)


@torch.inference_mode()
def markov_chain(
    model: Model, vocabulary: int, context: int, temperature: float = 1.0
) -> np.ndarray:
    """The transition matrix of a model with T = `vocabulary` that reads K = `context` tokens.

    Returns (n_states, n_states) float64, rows sum to 1; states are the sequences of 1 to K tokens,
    shorter ones first, then in lexical order. Source: Proposition 3.2.
    """
    lengths = range(1, context + 1)
    states = [s for n in lengths for s in itertools.product(range(vocabulary), repeat=n)]
    number = {state: place for place, state in enumerate(states)}
    Q = np.zeros((len(states), len(states)))
    for state in states:
        logits = model(torch.tensor([state]))[0, -1]  # (T,)
        shares = probabilities(logits.numpy(), temperature)  # their softmax
        for token, share in enumerate(shares):
            after = (*state, token)[-context:]  # append; keep the last K
            Q[number[state], number[after]] = share
    return Q


def n_states(vocabulary: int, context: int) -> int:
    """Sequences of length 1 to `context` over `vocabulary` tokens: T + T^2 + ... + T^K."""
    if vocabulary < 1:
        raise ValueError(f"a chain needs 1 token at least, not {vocabulary}")
    return sum(vocabulary**length for length in range(1, context + 1))


def state(tokens: Sequence[int], vocabulary: int) -> int:
    """The number of a sequence: shorter ones first, then in lexical order.

    Raises ValueError for no token, and for one outside of 0 .. vocabulary - 1.
    """
    if not len(tokens) or not all(0 <= token < vocabulary for token in tokens):
        raise ValueError(f"{list(tokens)} is no sequence of tokens below {vocabulary}")
    value = 0
    for token in tokens:
        value = value * vocabulary + int(token)
    return n_states(vocabulary, len(tokens) - 1) + value


def sequence(number: int, vocabulary: int) -> tuple[int, ...]:
    """The sequence of tokens that has this number: the inverse of `state`.

    Raises ValueError for a number below 0, or without a token.
    """
    if number < 0 or vocabulary < 1:
        raise ValueError(f"no state has number {number} among {vocabulary} tokens")
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
            tokens = ids[values[:, None] // powers % size]  # (batch,) -> (batch, length)
            rows[done : done + len(values)] = model(tokens)[:, -1, ids].float().numpy()
            done += len(values)
    return rows


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Softmax of logits / temperature over the last axis, in float64.

    A finite logit keeps a probability above zero, however low the temperature: what a model can
    write, its chain can. Raises ValueError at temperature <= 0, and for logits that are NaN,
    infinite, or all minus infinity.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    logits = np.asarray(logits, np.float64)
    best = logits.max(-1, keepdims=True)
    if not np.isfinite(best).all():
        raise ValueError("logits are NaN or infinite: look at the model's weights")
    with np.errstate(under="ignore"):
        weights = np.exp((logits - best) / temperature)
    possible = logits > -np.inf
    weights = np.where(possible, np.maximum(weights, np.finfo(np.float64).tiny), 0.0)
    return weights / weights.sum(-1, keepdims=True)


def successors(vocabulary: int, context: int) -> np.ndarray:
    """(n_states, T) int32: the state that follows each state when each token is appended."""
    shorter = n_states(vocabulary, context - 1)
    longest = np.arange(vocabulary**context) % vocabulary ** (context - 1)
    # The successors of the i-th shorter state are consecutive, and start at T (i + 1).
    first = np.concatenate([vocabulary * (np.arange(shorter) + 1), shorter + vocabulary * longest])
    return (first[:, None] + np.arange(vocabulary)).astype(np.int32)


def transition_matrix(
    logits: np.ndarray, context: int, temperature: float = 1.0
) -> sparse.csr_matrix:
    """What `markov_chain` builds, from a table of logits: T entries a row, float64.

    logits: (n_states, T), from `next_token_logits`. Raises ValueError when the number of rows is
    not that of a context of `context`.
    """
    states, vocabulary = logits.shape
    if states != n_states(vocabulary, context):
        raise ValueError(
            f"{states} rows of logits, but T = {vocabulary} and K = {context} make "
            f"{n_states(vocabulary, context)} states"
        )
    rows = probabilities(logits, temperature)
    starts = np.arange(0, rows.size + 1, vocabulary, dtype=np.int32)
    columns = successors(vocabulary, context).ravel()
    return sparse.csr_matrix((rows.ravel(), columns, starts), shape=(states, states))
