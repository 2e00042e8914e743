"""A bigram model of characters: the smallest language model that is one.

Used by the start page. Everything it knows is one table of counts.
"""

from collections.abc import Iterable

import numpy as np

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.,;:'-\"?!()0123456789_"
_INDEX = {character: place for place, character in enumerate(ALPHABET)}


def encode(text: str) -> np.ndarray:
    """Lower-cased characters as places in ALPHABET: (n,) int64; others become a space."""
    space = _INDEX[" "]
    return np.array([_INDEX.get(character, space) for character in text.lower()], np.int64)


def counts(texts: Iterable[str]) -> np.ndarray:
    """How often each character follows each: (A, A) int64, row = the character before."""
    size = len(ALPHABET)
    table = np.zeros(size * size, np.int64)
    for text in texts:
        ids = encode(text)
        table += np.bincount(ids[:-1] * size + ids[1:], minlength=size * size)
    return table.reshape(size, size)


def probabilities(table: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """P(next | before) with `alpha` added to every count (Lidstone): (A, A), rows sum to 1.

    Raises ValueError when alpha is not above 0: a pair never seen would then be impossible, and
    one such pair in held-out text makes the loss infinite.
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")
    return (table + alpha) / (table + alpha).sum(1, keepdims=True)


def bits(table: np.ndarray, model: np.ndarray) -> float:
    """Mean bits a character that `model` (A, A) pays on text with these pair counts (A, A)."""
    return float(-(table * np.log2(model)).sum() / table.sum())


def unigram(table: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """The model that ignores the character before: (A, A), every row the same."""
    share = table.sum(0) + alpha
    return np.tile(share / share.sum(), (len(table), 1))


def sample(model: np.ndarray, length: int, seed: int = 0, start: str = "\n") -> str:
    """`length` characters drawn from the model (A, A), one after the other."""
    random = np.random.default_rng(seed)
    cumulative = model.cumsum(1)
    place, out = _INDEX[start], []
    for draw in random.random(length):
        place = min(int(np.searchsorted(cumulative[place], draw)), len(ALPHABET) - 1)
        out.append(ALPHABET[place])
    return "".join(out)
