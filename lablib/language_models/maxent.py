"""A maximum-entropy model of words: features of the context vote on the next word."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.language_models.vocabulary import Encoder, Sentence


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
        scored = [sum(p for p, _, _ in self._predict(*part)) for part in parts]
        return torch.cat(scored).double().numpy() if scored else np.empty(0)

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

    def _predict(self, hashes: Tensor, words: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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
