"""One Billion Word Benchmark (Chelba et al., 2013): a recipe for data, and models that combine.

Lab 101. Section 2 of the paper is the recipe, section 3 the models, section 5 their combination.
All models predict the same events, the vocabulary with `<UNK>` and `</s>`, and give a natural
log-probability for each of the same words, so that they can be interpolated word by word.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

UNKNOWN, END = "<UNK>", "</s>"
Sentence = Sequence[str]


class Benchmark(NamedTuple):
    """Training text, held-out shards and vocabulary. Words outside it are `<UNK>` everywhere."""

    train: list[list[str]]
    held_out: list[list[list[str]]]
    vocabulary: list[str]  # by count, most frequent first, after `<UNK>` and `</s>`
    oov_rate: float  # share of held-out words, sentence ends included, that became `<UNK>`


def benchmark(
    sentences: Iterable[Sentence],
    *,
    min_count: int = 3,
    shards: int = 100,
    held_out_shards: int = 2,
    train_words: int | None = None,
    seed: int = 0,
) -> Benchmark:
    """The recipe: drop repeated sentences, shuffle, hold out one shard of `shards`, cut the rest.

    min_count: words that the training text holds less often become `<UNK>` (the paper's 3).
    held_out_shards: into how many parts the held-out shard is cut (50 in the paper).
    train_words: keep no more training words than this, sentence ends included.
    Raises ValueError when there are too few sentences to fill every shard.
    Source: section 2.
    """
    unique = list(dict.fromkeys(map(tuple, sentences)))
    order = np.random.default_rng(seed).permutation(len(unique))
    size = len(unique) // shards
    if size < held_out_shards:
        raise ValueError(
            f"{len(unique)} different sentences can't fill {shards} shards, one of them in "
            f"{held_out_shards} parts; give more text or ask for fewer shards"
        )
    held_out = [unique[i] for i in order[:size]]
    train = [unique[i] for i in order[size:]]
    if train_words is not None:
        lengths = np.cumsum([len(sentence) + 1 for sentence in train])
        train = train[: int(np.searchsorted(lengths, train_words, side="right"))]
    vocabulary = vocabulary_by_count(train, min_count)
    mapped = map_unknown(held_out, vocabulary)
    words = sum(len(sentence) + 1 for sentence in mapped)
    unknown = sum(sentence.count(UNKNOWN) for sentence in mapped)
    parts = [mapped[i::held_out_shards] for i in range(held_out_shards)]
    return Benchmark(map_unknown(train, vocabulary), parts, vocabulary, unknown / words)


def vocabulary_by_count(sentences: Iterable[Sentence], min_count: int = 3) -> list[str]:
    """`<UNK>`, `</s>`, then every word seen at least min_count times, most frequent first."""
    counts = Counter(word for sentence in sentences for word in sentence)
    kept = [word for word, count in counts.most_common() if count >= min_count]
    return [UNKNOWN, END, *(word for word in kept if word not in (UNKNOWN, END))]


def map_unknown(sentences: Iterable[Sentence], vocabulary: Iterable[str]) -> list[list[str]]:
    """The sentences with `<UNK>` for every word outside the vocabulary."""
    known = set(vocabulary)
    return [[w if w in known else UNKNOWN for w in sentence] for sentence in sentences]


class Encoder:
    """Words to numbers and back. Number len(vocabulary) is the sentence start, never predicted."""

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = list(vocabulary)
        self.ids = {word: i for i, word in enumerate(vocabulary)}
        self.start = len(self.vocabulary)

    def __call__(self, sentence: Sentence, end: bool = True) -> list[int]:
        """The start, the words, and (unless this is a context) the end."""
        body = [self.ids.get(word, 0) for word in sentence]
        return [self.start, *body, *([self.ids[END]] if end else [])]


class SentenceBatches:
    """Sentences of about equal length side by side, in new random order each time around.

    Iterating gives int64 tensors (batch, length + 1), padded with -1; `words` predicted in each
    is at most about `size`.
    """

    def __init__(self, sentences: Iterable[Sentence], encode: Encoder, size=1024, seed=0):
        rows = sorted((encode(sentence) for sentence in sentences), key=len)
        self.batches, self.seed, self.epoch = [], seed, 0
        while rows:
            take = max(1, size // len(rows[-1]))
            chosen, rows = rows[-take:], rows[:-take]
            self.batches.append(_padded(chosen))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.batches))
        self.epoch += 1
        for i in order:
            yield self.batches[i]


def _padded(rows: Sequence[list[int]]) -> Tensor:
    rows = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


class LSTM(nn.Module):
    """A word-level LSTM whose output layer spends its width on frequent words.

    vocabulary: words by frequency, as `vocabulary_by_count` gives them.
    width: of embeddings and of the projection before the softmax; hidden: of the cell.
    The adaptive softmax (Grave et al., 2017) predicts the frequent head, and clusters of rarer
    words through ever narrower projections, so a word costs far less than len(vocabulary).
    """

    def __init__(self, vocabulary: Sequence[str], width=128, hidden=256, dropout=0.2):
        super().__init__()
        self.encode = Encoder(vocabulary)
        size = len(vocabulary)
        self.embedding = nn.Embedding(size + 1, width)
        self.cell = nn.LSTM(width, hidden, batch_first=True)
        self.project = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        cutoffs = [c for c in (max(1, size // 10), max(2, size // 3)) if c < size]
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(width, size, sorted(set(cutoffs)), 2.0)
        nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (batch, length) int64. Returns what predicts the next: (batch, length, width)."""
        states, _ = self.cell(self.dropout(self.embedding(tokens.clamp(min=0))))
        return self.dropout(self.project(states))

    def logprobs(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """batch: (batch, length + 1), -1 where padded.

        Returns log-probabilities of the words that are not padding, row by row, and their places
        (batch, length) bool.
        """
        here = batch[:, 1:] >= 0
        return self.softmax(self(batch[:, :-1])[here], batch[:, 1:][here]).output, here

    def loss(self, batch: Tensor) -> Tensor:
        """Mean negative log-probability of a batch's words, in nats."""
        return -self.logprobs(batch)[0].mean()

    @torch.no_grad()
    def word_logprobs(self, sentences: Sequence[Sentence], size: int = 4096) -> np.ndarray:
        """Log-probability of every word, sentence by sentence, each closed by its `</s>`."""
        self.eval()
        found: list[np.ndarray] = [np.empty(0)] * len(sentences)
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        while order:
            take = max(1, size // (len(sentences[order[-1]]) + 1))
            chosen, order = order[-take:], order[:-take]
            batch = _padded([self.encode(sentences[i]) for i in chosen])
            logprobs, here = self.logprobs(batch.to(self.embedding.weight.device))
            for i, row in zip(chosen, logprobs.split(here.sum(1).tolist()), strict=True):
                found[i] = row.double().cpu().numpy()
        return np.concatenate([np.empty(0), *found])

    @torch.no_grad()
    def distribution(self, context: Sentence) -> np.ndarray:
        """(len(vocabulary),) probability of each next word of a sentence that begins so."""
        self.eval()
        ids = torch.tensor([self.encode(context, end=False)], device=self.embedding.weight.device)
        return self.softmax.log_prob(self(ids)[:, -1])[0].double().exp().cpu().numpy()


class MaxEnt:
    """A maximum-entropy n-gram model with hashed features and a two-step softmax.

    P(word | context) = P(class | context) P(word | class, context), where every context of 1 to
    order - 1 words is a feature that votes on each outcome with a weight of its own:
    P(outcome) ~ exp(bias + sum of weights). Weights sit in rows that a hash of the context picks,
    `2 ** bits` of them; contexts that collide share a row (Mikolov et al., 2011).
    Classes are runs of sqrt(len(vocabulary)) words of similar frequency. skips: so many of the
    words before the last are features by themselves, too: they see past a word that varies.

    Source: sections 3.2 and 3.3, "Hierarchical Softmax MaxEnt 4-gram" of Table 1.
    """

    def __init__(self, vocabulary: Sequence[str], order=4, skips=2, bits=17, seed=0):
        self.encode, self.order, self.skips, self.rows = Encoder(vocabulary), order, skips, 2**bits
        self.features = order - 1 + skips
        self.width = math.isqrt(len(vocabulary) - 1) + 1  # width * width >= len(vocabulary)
        self.weights = torch.zeros(2, self.rows, self.width)  # of classes, of words in a class
        self._squares = torch.full_like(self.weights, 1e-2)  # Adagrad's sums
        self.seed = seed

    def fit(
        self, sentences: Sequence[Sentence], *, epochs=2, lr=0.15, decay=1e-3, size=1024
    ) -> "MaxEnt":
        """Adagrad, step by step. decay: pull of every active weight toward 0 at each use."""
        contexts, words = self._examples(sentences)
        self._set_bias(words)
        shuffle = torch.Generator().manual_seed(self.seed)
        for _ in range(epochs):
            for chosen in torch.randperm(len(words), generator=shuffle).split(size):
                self._step(contexts[chosen], words[chosen], lr, decay)
        return self

    def word_logprobs(self, sentences: Sequence[Sentence], size: int = 8192) -> np.ndarray:
        """Log-probability of every word, sentence by sentence, each closed by its `</s>`."""
        contexts, words = self._examples(sentences)
        parts = zip(contexts.split(size), words.split(size), strict=True)
        found = [sum(p for p, _, _ in self._predict(*part)) for part in parts]
        return torch.cat(found).double().numpy() if found else np.empty(0)

    def distribution(self, context: Sentence) -> np.ndarray:
        """(len(vocabulary),) probability of each next word of a sentence that begins so."""
        ids = self.encode(context, end=False)
        padded = torch.tensor([[self.encode.start] * self.order + ids])
        hashes = self._hashes(padded)[:, -1]
        classes = self._logits(0, hashes).log_softmax(-1)[0]
        every = torch.arange(self.width)
        inside = self._logits(1, hashes.expand(self.width, -1), every).log_softmax(-1)
        probs = (classes[:, None] + inside).exp().flatten()
        return probs[: len(self.encode.vocabulary)].double().numpy()

    def _examples(self, sentences: Sequence[Sentence]) -> tuple[Tensor, Tensor]:
        """Hashes of the contexts before each word (n, order - 1), and the words (n,)."""
        rows = [self.encode(sentence) for sentence in sentences]
        front = [self.encode.start] * (self.order - 1)  # a sentence start hides what is before it
        flat = torch.tensor([i for row in rows for i in front + row], dtype=torch.int64)
        hashes = self._hashes(flat[None])[0]
        ends = torch.arange(1, len(flat))
        ends = ends[flat[1:] != self.encode.start]
        return hashes[ends - 1], flat[ends]

    def _hashes(self, ids: Tensor) -> Tensor:
        """ids: (batch, length). Returns (batch, length, order - 1): of the last 1, 2, ... words."""
        made, mixed = [], torch.zeros_like(ids)
        for back in range(self.order - 1):
            word = torch.roll(ids, back, 1)
            mixed = (mixed + word + 1) * 0x2545F4914F6CDD1D  # wraps around, as hashes may
            mixed = mixed ^ (mixed >> 29)
            made.append(mixed + back)
        for back in range(1, self.skips + 1):
            word = torch.roll(ids, back, 1)
            mixed = (word + 1) * 0x5DEECE66D1CE4E5B
            made.append((mixed ^ (mixed >> 29)) - back)
        return torch.stack(made, -1)

    def _slots(self, hashes: Tensor, classes: Tensor | None) -> Tensor:
        if classes is not None:
            hashes = (hashes + classes[:, None] + 1) * 0x5851F42D4C957F2D
            hashes = hashes ^ (hashes >> 31)
        return (hashes >> 8) & (self.rows - 1)

    def _logits(self, step: int, hashes: Tensor, classes: Tensor | None = None) -> Tensor:
        slots = self._slots(hashes, classes)
        bias = self._bias[0] if step == 0 else self._bias[1][classes]
        return bias + F.embedding_bag(slots, self.weights[step], mode="sum")

    def _predict(self, hashes: Tensor, words: Tensor):
        """For class, then word: log-probability (n,), all probabilities (n, width), target."""
        classes = words // self.width
        for step, target in ((0, classes), (1, words % self.width)):
            logits = self._logits(step, hashes, classes if step else None).log_softmax(-1)
            yield logits.gather(1, target[:, None])[:, 0], logits, target

    def _step(self, hashes: Tensor, words: Tensor, lr: float, decay: float) -> None:
        """One step of Adagrad; d(-log p)/d(logit) is the probability less 1 for what came."""
        classes = words // self.width
        for step, (_, logits, target) in enumerate(self._predict(hashes, words)):
            error = logits.exp()
            error[torch.arange(len(target)), target] -= 1
            slots = self._slots(hashes, classes if step else None).flatten()
            error = error.repeat_interleave(self.features, 0)
            weights, squares = self.weights[step], self._squares[step]
            error += decay * weights[slots]
            squares.index_add_(0, slots, error**2)
            weights.index_add_(0, slots, error / squares[slots].sqrt(), alpha=-lr)

    def _set_bias(self, words: Tensor) -> None:
        """Start from frequencies; slots beyond the vocabulary are impossible."""
        size = len(self.encode.vocabulary)
        counts = torch.zeros(self.width**2)
        counts[:size] = torch.bincount(words, minlength=size) + 0.01
        counts = counts.view(self.width, self.width)
        total = counts.sum(1, keepdim=True)
        inside = torch.where(total > 0, counts / total, 1 / self.width)  # a class of nothing
        self._bias = [total[:, 0].log(), inside.log()]


def mixture(logprobs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log-probability of each word under the interpolated model.

    logprobs: (models, words), natural logarithms; weights: (models,), summing to 1.
    Returns (words,).
    """
    logprobs, weights = np.asarray(logprobs), np.asarray(weights, dtype=float)
    if logprobs.ndim != 2 or weights.shape != logprobs.shape[:1]:
        raise ValueError(f"weights {weights.shape} do not fit log-probs {logprobs.shape}")
    top = logprobs.max(0)
    return top + np.log(weights @ np.exp(logprobs - top))


def em_weights(logprobs: np.ndarray, steps: int = 1000, tolerance: float = 1e-12) -> np.ndarray:
    """Interpolation weights that make held-out words most probable, by EM from equal weights.

    logprobs: (models, words). Returns (models,), non-negative, summing to 1. The likelihood is
    concave in the weights, so where EM settles is the best there is.
    Raises ValueError when a word is impossible under every model.
    """
    logprobs = np.asarray(logprobs, dtype=float)
    if logprobs.ndim != 2 or not logprobs.size:
        raise ValueError(f"logprobs must be (models, words), not of shape {logprobs.shape}")
    if not np.isfinite(logprobs.max(0)).all():
        raise ValueError("a held-out word has probability 0 under every model: smooth one of them")
    probs = np.exp(logprobs - logprobs.max(0))
    weights = np.full(len(probs), 1 / len(probs))
    for _ in range(steps):
        share = weights[:, None] * probs  # E: which model each word is owed to
        updated = (share / share.sum(0)).mean(1)  # M: the mean share
        done, weights = np.abs(updated - weights).max() < tolerance, updated
        if done:
            break
    return weights


def perplexity(logprobs: np.ndarray) -> float:
    """exp of the mean negative log-probability."""
    return float(np.exp(-np.mean(logprobs)))
