"""Walks of a chain, and the text that a model writes through a window."""

import numpy as np
import torch

from lablib.theory.markov_chains import Model, probabilities, successors


def sample_path(
    logits: np.ndarray,
    context: int,
    start: int,
    steps: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """A walk over states: (steps + 1,) state numbers from `start`, one sampled token a step.

    logits: (n_states, T), from `next_token_logits`. Two walks with one seed throw the same dice:
    once they stand on the same state they go together for ever.
    Raises ValueError for logits without probabilities, and for a start that is no state.
    """
    if not 0 <= start < len(logits):
        raise ValueError(f"start {start} is no state: there are {len(logits)}")
    rows = probabilities(logits, temperature).cumsum(1)
    after = successors(logits.shape[1], context)
    path = np.empty(steps + 1, np.int64)
    path[0] = start
    for step, draw in enumerate(np.random.default_rng(seed).random(steps)):
        here = path[step]
        token = min(int(np.searchsorted(rows[here], draw, side="right")), rows.shape[1] - 1)
        path[step + 1] = after[here, token]
    return path


def meeting_step(first: np.ndarray, second: np.ndarray) -> int | None:
    """The first step at which two walks stand on the same state; None when they never do."""
    same = np.flatnonzero(first == second)
    return int(same[0]) if len(same) else None


@torch.inference_mode()
def generate_windowed(
    model: Model, context: int, vocabulary: int, walkers: int, steps: int, seed: int = 0
) -> np.ndarray:
    """Text as the model itself writes it with a window of `context`: (walkers, steps) tokens.

    Each walker starts from a random token, and the model is called on its last `context` tokens for
    every new one. Nothing of the matrix is used, so it can be checked against this.
    Raises ValueError when the model's logits are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocabulary, (walkers, 1), generator=generator)
    for _ in range(steps):
        shares = model(text[:, -context:])[:, -1].float().softmax(-1)
        if not shares.isfinite().all():
            raise ValueError("logits are NaN or infinite: look at the model's weights")
        text = torch.cat([text, torch.multinomial(shares, 1, generator=generator)], 1)
    return text[:, 1:].numpy()


def state_frequencies(texts: np.ndarray, context: int, vocabulary: int) -> np.ndarray:
    """Share of each full context among the windows of texts (walkers, n): (T ** K,), sums to 1."""
    windows = np.lib.stride_tricks.sliding_window_view(texts, context, axis=1)
    values = windows @ vocabulary ** np.arange(context - 1, -1, -1)
    return np.bincount(values.ravel(), minlength=vocabulary**context) / values.size
