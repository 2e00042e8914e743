"""How well a model learns a Markov chain from its prompt, and what rivals that count make of it.

Source: sections 4 and 5 of Large Language Models as Markov Chains (Zekri et al., 2024).
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.theory.markov_chains import Model


@torch.inference_mode()
def in_context_predictions(
    model: Model, symbols: Sequence[int], prompts: np.ndarray, separator: int | None = None
) -> np.ndarray:
    """What a model expects next after every position of prompts of symbols.

    symbols: (d,) token ids that stand for the chain's states. prompts: (batch, n) int states.
    separator: a token put after each symbol, such as a comma's.
    Returns (batch, n, d): the softmax over the symbols' logits. One prompt is run at a time.
    Raises ValueError when a logit is NaN.
    """
    ids = torch.as_tensor(list(symbols))
    rows = []
    for prompt in prompts:
        tokens = ids[torch.as_tensor(prompt)][:, None]  # (n, 1)
        if separator is not None:
            tokens = torch.cat([tokens, torch.full_like(tokens, separator)], 1)  # (n, 2)
        logits = _logits_of(model, tokens.reshape(1, -1), ids)[0]  # (n * width, d)
        width = tokens.shape[1]
        rows.append(logits[width - 1 :: width].float().softmax(-1))  # (n, d)
    shares = torch.stack(rows).cpu().numpy()
    if not np.isfinite(shares).all():
        raise ValueError("logits are NaN or infinite: look at the model's weights")
    return shares


def _logits_of(model: Model, tokens: Tensor, ids: Tensor) -> Tensor:
    """The logits of a few tokens: (batch, length) -> (batch, length, len(ids)).

    Of a `GPT` only these are computed; with 49,152 of them the rest would fill 200 MB a prompt.
    """
    if hasattr(model, "hidden_states"):
        return F.linear(model.hidden_states(tokens), model.head.weight[ids])
    return model(tokens)[..., ids]


def frequency_predictions(prompts: np.ndarray, size: int, smoothing: float = 1.0) -> np.ndarray:
    """The frequency estimate: counts of what followed the present symbol so far, plus smoothing.

    prompts: (batch, n) int states below `size`. Returns (batch, n, size), rows sum to 1. At
    smoothing 1 it is the posterior mean under a uniform prior over transition rows.
    Raises ValueError for symbols outside of 0 .. size - 1.
    """
    _check_symbols(prompts, size)
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
    Raises ValueError for symbols outside of 0 .. size - 1.
    """
    _check_symbols(prompts, size)
    counts = np.cumsum(np.eye(size)[prompts], axis=1) + smoothing
    return counts / counts.sum(-1, keepdims=True)


def _check_symbols(prompts: np.ndarray, size: int) -> None:
    if prompts.size and not 0 <= prompts.min() <= prompts.max() < size:
        raise ValueError(f"prompts hold {prompts.min()} to {prompts.max()}, not 0 to {size - 1}")


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


def octaves(risk: np.ndarray, first: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean risk over positions first..2 first, 2 first..4 first, ... : (centers, means).

    risk: (batch, n) or (n,). Centers are geometric means of the positions, counted from 1. Each
    octave weighs the same in a fit, so that the many late positions don't decide it alone.
    Raises ValueError when `first` is below 1, or no whole octave fits.
    """
    mean = np.atleast_2d(risk).mean(0)
    if first < 1 or 2 * first > len(mean) + 1:
        raise ValueError(f"{len(mean)} positions hold no octave that begins at {first}")
    edges = [first]
    while edges[-1] * 2 <= len(mean) + 1:
        edges.append(edges[-1] * 2)
    places = np.arange(1, len(mean) + 1)
    spans = [slice(low - 1, high - 1) for low, high in itertools.pairwise(edges)]
    centers = np.array([np.exp(np.log(places[span]).mean()) for span in spans])
    return centers, np.array([mean[span].mean() for span in spans])
