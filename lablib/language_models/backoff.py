"""Katz's back-off and Stupid Backoff: the two other ways to smooth counts in the paper's Table 1.

Both keep the relative frequency of an n-gram that was seen. For a word never seen after its
context they ask a context one word shorter; they differ in how much they leave for that.
"""

import numpy as np

from lablib.language_models.ngrams import BackoffModel, Counts

Array = np.ndarray


def katz(
    count: Array, left: Array, context: Array, contexts: int, lower: Array
) -> tuple[Array, Array]:
    """P(w | c) of n-grams cw of one order, from that of one word less, P(w | c').

    count, left: (n,) f(cw) and what Good and Turing's discount leaves of it, d f(cw). context: (n,)
    which of the `contexts` contexts c is. lower: (n,) P(w | c').
    Returns P(w | c), (n,), and alpha(c), (contexts,), the weight of P(w | c') for unseen words.
    Source: Katz, "Estimation of probabilities from sparse data" (1987).
    """
    total = np.bincount(context, count, contexts)  # f(c): (contexts,)
    kept = np.bincount(context, left, contexts)
    total = total + ((kept > total - 1e-9) & (total > 0))  # something must remain for the unseen
    probs = left / np.maximum(total, 1)[context]  # d f(cw) / f(c): (n,)
    seen, seen_below = (np.bincount(context, p, contexts) for p in (probs, lower))
    room = 1 - seen_below  # what the shorter context gives to words unseen here: (contexts,)
    full = room < 1e-9  # every word was seen here, so nothing has to remain
    alpha = np.where(full, 0.0, (1 - seen) / np.where(full, 1.0, room))
    return np.where(full[context], probs / np.maximum(seen, 1e-30)[context], probs), alpha


def good_turing(count: Array, highest: int = 5) -> Array:
    """What remains of each count: d f, with d below 1 for counts of 1 to `highest`.

    d_r = (r* / r - q) / (1 - q), with r* = (r + 1) n[r + 1] / n[r], q = (highest + 1)
    n[highest + 1] / n[1], and n[r] the number of n-grams that were seen r times.
    Where the few n-grams of a small text put d outside (0, 1), that count keeps all.
    """
    n = np.bincount(np.minimum(count, highest + 2), minlength=highest + 3).astype(float)
    r = np.arange(1, highest + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = (highest + 1) * n[highest + 1] / n[1]
        d = ((r + 1) * n[r + 1] / (r * n[r]) - q) / (1 - q)
    d = np.where((d > 0) & (d < 1), d, 1.0)
    return count * np.array([1.0, *d, 1.0])[np.minimum(count, highest + 1)]


def stupid_backoff(
    count: Array, context: Array, lower: Array, below: Array, factor: float = 0.4
) -> tuple[Array, Array, Array]:
    """S(w | c) = f(cw) / f(c) where cw was seen, else factor S(w | c'); divided by its sum.

    count: (n,) f(cw). context: (n,) which context c is. lower: (n,) S(w | c') over its sum. below:
    (contexts,) that sum of each c'.
    Returns P(w | c), (n,); the weight of P(w | c') for unseen words, and the sum over all words of
    S(w | c), (contexts,). Without that division the scores of a context sum to more than 1, and
    have no perplexity.
    Source: Brants et al., "Large language models in machine translation" (2007), equation 5.
    """
    contexts = len(below)
    total = np.bincount(context, count, contexts)  # f(c): (contexts,)
    scores = count / np.maximum(total, 1)[context]  # (n,)
    # What the shorter context gives to words unseen here: (contexts,)
    room = 1 - np.bincount(context, np.where(count > 0, lower, 0), contexts)
    sums = (total > 0) + factor * below * room  # (contexts,)
    return scores / sums[context], factor * below / sums, sums


class Katz(BackoffModel):
    """`Katz(5).fit(sentences).perplexity(held_out)`; single words have their relative frequency.

    highest: the largest count that is discounted.
    """

    def __init__(self, order: int, highest: int = 5):
        super().__init__(order)
        self.highest = highest

    def _smooth(self, k, counts, kept, context, lower):
        if k == 0:
            return frequencies(counts), np.ones(1)
        left = np.where(kept, good_turing(counts.raw, self.highest), 0.0)
        below = np.where(kept, lower[counts.suffix], 0.0)
        probs, alpha = katz(counts.raw, left, context, len(lower), below)
        return np.where(kept, probs, alpha[context] * lower[counts.suffix]), alpha


class StupidBackoff(BackoffModel):
    """`StupidBackoff(5).fit(sentences).perplexity(held_out)`, its scores made probabilities.

    factor: of each step to a shorter context, 0.4 as Brants et al. have it.
    """

    def __init__(self, order: int, factor: float = 0.4):
        super().__init__(order)
        if not factor > 0:
            raise ValueError(f"factor must be above 0, not {factor}")
        self.factor = factor

    def _smooth(self, k, counts, kept, context, lower):
        if k == 0:
            self._sums = np.ones(1)
            return frequencies(counts), np.ones(1)
        # As a context, each n-gram of the order below is asked after its own shorter context.
        below = self._sums[self._counts[k - 1].suffix] if k > 1 else np.ones(len(lower))
        under = lower[counts.suffix]
        seen = np.where(kept, counts.raw, 0)
        probs, weight, self._sums = stupid_backoff(seen, context, under, below, self.factor)
        return np.where(kept, probs, weight[context] * under), weight


def frequencies(counts: Counts) -> Array:
    """(words,) share of each word in the text; `<unk>` counts as seen once where it was not."""
    raw = counts.raw.astype(float)
    raw[0] = max(raw[0], 1.0)
    return raw / raw.sum()
