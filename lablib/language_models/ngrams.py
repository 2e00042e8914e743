"""What every back-off model of n-grams shares, in arrays: counts, look-up, scores, ARPA files.

An n-gram is n words in a row; its first n - 1 are the context of its last. A back-off model keeps
a probability for each n-gram that was seen, and for each context a weight that it leaves to the
words never seen after it, whose probability is looked up after a context one word shorter.

An n-gram is the number of its row. Row g of order k is found by its key,
`row of its first k - 1 words * len(vocabulary) + its last word`; keys are sorted.
Every log-probability is a natural logarithm, except in ARPA files (base 10, by definition).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lablib.files import atomic_write
from lablib.language_models.vocabulary import Sentence, checked

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
_LN10 = math.log(10)


class Tokens(NamedTuple):
    """Sentences laid end to end, each between START and END."""

    words: np.ndarray  # (n,) int64
    place: np.ndarray  # (n,) int64, 0 at each START: how many words stand before in the sentence


@dataclass
class Counts:
    """What the corpus says about the n-grams of one order; one row an n-gram, sorted by key."""

    keys: np.ndarray
    raw: np.ndarray  # occurrences
    suffix: np.ndarray  # row, one order below, of the n-gram without its first word
    starts: np.ndarray  # bool: begins with START
    last: int = -1  # the row that sorts last when compared from its last word backwards


@dataclass
class Level:
    """What scoring needs to know about one order."""

    keys: np.ndarray
    logprob: np.ndarray
    backoff: np.ndarray  # log weight that this n-gram, as a context, leaves to the order below


class BackoffModel:
    """An n-gram model: `KneserNey(5).fit(sentences).perplexity(held_out)`.

    order: length of the longest n-grams, 1 or more. A subclass gives `_smooth`.

    Words outside the training text are `<unk>`. If the training text itself contains `<unk>`
    (or `<UNK>`, which ARPA readers take for the same word), it is counted like any other word.
    """

    def __init__(self, order: int):
        if not isinstance(order, int | np.integer) or order < 1:
            raise ValueError(f"order must be a whole number of at least 1, not {order!r}")
        self.order = int(order)
        self.thresholds = [0] * self.order
        self.vocabulary: list[str] = []

    def fit(self, sentences: Iterable[Sentence]) -> "BackoffModel":
        """Count and estimate. sentences: lists of words, without `<s>` and `</s>`.

        Raises ValueError when there is no sentence, or for a word that no n-gram file can hold;
        the model then is what it was before.
        """
        ids = {UNKNOWN: 0, START: 1, END: 2, "<UNK>": 0}
        tokens = tokenized(map(_countable, sentences), ids, grow=True)
        if not len(tokens.words):
            raise ValueError("no sentences to fit: give at least one list of words")
        self._ids, self.vocabulary = ids, [word for word in ids if word != "<UNK>"]
        self._counts = count(tokens, len(self.vocabulary), self.order)
        self.thresholds = [0] * self.order
        self._estimate()
        return self

    def prune(self, threshold: int | Sequence[int]) -> "BackoffModel":
        """Drop n-grams seen `threshold` times or fewer, and return the model itself.

        threshold: for every order above 1, or one an order, 0 first and never decreasing, as
        `lmplz --prune` takes them. It always refers to the fitted counts: prune(0) undoes it.
        """
        self._fitted()
        steps = [0, threshold] if np.ndim(threshold) == 0 else list(threshold)
        steps = (steps + steps[-1:] * self.order)[: self.order]
        if steps[0] != 0 or sorted(steps) != steps:
            raise ValueError(f"thresholds must start at 0 and never decrease, not {steps}")
        self.thresholds = steps
        self._estimate()
        return self

    def word_logprobs(self, sentences: Iterable[Sentence]) -> np.ndarray:
        """Log-probability of every word, sentence by sentence, each closed by its `</s>`."""
        return self._score(self._tokens(sentences))

    def logprob(self, sentence: Sentence) -> float:
        """Natural log-probability of a sentence, `</s>` included. Divide by ln 10 for kenlm's."""
        return float(self.word_logprobs([sentence]).sum())

    def perplexity(self, sentences: Iterable[Sentence], include_oov: bool = True) -> float:
        """exp of the mean negative log-probability per word, sentence ends counted.

        include_oov=False leaves words out that are `<unk>` to the model, from sum and count.
        Both are what kenlm's `query` prints. NaN when nothing is left to count.
        """
        tokens = self._tokens(sentences)
        logprobs = self._score(tokens)
        if not include_oov:
            logprobs = logprobs[tokens.words[tokens.place > 0] != 0]
        return float(np.exp(-logprobs.mean())) if len(logprobs) else float("nan")

    def distribution(self, context: Sentence) -> np.ndarray:
        """Probability of every next word in a sentence that begins with `context`.

        Returns (len(vocabulary),), in the order of `vocabulary`; `<s>` has probability 0.
        """
        self._fitted()
        words = [1, *_numbers(context, self._ids)]
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

    def _arpa_sections(self) -> Iterator[list[str]]:
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

    def _tokens(self, sentences: Iterable[Sentence]) -> Tokens:
        self._fitted()
        return tokenized(sentences, self._ids)

    def _smooth(
        self, k: int, counts: Counts, kept: np.ndarray, context: np.ndarray, lower: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probability of each n-gram of order k + 1, and the weight of each context.

        kept: (n,) bool, False for pruned n-grams. context: (n,) rows one order below. lower:
        (contexts,) probabilities of the order below. Returns (n,) and (contexts,).
        """
        raise NotImplementedError

    def _estimate(self) -> None:
        """Counts to probabilities, from single words up."""
        size = len(self.vocabulary)
        levels: list[Level] = []
        lower = np.full(1, 1.0 / (size - 1))  # any word but <s>, which is never predicted
        kept_below = np.ones(1, bool)
        for k, counts in enumerate(self._counts):
            kept = counts.raw > self.thresholds[k] if k else np.ones(size, bool)
            context, word = np.divmod(counts.keys, size)
            probs, weights = self._smooth(k, counts, kept, context, lower)
            if k == 0:
                probs[1] = 1.0  # log-probability 0 for <s>, which only ever is a context
            else:
                levels[-1].backoff = _log(weights[kept_below])
                context = (np.cumsum(kept_below) - 1)[context]  # rows are renumbered by pruning
            logprob = _log(np.minimum(probs[kept], 1.0))
            levels.append(Level((context * size + word)[kept], logprob, np.zeros(kept.sum())))
            lower, kept_below = probs, kept
        self._levels = levels

    def _rows(self, tokens: Tokens) -> list[np.ndarray]:
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

    def _score(self, tokens: Tokens) -> np.ndarray:
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


def tokenized(sentences: Iterable[Sentence], ids: dict[str, int], grow: bool = False) -> Tokens:
    """Words as numbers, 0 for those that `ids` lacks; grow: it is given them instead.

    A sentence's own `<s>` and `</s>` are words like others, and so unknown ones.
    """
    words: list[int] = []
    lengths = []
    for sentence in sentences:
        if grow:
            for word in sentence:
                ids.setdefault(word, len(ids) - 1)  # <UNK> shares a number
        words += [1, *_numbers(sentence, ids), 2]
        lengths.append(len(sentence) + 2)
    sizes = np.asarray(lengths, dtype=np.int64)
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)
    return Tokens(np.asarray(words, dtype=np.int64), np.arange(len(words)) - first)


def _numbers(sentence: Sentence, ids: dict[str, int]) -> list[int]:
    """Each word's number; only code sets the bounds of a sentence, so text can't name them."""
    return [0 if word in (START, END) else ids.get(word, 0) for word in checked(sentence)]


def _countable(sentence: Sentence) -> Sentence:
    """The sentence itself. Raises ValueError for a word that no n-gram file can hold."""
    for word in checked(sentence):
        if word.split() != [word]:
            raise ValueError(f"{word!r} is empty or contains whitespace: split it into words")
        if word in (START, END):
            raise ValueError(f"{word!r} marks sentence bounds; leave it out of the text")
    return sentence


def count(tokens: Tokens, size: int, order: int) -> list[Counts]:
    """Every n-gram of every order up to `order`, with its occurrences. size: of the vocabulary."""
    words, place = tokens
    raw = np.bincount(words, minlength=size)
    raw[1] = 0  # <s> is given, not predicted
    nowhere = np.zeros(size, dtype=np.int64)
    levels = [Counts(np.arange(size), raw, nowhere, np.arange(size) == 1)]
    end = _last_ngram(tokens, order)
    levels[0].last = words[end]
    row = words  # of the k-gram ending at each token
    for k in range(1, order):
        ends = np.flatnonzero(place >= k)
        keys = row[ends - 1] * size + words[ends]
        keys, first, number, raw = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        levels.append(Counts(keys, raw, row[ends[first]], place[ends[first]] == k))
        row = np.full(len(words), -1)
        row[ends] = number
        levels[-1].last = row[end]
    return levels


def _last_ngram(tokens: Tokens, order: int) -> int:
    """Where the n-gram ends that sorts last when compared from its last word backwards."""
    ends = np.flatnonzero(tokens.words == tokens.words.max())
    for back in range(1, order):
        before = np.where(tokens.place[ends] >= back, tokens.words[np.maximum(ends - back, 0)], 1)
        ends = ends[before == before.max()]
    return int(ends[0])


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # without discounts, nothing is left for the unseen
        return np.log(values)
