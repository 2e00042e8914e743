"""c-BTM (Gururangan et al., 2023): a language model for each cluster of a corpus, never joined.

Lab 308. Cluster-Branch-Train-Merge: divide a corpus by content (`lablib.experts.clusters`), copy a
seed model for each cluster, train each copy on its cluster alone, and mix what they predict. The
mixture is section 2.2: how near a text is to a cluster says how much that expert is asked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.data.batches import Batches
from lablib.data.mixtures import Mixture
from lablib.experts.clusters import TextEmbedding, fit_embedding
from lablib.models import anatomy
from lablib.modes import kept_modes
from lablib.training import fit


def expert_weights(
    squared_distances: Tensor, temperature: float = 0.1, top_k: int | None = None
) -> Tensor:
    """How much each expert is asked about a text: (rows, experts), rows sum to 1.

    squared_distances: (rows, experts), of the text so far to each cluster's center.
    temperature: T; near 0 only the nearest expert is asked, far above 1 all alike. 0.1 is what the
    paper's code evaluates with. top_k: how many are asked at most; None asks all.
    """
    # p(D = j | x_<t) is proportional to exp(-dist(x_<t, c_j)^2 / T)
    p = (-squared_distances / temperature).softmax(-1)  # (rows, experts)
    if top_k is None or top_k >= p.shape[-1]:
        return p
    # ... for the k largest, and 0 for the others.
    largest, asked = p.topk(top_k, dim=-1)  # (rows, top_k)
    return torch.zeros_like(p).scatter(-1, asked, largest / largest.sum(-1, keepdim=True))


class SparseEnsemble(nn.Module):
    """Experts that are asked only where they have weight, their probabilities mixed.

    experts: language models over one vocabulary, tokens (rows, length) -> logits.
    """

    def __init__(self, experts: Iterable[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """tokens (rows, length), weights (rows, experts) -> log p (rows, length, vocab).

        Probabilities are mixed, not their logarithms: the ensemble is one model, with a perplexity.
        """
        parts = []
        for j, expert in enumerate(self.experts):
            rows = weights[:, j].nonzero()[:, 0]  # (asked,): who is not asked costs nothing
            if len(rows):
                # p(x_t | x_<t, D = j) p(D = j | x_<t)
                p = anatomy.logits(expert, tokens[rows]).softmax(-1)  # (asked, length, vocab)
                share = weights[rows, j, None, None] * p
                parts.append(p.new_zeros(len(tokens), *p.shape[1:]).index_copy(0, rows, share))
        # p(x_t | x_<t) is the sum over j.
        return torch.stack(parts).sum(0).log()


class Job(NamedTuple):
    """One expert's training: what a worker gets, and all that it needs."""

    seed_model: nn.Module
    tokens: np.ndarray
    options: dict[str, Any]


def train_expert(job: Job) -> nn.Module:
    """A copy of the seed model, trained on its own cluster. It hears of no other expert."""
    expert = copy.deepcopy(job.seed_model)
    options = {"batch_size": 32, "length": 64, "seed": 0, "progress": False} | job.options
    sizes = [options.pop(name) for name in ("batch_size", "length")]
    if options["steps"]:
        fit(expert, Batches(job.tokens, *sizes, options["seed"]), **options)
    return expert


def train_experts(
    seed_model: nn.Module,
    parts: Sequence[np.ndarray],
    steps: int,
    executor: Executor | None = None,
    **options: Any,
) -> list[nn.Module]:
    """One expert a part of the corpus, from the same seed model.

    parts: each cluster's tokens, (n,) ids. steps: of each expert. executor: any whose workers are
    processes; the experts are then trained side by side, and are the same as without it. options:
    batch_size, length, seed, and what `fit` takes, such as lr.
    """
    jobs = [Job(seed_model, tokens, {"steps": steps} | options) for tokens in parts]
    return list((executor.map if executor else map)(train_expert, jobs))


class Library(NamedTuple):
    """A corpus in documents of one length, each with its vector; which domain it is from is hidden.

    train, held_out: (documents, length) ids. vectors: (documents, dim) of train. domain: of each,
    (documents,) int64, an index of domains, which no method sees.
    """

    tokenizer: Any
    embedding: TextEmbedding
    train: np.ndarray
    vectors: np.ndarray
    domain: np.ndarray
    held_out: np.ndarray
    domain_held_out: np.ndarray
    domains: list[str]

    def embed(self, documents: Iterable[np.ndarray]) -> np.ndarray:
        """Rows of ids, of any length -> (rows, dim)."""
        return self.embedding([self.tokenizer.decode(row) for row in documents])


def library(text: Mixture, length: int = 832, limit: int | None = None, dim: int = 100) -> Library:
    """The domains of a mixture, cut into documents of `length` tokens, and mixed up.

    832 tokens of 1,024 pieces are about 2 KB. limit: documents of training, spread evenly; None
    takes all. The embedding is learned on a third of them.
    """
    train, domain = _labelled(text.train_of, length)
    if limit:
        some = np.linspace(0, len(train) - 1, limit).astype(int)
        train, domain = train[some], domain[some]
    held_out, domain_held_out = _labelled(text.held_out_of, length)
    told = [text.tokenizer.decode(row) for row in train]
    embedding = fit_embedding(told[::3] if len(told) > 1000 else told, dim)
    return Library(
        text.tokenizer,
        embedding,
        train,
        embedding(told),
        domain,
        held_out,
        domain_held_out,
        [*text.train_of],
    )


def _labelled(ids_of: dict[str, np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    cut = [pieces(ids, length) for ids in ids_of.values()]
    return np.concatenate(cut), np.repeat(np.arange(len(cut)), [len(part) for part in cut])


def purity(labels: np.ndarray, domain: np.ndarray) -> float:
    """Share of documents that are from the commonest domain of their cluster."""
    table = np.zeros((labels.max() + 1, domain.max() + 1))
    np.add.at(table, (labels, domain), 1)
    return float(table.max(1).sum() / len(labels))


def pieces(ids: np.ndarray, length: int) -> np.ndarray:
    """Documents of one length, cut from a row of ids: (documents, length). What is over is left."""
    return ids[: len(ids) // length * length].reshape(-1, length)


def parts_of(documents: np.ndarray, labels: np.ndarray, clusters: int) -> list[np.ndarray]:
    """The documents (n, length) of each cluster, end to end: a row of ids each."""
    return [documents[labels == j].reshape(-1) for j in range(clusters)]


def inside(
    documents: np.ndarray, places: Sequence[int], window: int = 64
) -> tuple[Tensor, list[np.ndarray]]:
    """Windows within documents, and for each all that its document says before them.

    documents: (n, length) ids. places: which windows of a document, counted from 0; at 0 an
    ensemble would have nothing to choose its experts by.
    Returns rows (n * places, window + 1) int64, whose first token is given, and as many contexts.
    """
    rows, contexts = [], []
    for document in documents:
        for place in places:
            start = place * window
            rows.append(document[start : start + window + 1])
            contexts.append(document[: start + 1])
    return torch.from_numpy(np.stack(rows)).long(), contexts


@torch.no_grad()
def target_log_probs(experts: Iterable[nn.Module], rows: Tensor, batch: int = 64) -> Tensor:
    """What each expert gives the token that came: (experts, rows, length), for (rows, length + 1).

    From it the loss of every temperature and top_k follows without asking the experts again.
    """
    told = []
    for expert in experts:
        with kept_modes(expert):
            expert.eval()
            parts = [_target_log_probs(expert, part) for part in rows.split(batch)]
        told.append(torch.cat(parts))
    return torch.stack(told)


def _target_log_probs(expert: nn.Module, rows: Tensor) -> Tensor:
    log_p = F.log_softmax(anatomy.logits(expert, rows[:, :-1]), -1)
    return log_p.gather(-1, rows[:, 1:, None])[..., 0]


def ensemble_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """The mixture's loss at each token, nats: (rows, length).

    log_probs: (experts, rows, length), from `target_log_probs`; weights: (rows, experts).
    """
    return -(log_probs + weights.T.log()[:, :, None]).logsumexp(0)
