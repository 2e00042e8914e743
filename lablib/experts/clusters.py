"""Clusters of documents: tf-idf, a truncated SVD, and k-means whose clusters are equally large.

As in c-BTM (Gururangan et al., 2023, section 2.1): a document is a unit vector of 100 numbers, and
the balanced assignment is an auction (Bertsekas, 1992). Papers of this theme that divide a corpus
by content share this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

_WORD = re.compile(r"[^\W\d_]{2,}")


def words(text: str) -> list[str]:
    """Words of two letters or more, in lower case; numbers are no words."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class TextEmbedding:
    """text -> a unit vector that is near those of texts with similar words.

    vocabulary: word -> its column. idf: (words,). components: (words, dim), orthonormal columns.
    """

    vocabulary: dict[str, int]
    idf: np.ndarray
    components: np.ndarray

    def tf_idf(self, texts: Iterable[str]) -> sparse.csr_matrix:
        """(texts, words), rows of length 1; a text without a known word is a row of zeros."""
        data, columns, starts = [], [], [0]
        for text in texts:
            counts = Counter(w for w in words(text) if w in self.vocabulary)
            columns += [self.vocabulary[word] for word in counts]
            data += counts.values()
            starts.append(len(columns))
        shape = len(starts) - 1, len(self.vocabulary)
        counts = sparse.csr_matrix((np.array(data, dtype=float), columns, starts), shape=shape)
        return _unit_rows(counts @ sparse.diags(self.idf))  # tf * idf

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """(texts, dim) float32."""
        return _unit_rows(self.tf_idf(texts) @ self.components).astype(np.float32)


def fit_embedding(
    texts: Sequence[str], dim: int = 100, rare: int = 5, common: float = 0.3, seed: int = 0
) -> TextEmbedding:
    """Learn which words tell texts apart.

    dim: of the vectors; 100 in the paper's code. rare: a word in fewer texts is left out. common:
    so is one in a larger share of the texts, in the place of the paper's list of stop words.
    idf(w) = ln((1 + texts) / (1 + texts with w)) + 1.
    Raises ValueError when fewer than dim + 1 words or texts are left.
    """
    texts = list(texts)
    holders = Counter(word for text in texts for word in set(words(text)))
    kept = sorted(w for w, n in holders.items() if rare <= n <= common * len(texts))
    if min(len(kept), len(texts)) <= dim:
        raise ValueError(f"{len(kept)} words in {len(texts)} texts don't span {dim} dimensions")
    idf = np.log((1 + len(texts)) / (1 + np.array([holders[word] for word in kept]))) + 1
    vocabulary = {word: column for column, word in enumerate(kept)}
    table = TextEmbedding(vocabulary, idf, np.empty((len(kept), 0))).tf_idf(texts)
    start = np.random.default_rng(seed).standard_normal(min(table.shape))
    _, sizes, components = svds(table, dim, v0=start)
    return TextEmbedding(vocabulary, idf, components[sizes.argsort()[::-1]].T)


def _unit_rows(table):
    """Each row divided by its length; rows of zeros stay."""
    if sparse.issparse(table):
        lengths = np.sqrt(table.multiply(table).sum(1)).A1
        return sparse.diags(1 / np.where(lengths, lengths, 1)) @ table
    lengths = np.linalg.norm(table, axis=1, keepdims=True)
    return table / np.where(lengths, lengths, 1)


def squared_distances(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """(n, dim), (clusters, dim) -> (n, clusters)."""
    products = -2 * x @ centers.T
    return np.maximum(products + (x * x).sum(1)[:, None] + (centers * centers).sum(1), 0)


def nearest(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Each row's nearest center: (n,) int64. The assignment at inference."""
    return squared_distances(x, centers).argmin(1)


def balanced_assignment(cost: np.ndarray, tolerance: float = 1e-3) -> np.ndarray:
    """Each row's cluster, (n,) int64, none with more than ceil(n / clusters) rows.

    cost: (n, clusters). The sum of costs is at most n * tolerance above the least possible.
    An auction: each row without a place bids for its best cluster as much as it is better than the
    second best, plus tolerance; a full cluster keeps its highest bids, and its price, the lowest
    that it keeps, counts as cost. Source: Bertsekas (1992).
    """
    n, clusters = cost.shape
    if clusters == 1:
        return np.zeros(n, np.int64)
    places = -(-n // clusters)
    price = np.zeros(clusters)
    place = np.full(n, -1)
    paid = np.zeros(n)
    while (free := np.flatnonzero(place < 0)).size:
        value = -cost[free] - price  # (free, clusters)
        second, best = np.partition(value, -2, axis=1)[:, -2:].T
        place[free] = wanted = value.argmax(1)
        paid[free] = price[wanted] + best - second + tolerance
        for cluster in np.unique(wanted):
            inside = np.flatnonzero(place == cluster)
            if len(inside) < places:
                continue
            ranked = inside[np.argsort(-paid[inside], kind="stable")]
            place[ranked[places:]] = -1
            price[cluster] = paid[ranked[places - 1]]
    return place


def kmeans(
    x: np.ndarray, clusters: int, seed: int = 0, balanced: bool = True, rounds: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm from random rows: centers (clusters, dim), and each row's cluster (n,).

    balanced: clusters of equal size, by `balanced_assignment`; else each row takes its nearest
    center. rounds: at most so many, 20 in the paper's code; it ends when no row moves.
    Raises ValueError for fewer rows than clusters.
    """
    if not 1 <= clusters <= len(x):
        raise ValueError(f"{len(x)} rows can't fill {clusters} clusters")
    draw = np.random.default_rng(seed)
    centers = x[draw.choice(len(x), clusters, replace=False)]
    labels = np.full(len(x), -1)
    for _ in range(rounds):
        distances = squared_distances(x, centers)
        moved = balanced_assignment(distances) if balanced else distances.argmin(1)
        if (moved == labels).all():
            break
        labels, centers = moved, means(x, moved, centers)
    return centers, labels


def means(x: np.ndarray, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Each cluster's mean row; an empty one keeps its center: (clusters, dim)."""
    counts = np.bincount(labels, minlength=len(centers))[:, None]
    sums = np.zeros(centers.shape, centers.dtype)
    np.add.at(sums, labels, x)
    return np.where(counts, sums / np.maximum(counts, 1), centers)


def top_words(embedding: TextEmbedding, centers: np.ndarray, n: int = 8) -> list[list[str]]:
    """The n words that a center stands for most, most typical first, for each center.

    A center is turned back into weights of words; what all centers share is taken off first, so
    that words are shown that tell a cluster from the others.
    """
    apart = centers - centers.mean(0)
    weights = apart @ embedding.components.T  # (clusters, words)
    names = np.array(list(embedding.vocabulary))
    return [names[row.argsort()[::-1][:n]].tolist() for row in weights]
