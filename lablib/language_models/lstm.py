"""A recurrent network over words: the challenger that leads the paper's Table 1.

Sentences stand alone, as in the paper: each begins with a fresh state.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lablib.language_models.vocabulary import Encoder, Sentence


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
        vectors = self.dropout(self.embedding(tokens.clamp(min=0)))  # (batch, length, width)
        states, _ = self.cell(vectors)  # (batch, length, hidden)
        return self.dropout(self.project(states))  # (batch, length, width)

    def logprobs(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """batch: (batch, length + 1), -1 where padded.

        Returns log-probabilities of the words that are not padding, row by row, and their places
        (batch, length) bool.
        """
        before, words = batch[:, :-1], batch[:, 1:]
        here = words >= 0
        found = self(before)[here].to(self.softmax.head.weight.dtype)
        with torch.autocast(batch.device.type, enabled=False):  # the softmax's parts mix dtypes
            return self.softmax(found, words[here]).output, here  # (n,)

    def loss(self, batch: Tensor) -> Tensor:
        """Mean negative log-probability of a batch's words, in nats."""
        return -self.logprobs(batch)[0].mean()

    @torch.no_grad()
    def word_logprobs(self, sentences: Sequence[Sentence], size: int = 4096) -> np.ndarray:
        """Log-probability of every word, sentence by sentence, each closed by its `</s>`."""
        self.eval()
        rows = [self.encode(sentence) for sentence in sentences]
        scored: list[np.ndarray] = [np.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            take = max(1, size // len(rows[order[-1]]))
            chosen, order = order[-take:], order[:-take]
            batch = _padded([rows[i] for i in chosen]).to(self.embedding.weight.device)
            logprobs, here = self.logprobs(batch)
            for i, row in zip(chosen, logprobs.split(here.sum(1).tolist()), strict=True):
                scored[i] = row.double().cpu().numpy()
        return np.concatenate([np.empty(0), *scored])

    @torch.no_grad()
    def distribution(self, context: Sentence) -> np.ndarray:
        """(len(vocabulary),) probability of each next word of a sentence that begins so."""
        self.eval()
        ids = torch.tensor([self.encode(context, end=False)], device=self.embedding.weight.device)
        return self.softmax.log_prob(self(ids)[:, -1])[0].double().exp().cpu().numpy()


class SentenceBatches:
    """Sentences of about equal length side by side, in new random order each time around.

    Iterating gives int64 tensors (batch, length + 1), padded with -1; the words that
    are predicted in each are about `size` at most.
    """

    def __init__(
        self, sentences: Iterable[Sentence], encode: Encoder, size: int = 1024, seed: int = 0
    ):
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
