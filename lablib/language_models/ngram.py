"""Interpolated modified Kneser-Ney n-gram models in arrays.

The estimate is Chen and Goodman's (1999), discounts by their equation 26, as kenlm's `lmplz`
computes it (Heafield et al., 2013), so perplexities can be compared with published ones.

An n-gram is the number of its row. Row g of order k is found by its key,
`row of its first k - 1 words * len(vocabulary) + its last word`; keys are sorted.
Every log-probability is a natural logarithm, except in ARPA files (base 10, by definition).
"""

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lablib.files import atomic_write

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
FALLBACK = (0.5, 1.0, 1.5)  # lmplz --discount_fallback, where counts of counts are degenerate
_LN10 = math.log(10)


class _Tokens(NamedTuple):
    """Sentences laid end to end, each between START and END."""

    words: np.ndarray  # (n,) int64
    place: np.ndarray  # (n,) int64, 0 at each START: how many words stand before in the sentence


@dataclass
class _Counts:
    """What the corpus says about the n-grams of one order; one row an n-gram, sorted by key."""

    keys: np.ndarray
    raw: np.ndarray  # occurrences
    suffix: np.ndarray  # row, one order below, of the n-gram without its first word
    starts: np.ndarray  # bool: begins with START
    last: int = -1  # the row that sorts last when compared from its last word backwards
    adjusted: np.ndarray | None = None  # Kneser-Ney's count


@dataclass
class _Level:
    """What scoring needs to know about one order."""

    keys: np.ndarray
    logprob: np.ndarray
    backoff: np.ndarray  # log weight that this n-gram, as a context, leaves to the order below


class KneserNey:
    """An n-gram model: `KneserNey(5).fit(sentences).perplexity(held_out)`.

    order: length of the longest n-grams, 1 or more.
    discounts: None estimates D1, D2, D3+ for each order from counts of counts; one number is
    used for every count and order; a list gives (D1, D2, D3+) for each order, 1-grams first.

    Words outside the training text are `<unk>`. If the training text itself contains `<unk>`
    (or `<UNK>`, which ARPA readers take for the same word), it is counted like any other word.
    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling".
    """

    def __init__(self, order: int, discounts: float | Sequence[Sequence[float]] | None = None):
        if not isinstance(order, int | np.integer) or order < 1:
            raise ValueError(f"order must be a whole number of at least 1, not {order!r}")
        self.order = int(order)
        self._given = _check_discounts(discounts, self.order)
        self._thresholds = [0] * self.order
        self.vocabulary: list[str] = []
        self.discounts: list[tuple[float, float, float]] = []

    def fit(self, sentences: Iterable[Sequence[str]]) -> "KneserNey":
        """Count and estimate. sentences: lists of words, without `<s>` and `</s>`.

        Raises ValueError when there is no sentence, or for a word that no n-gram file can hold.
        """
        self._ids = {UNKNOWN: 0, START: 1, END: 2, "<UNK>": 0}
        self._thresholds = [0] * self.order
        tokens = self._encode(sentences, grow=True)
        if not len(tokens.words):
            raise ValueError("no sentences to fit: give at least one list of words")
        self.vocabulary = [word for word in self._ids if word != "<UNK>"]
        self._counts = _count(tokens, len(self.vocabulary), self.order)
        self._estimate()
        return self

    def prune(self, threshold: int | Sequence[int]) -> "KneserNey":
        """Drop n-grams seen `threshold` times or fewer, and return the model itself.

        threshold: for every order above 1, or one an order, 0 first and never decreasing, as
        `lmplz --prune` takes them. It always refers to the fitted counts: prune(0) undoes it.
        """
        self._fitted()
        steps = [threshold] if np.ndim(threshold) == 0 else list(threshold)
        steps = [0, *steps] if np.ndim(threshold) == 0 else steps
        steps = (steps + steps[-1:] * self.order)[: self.order]
        if steps[0] != 0 or sorted(steps) != steps:
            raise ValueError(f"thresholds must start at 0 and never decrease, not {steps}")
        self._thresholds = steps
        self._estimate()
        return self

    def with_discounts(self, discounts: float | Sequence[Sequence[float]] | None) -> "KneserNey":
        """The same counts under other discounts: a new model that shares the count arrays."""
        self._fitted()
        other = KneserNey(self.order, discounts)
        other.__dict__.update(vocabulary=self.vocabulary, _ids=self._ids, _counts=self._counts)
        other._thresholds = list(self._thresholds)
        other._estimate()
        return other

    def word_logprobs(self, sentences: Iterable[Sequence[str]]) -> np.ndarray:
        """Log-probability of every word, sentence by sentence, each closed by its `</s>`."""
        return self._score(self._tokens(sentences))

    def logprob(self, sentence: Sequence[str]) -> float:
        """Natural log-probability of a sentence, `</s>` included. Divide by ln 10 for kenlm's."""
        return float(self.word_logprobs([sentence]).sum())

    def perplexity(self, sentences: Iterable[Sequence[str]], include_oov: bool = True) -> float:
        """exp of the mean negative log-probability per word, sentence ends counted.

        include_oov=False leaves words out that are `<unk>` to the model, from sum and count.
        Both are what kenlm's `query` prints. NaN when nothing is left to count.
        """
        tokens = self._tokens(sentences)
        logprobs = self._score(tokens)
        if not include_oov:
            logprobs = logprobs[tokens.words[tokens.place > 0] != 0]
        return float(np.exp(-logprobs.mean())) if len(logprobs) else float("nan")

    def distribution(self, context: Sequence[str]) -> np.ndarray:
        """Probability of every next word in a sentence that begins with `context`.

        Returns (len(vocabulary),), in the order of `vocabulary`; `<s>` has probability 0.
        """
        self._fitted()
        words = [1, *(self._ids.get(word, 0) for word in context)]
        probs = np.exp(self._levels[0].logprob)
        probs[1] = 0.0
        for k in range(1, min(self.order, len(words) + 1)):
            row = self._find(words[-k:])
            if row is None:
                break  # a longer context contains this one
            level, size = self._levels[k], len(self.vocabulary)
            low, high = np.searchsorted(level.keys, [row * size, (row + 1) * size])
            probs *= np.exp(self._levels[k - 1].backoff[row])
            probs[level.keys[low:high] % size] = np.exp(level.logprob[low:high])
        return probs

    def save(self, path: str | Path) -> None:
        """Write counts, vocabulary and settings to one .npz file (arrays only, no pickle)."""
        self._fitted()
        head = {"order": self.order, "given": self._given, "thresholds": self._thresholds}
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
                counts = [_Counts(*(stored[f"{name}{k}"] for name in _STORED)) for k in rows]
        except (KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} holds no Kneser-Ney model of this package") from error
        model = cls(head["order"], head["given"])
        model.vocabulary, model._counts, model._thresholds = words, counts, head["thresholds"]
        model._ids = {word: i for i, word in enumerate(words)} | {"<UNK>": 0}
        _adjust(counts)
        model._estimate()
        return model

    def write_arpa(self, path: str | Path) -> None:
        """Write the model in the ARPA format that kenlm and SRILM read (logarithms base 10)."""
        self._fitted()
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write("\\data\\\n")
            for k, level in enumerate(self._levels, 1):
                file.write(f"ngram {k}={len(level.keys)}\n")
            for k, lines in enumerate(self._arpa_sections(), 1):
                file.write(f"\n\\{k}-grams:\n" + "\n".join(lines) + "\n")
            file.write("\n\\end\\\n")

    def _arpa_sections(self):
        size, texts = len(self.vocabulary), [""]
        for k, level in enumerate(self._levels, 1):
            prefix, last = np.divmod(level.keys, size)
            before = [texts[row] + " " for row in prefix.tolist()] if k > 1 else [""] * size
            words = self.vocabulary
            texts = [b + words[w] for b, w in zip(before, last.tolist(), strict=True)]
            logprobs = np.maximum(level.logprob / _LN10, -99).tolist()  # no infinity in ARPA
            if k == self.order:
                yield [f"{p:.7g}\t{t}" for p, t in zip(logprobs, texts, strict=True)]
            else:
                weights = np.maximum(level.backoff / _LN10, -99).tolist()
                rows = zip(logprobs, texts, weights, strict=True)
                yield [f"{p:.7g}\t{t}\t{b:.7g}" for p, t, b in rows]

    def _fitted(self) -> None:
        if not self.vocabulary:
            raise RuntimeError("this model has counted nothing yet: call fit(sentences) first")

    def _tokens(self, sentences: Iterable[Sequence[str]]) -> _Tokens:
        self._fitted()
        return self._encode(sentences, grow=False)

    def _encode(self, sentences: Iterable[Sequence[str]], grow: bool) -> _Tokens:
        ids, words, lengths = self._ids, [], []
        for sentence in sentences:
            if isinstance(sentence, str):
                raise ValueError(f"a sentence is a list of words, not the string {sentence!r:.60}")
            if grow:
                for word in sentence:
                    if word not in ids:
                        ids[_check_word(word)] = len(ids) - 1  # <UNK> shares a number
                    elif ids[word] in (1, 2):
                        raise ValueError(
                            f"{word!r} marks sentence bounds; leave it out of the text"
                        )
            words += [1, *[ids.get(word, 0) for word in sentence], 2]
            lengths.append(len(sentence) + 2)
        sizes = np.asarray(lengths, dtype=np.int64)
        first = np.repeat(np.cumsum(sizes) - sizes, sizes)
        return _Tokens(np.asarray(words, dtype=np.int64), np.arange(len(words)) - first)

    def _estimate(self) -> None:
        """Counts to probabilities, from single words up."""
        self.discounts, self._levels, kept_below = [], [], None
        uniform = 1.0 / (len(self.vocabulary) - 1)  # <s> is never predicted
        lower = np.full(1, uniform)
        for k, counts in enumerate(self._counts):
            discounts = self._given[k] if self._given else _discounts(_tallied(counts))
            kept = counts.raw > self._thresholds[k] if k else np.ones(len(counts.raw), bool)
            context = counts.keys // len(self.vocabulary)
            contexts = len(lower) if k else 1
            share, gamma = _discounted(counts.adjusted, context, contexts, discounts, kept)
            probs = share + gamma[context] * lower[counts.suffix]
            if k == 0:
                probs[1] = 1.0  # log-probability 0 for <s>, which only ever is a context
            keys = counts.keys
            if k:
                self._levels[-1].backoff = _log(gamma[kept_below])
                renumbered = np.cumsum(kept_below) - 1
                keys = renumbered[context] * len(self.vocabulary) + keys % len(self.vocabulary)
            logprobs = _log(np.minimum(probs[kept], 1.0))
            self._levels.append(_Level(keys[kept], logprobs, np.zeros(kept.sum())))
            self.discounts.append(tuple(float(d) for d in discounts))
            lower, kept_below = probs, kept

    def _rows(self, tokens: _Tokens) -> list[np.ndarray]:
        """For each order k, the row of the k-gram that ends at each token, -1 where unknown."""
        rows = [tokens.words]
        for k in range(1, self.order):
            before = np.concatenate([[-1], rows[-1][:-1]])
            before[tokens.place < k] = -1  # would reach into the sentence before
            wanted = before * len(self.vocabulary) + tokens.words
            keys = self._levels[k].keys
            row = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
            known = (before >= 0) & (keys[row] == wanted) if len(keys) else np.zeros(len(row), bool)
            rows.append(np.where(known, row, -1))
        return rows

    def _score(self, tokens: _Tokens) -> np.ndarray:
        """(n,) log-probability of each token that isn't START."""
        rows = self._rows(tokens)
        logprobs = self._levels[0].logprob[rows[0]]
        for k in range(1, self.order):
            level, context = self._levels[k - 1], np.concatenate([[-1], rows[k - 1][:-1]])
            context[tokens.place < k] = -1
            inside = np.flatnonzero(context >= 0)
            logprobs[inside] += level.backoff[context[inside]]
            known = rows[k] >= 0
            logprobs[known] = self._levels[k].logprob[rows[k][known]]
        return logprobs[tokens.place > 0]

    def _find(self, words: Sequence[int]) -> int | None:
        row = words[0]
        for level, word in zip(self._levels[1:], words[1:], strict=False):
            key = row * len(self.vocabulary) + word
            row = int(np.searchsorted(level.keys, key))
            if row == len(level.keys) or level.keys[row] != key:
                return None
        return row


_STORED = ("keys", "raw", "suffix", "starts", "last")


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # without discounts, nothing is left for the unseen
        return np.log(values)


def _text_array(value) -> np.ndarray:
    text = value if isinstance(value, str) else json.dumps(value)
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _check_word(word: str) -> str:
    if not isinstance(word, str):
        raise ValueError(f"words must be strings, not {word!r}")
    if word.split() != [word]:
        raise ValueError(f"{word!r} is empty or contains whitespace: split it into words")
    return word


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


def _count(tokens: _Tokens, size: int, order: int) -> list[_Counts]:
    """Every n-gram of every order up to `order`, with its occurrences."""
    words, place = tokens
    raw = np.bincount(words, minlength=size)
    raw[1] = 0  # <s> is given, not predicted
    nowhere = np.zeros(size, dtype=np.int64)
    levels = [_Counts(np.arange(size), raw, nowhere, np.arange(size) == 1)]
    end = _last_ngram(tokens, order)
    levels[0].last = words[end]
    row = words  # of the k-gram ending at each token
    for k in range(1, order):
        ends = np.flatnonzero(place >= k)
        keys = row[ends - 1] * size + words[ends]
        keys, first, number, raw = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        levels.append(_Counts(keys, raw, row[ends[first]], place[ends[first]] == k))
        row = np.full(len(words), -1)
        row[ends] = number
        levels[-1].last = row[end]
    _adjust(levels)
    return levels


def _last_ngram(tokens: _Tokens, order: int) -> int:
    """Where the n-gram ends that sorts last when compared from its last word backwards."""
    ends = np.flatnonzero(tokens.words == tokens.words.max())
    for back in range(1, order):
        before = np.where(tokens.place[ends] >= back, tokens.words[np.maximum(ends - back, 0)], 1)
        ends = ends[before == before.max()]
    return int(ends[0])


def _adjust(levels: list[_Counts]) -> None:
    """Kneser-Ney's counts: different words before it, or occurrences where none can stand before.

    Those are the n-grams of the highest order and the ones that begin a sentence.
    """
    for counts, above in itertools.pairwise(levels):
        variety = np.bincount(above.suffix, minlength=len(counts.raw))
        counts.adjusted = np.where(counts.starts, counts.raw, variety)
    levels[-1].adjusted = levels[-1].raw


def _tallied(counts: _Counts) -> np.ndarray:
    """The counts that lmplz counts: adjusted, but the last n-gram's are its occurrences.

    That exception looks like an oversight. It moves counts of counts by one, which nobody sees
    on a corpus; it is kept so that discounts equal lmplz's on a page of text, too.
    """
    tallied = counts.adjusted.copy()
    if counts.last >= 0:
        tallied[counts.last] = counts.raw[counts.last]
    return tallied


def _discounts(adjusted: np.ndarray) -> tuple[float, float, float]:
    """D1, D2, D3+ from how many n-grams have count 1, 2, 3, 4 (Chen and Goodman, eq. 26)."""
    n = np.bincount(np.minimum(adjusted, 5), minlength=6).astype(float)
    if not n[1:4].all():
        return FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    values = tuple(c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3))
    return values if all(0 <= d <= c for c, d in zip((1, 2, 3), values, strict=True)) else FALLBACK


def _discounted(adjusted, context, contexts: int, discounts, kept):
    """Each n-gram's own share, and what each context leaves to the order below.

    Returns (rows,) shares and (contexts,) weights gamma; 1 for what is no context.
    """
    discount = np.array([0.0, *discounts])[np.minimum(adjusted, 3)]
    total = np.bincount(context, adjusted, contexts)
    freed = np.bincount(context, np.where(kept, discount, adjusted), contexts)
    safe = np.maximum(total, 1)
    gamma = np.where(total > 0, freed / safe, 1.0)
    share = (adjusted - discount) / safe[context]
    return np.where(kept, share, 0.0), gamma
