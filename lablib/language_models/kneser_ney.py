"""Interpolated modified Kneser-Ney n-gram models, as kenlm's `lmplz` estimates them.

The estimate is Chen and Goodman's (1999), discounts by their equation 26, as kenlm computes it
(Heafield et al., 2013), so perplexities can be compared with published ones.
"""

import copy
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lablib.files import atomic_write
from lablib.language_models.ngrams import BackoffModel, Counts

Array = np.ndarray
FALLBACK = (0.5, 1.0, 1.5)  # lmplz --discount_fallback, where counts of counts are degenerate


def kneser_ney(
    count: Array, discount: Array, context: Array, contexts: int, lower: Array
) -> tuple[Array, Array]:
    """P(w | c) = (a(cw) - D) / (sum over v of a(cv)) + gamma(c) P(w | c'), of all cw of one order.

    count, discount: (n,) a(cw) and the D that is taken off it. context: (n,) which of the
    `contexts` contexts c is. lower: (n,) P(w | c').
    Returns P(w | c), (n,), and gamma(c), (contexts,), the weight that is left to unseen words.
    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling".
    """
    total = np.bincount(context, count, contexts)  # sum of a(cv) over v: (contexts,)
    taken = np.bincount(context, discount, contexts)  # sum of D over v: (contexts,)
    # gamma(c): (contexts,), 1 where nothing ever followed c
    gamma = np.where(total > 0, taken / np.maximum(total, 1), 1.0)
    own = (count - discount) / np.maximum(total, 1)[context]  # (n,)
    return own + gamma[context] * lower, gamma


def adjusted(levels: Sequence[Counts]) -> list[Array]:
    """a(cw) of every order: in how many contexts an n-gram occurs, not how often.

    How often counts where no word can stand before: n-grams of the highest order, and those that
    begin a sentence.
    """
    made = []
    for counts, above in itertools.pairwise(levels):
        variety = np.bincount(above.suffix, minlength=len(counts.raw))
        made.append(np.where(counts.starts, counts.raw, variety))
    return [*made, levels[-1].raw]


def discounts_of(count: Array) -> tuple[float, float, float]:
    """D1, D2, D3+ from how many n-grams have count 1, 2, 3, 4 (Chen and Goodman, eq. 26)."""
    n = np.bincount(np.minimum(count, 5), minlength=6).astype(float)
    if not n[1:4].all():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    values = tuple(c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3))
    return values if all(0 <= d <= c for c, d in zip((1, 2, 3), values, strict=True)) else FALLBACK


class KneserNey(BackoffModel):
    """`KneserNey(5).fit(sentences).perplexity(held_out)`.

    discounts: None estimates D1, D2, D3+ for each order from counts of counts; one number is
    used for every count and order; a list gives (D1, D2, D3+) for each order, 1-grams first.
    After `fit`, `discounts` holds those in use.
    """

    def __init__(self, order: int, discounts: float | Sequence[Sequence[float]] | None = None):
        super().__init__(order)
        self._given = _check_discounts(discounts, self.order)
        self.discounts: list[tuple[float, float, float]] = []

    def with_discounts(self, discounts: float | Sequence[Sequence[float]] | None) -> "KneserNey":
        """The same counts under other discounts: a new model that shares the count arrays."""
        self._fitted()
        other = copy.copy(self)
        other._given = _check_discounts(discounts, self.order)
        other._estimate()
        return other

    def save(self, path: str | Path) -> None:
        """Write counts, vocabulary and settings to one .npz file (arrays only, no pickle)."""
        self._fitted()
        head = {"order": self.order, "given": self._given, "thresholds": self.thresholds}
        arrays = {"words": _text_array("\n".join(self.vocabulary)), "head": _text_array(head)}
        for k, counts in enumerate(self._counts):
            arrays |= {f"{name}{k}": getattr(counts, name) for name in _STORED}
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "KneserNey":
        """Read what `save` wrote. Raises ValueError when the file is something else."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                head = json.loads(stored["head"].tobytes())
                words = stored["words"].tobytes().decode().split("\n")
                rows = range(head["order"])
                counts = [Counts(*(stored[f"{name}{k}"] for name in _STORED)) for k in rows]
        except (KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} holds no Kneser-Ney model of this package") from error
        model = cls(head["order"], head["given"])
        model.vocabulary, model._counts, model.thresholds = words, counts, head["thresholds"]
        model._ids = {word: i for i, word in enumerate(words)} | {"<UNK>": 0}
        model._estimate()
        return model

    def _estimate(self) -> None:
        self._adjusted, self.discounts = adjusted(self._counts), []
        super()._estimate()

    def _smooth(self, k, counts, kept, context, lower):
        count = self._adjusted[k]
        three = self._given[k] if self._given else discounts_of(_tallied(count, counts))
        self.discounts.append(tuple(float(d) for d in three))
        discount = np.array([0.0, *three])[np.minimum(count, 3)]
        discount = np.where(kept, discount, count)  # a pruned n-gram gives away all it has
        return kneser_ney(count, discount, context, len(lower), lower[counts.suffix])


_STORED = ("keys", "raw", "suffix", "starts", "last")


def _tallied(count: Array, counts: Counts) -> Array:
    """The counts that lmplz counts: adjusted, but the last n-gram's are its occurrences.

    That exception looks like an oversight. It moves counts of counts by one, which nobody sees
    on a corpus; it is kept so that discounts equal lmplz's on a page of text, too.
    """
    tallied = count.copy()
    if counts.last >= 0:
        tallied[counts.last] = counts.raw[counts.last]
    return tallied


def _text_array(value) -> Array:
    text = value if isinstance(value, str) else json.dumps(value)
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _check_discounts(discounts, order: int) -> list[tuple[float, ...]] | None:
    if discounts is None:
        return None
    if np.ndim(discounts) == 0:
        discounts = [(discounts,) * 3] * order
    rows = [tuple(float(d) for d in row) for row in discounts]
    if len(rows) != order or any(len(row) != 3 for row in rows):
        raise ValueError(
            f"discounts: one (D1, D2, D3+) for each of {order} orders, not {discounts}"
        )
    # A discount above the count it applies to would make a probability negative.
    if any(not 0 <= d <= c for row in rows for c, d in zip((1, 2, 3), row, strict=True)):
        raise ValueError(f"discounts must lie in 0..1, 0..2 and 0..3, not {discounts}")
    return rows
