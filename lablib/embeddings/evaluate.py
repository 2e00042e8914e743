"""How good vectors and scores are: the evaluators that all labs of this theme share.

Each takes numpy arrays or tensors, knows nothing of models, and returns a dict of named scores, 1
the best. Their peers: sentence-transformers, mteb and trec_eval.

A ranking's measures need only the places r_1 < r_2 < ... of the R relevant documents:

    nDCG@k   sum over r_i <= k of gain_i / log2(1 + r_i), over the same sum of the best ranking
    MRR@k    1 / r_1 if r_1 <= k, else 0
    recall@k share of the r_i <= k
    MAP      mean over i of i / r_i

Ties: of two documents with exactly the same score, the one with the higher number comes first, as
trec_eval has it (there by name, and after rounding scores to single precision). A score of -inf
means not retrieved. In average precision of `pairs` equal scores come in together, as in
scikit-learn.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

# A query's relevant documents by number: with a gain each, or all of gain 1, or just one.
Relevant = Mapping[int, float] | Iterable[int] | int


def ranks(scores: ArrayLike, documents: Sequence[int]) -> np.ndarray:
    """Places (r,) of documents (r,) in the ranking by scores (n,): from 1, inf if not retrieved."""
    scores = np.asarray(scores)
    places = np.full(len(documents), np.inf)
    for i, d in enumerate(documents):
        if scores[d] > -np.inf:
            tied_and_first = np.count_nonzero(scores[d + 1 :] == scores[d])
            places[i] = 1 + np.count_nonzero(scores > scores[d]) + tied_and_first
    return places


def measures(places: np.ndarray, gains: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """nDCG@k, MRR@k, recall@k and average precision of relevant documents' places and gains (r,).

    Source: Järvelin and Kekäläinen (2002) with a logarithm of base 2; trec_eval's ndcg_cut,
    recip_rank, recall and map.
    """
    order = np.argsort(places)
    places, gains = places[order], gains[order]
    top = places <= k
    best = np.sort(gains)[::-1][:k]
    ndcg = (gains[top] / np.log2(1 + places[top])).sum()
    ndcg /= (best / np.log2(1 + np.arange(1, len(best) + 1))).sum()
    precision = np.arange(1, len(places) + 1) / places  # i / r_i
    return ndcg, top[0] / places[0], top.mean(), precision.mean()


def per_query(scores: Sequence[ArrayLike], relevant: Sequence[Relevant], k: int = 10) -> dict:
    """The measures (queries,) of each query, by name: ndcg@k, mrr@k, recall@k, map.

    scores: (queries, documents), or a list of (candidates,) of any lengths.
    relevant: for each query, {document: gain}; gains of 0 or less are not relevant. A query with
        such judgments alone, or whose ranking is empty, scores 0; one without any is nan.
    Raises ValueError for NaN scores, other lengths, a document that isn't there, or when no query
    at all has a relevant document.
    """
    if len(scores) != len(relevant):
        raise ValueError(f"{len(scores)} rows of scores for {len(relevant)} queries with judgments")
    if k < 1:
        raise ValueError(f"k is {k}: the first k places must be one at least")
    rows, judged = _rows(scores), [_gains(one) for one in relevant]
    if not any((gains > 0).any() for _, gains in judged):
        raise ValueError("no query has a relevant document, so there is nothing to measure")
    values = [_of_query(row, *one, k) for row, one in zip(rows, judged)]
    return dict(zip((f"ndcg@{k}", f"mrr@{k}", f"recall@{k}", "map"), np.array(values).T))


def retrieval(scores: ArrayLike, relevant: Sequence[Relevant], k: int = 10) -> dict[str, float]:
    """Mean nDCG@k, MRR@k, recall@k and MAP over the queries that have judgments.

    scores: (queries, documents), higher is better. Other arguments and errors: `per_query`.
    """
    return {name: float(np.nanmean(each)) for name, each in per_query(scores, relevant, k).items()}


def reranking(
    scores: Sequence[ArrayLike], relevant: Sequence[Relevant], k: int = 10
) -> dict[str, float]:
    """Mean MAP, MRR@k and nDCG@k of candidates put in order: those of each query are its own.

    scores: for each query (candidates,), of any length; relevant numbers the candidates from 0.
    """
    means = retrieval(scores, relevant, k)
    return {name: means[name] for name in ("map", f"mrr@{k}", f"ndcg@{k}")}


def _of_query(row: np.ndarray, documents: np.ndarray, gains: np.ndarray, k: int) -> tuple:
    """Its measures: nan without judgments, 0 where nothing is ranked or nothing is relevant."""
    if len(documents) == 0:
        return (np.nan,) * 4
    if len(row) == 0 or not (gains > 0).any():
        return (0.0,) * 4
    if not 0 <= documents.min() <= documents.max() < len(row):
        raise ValueError(
            f"documents {documents.min()} to {documents.max()} are judged, but they are numbered "
            f"0 to {len(row) - 1}"
        )
    return measures(ranks(row, documents[gains > 0]), gains[gains > 0], k)


def _gains(relevant: Relevant) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and gains of a query's documents."""
    if isinstance(relevant, int | np.integer):
        relevant = (relevant,)
    if not isinstance(relevant, Mapping):
        relevant = dict.fromkeys(relevant, 1.0)
    gains = np.fromiter(relevant.values(), float, len(relevant))
    if np.isnan(gains).any():
        raise ValueError("a gain is NaN: give each relevant document a number")
    return np.fromiter(relevant.keys(), int, len(relevant)), gains


def _rows(scores: Sequence[ArrayLike]) -> Sequence[np.ndarray]:
    """Rows of scores without NaN, whether they have one length or not."""
    if isinstance(scores, np.ndarray | torch.Tensor):
        return _array(scores, 2, "scores")
    return [_array(row, 1, f"scores of query {n}") for n, row in enumerate(scores)]


def _array(values: ArrayLike, n_dims: int, name: str) -> np.ndarray:
    """Numbers as a numpy array of so many dimensions, float32 or float64, none of them NaN."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.numpy() if values.dtype == torch.float32 else values.double().numpy()
    array = np.asarray(values)
    array = array if array.dtype == np.float32 else array.astype(np.float64)
    if array.ndim != n_dims:
        raise ValueError(f"{name} have shape {array.shape}, where {n_dims} dimensions are needed")
    if np.isnan(array).any():
        raise ValueError(f"{name} hold NaN: {np.isnan(array).sum()} of {array.size} numbers")
    return array


def unit(vectors: ArrayLike) -> np.ndarray:
    """Vectors (n, dim) divided by their lengths; one of length 0 stays 0."""
    vectors = _array(vectors, 2, "vectors")
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length == 0, 1, length)


def cosine(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Cosines (n, m) of each of a (n, dim) with each of b (m, dim)."""
    a, b = unit(a), unit(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"vectors of {a.shape[1]} and of {b.shape[1]} numbers can't be compared")
    return a @ b.T  # (n, m)


def sts(a: ArrayLike, b: ArrayLike, gold: ArrayLike) -> dict[str, float]:
    """Textual similarity: correlations of the cosine of a[i] and b[i] with people's gold[i].

    a, b: (n, dim). gold: (n,). Errors and nan: `correlation`.
    """
    a, b = unit(a), unit(b)
    if a.shape != b.shape:
        raise ValueError(f"pairs need two vectors each, not {a.shape} and {b.shape}")
    return correlation((a * b).sum(1), gold)


def correlation(scores: ArrayLike, gold: ArrayLike) -> dict[str, float]:
    """Spearman's (tied values share their mean rank) and Pearson's correlation of scores and gold.

    Both (n,). nan where one of them is constant.
    Raises ValueError for other lengths, fewer than two pairs, or NaN.
    """
    scores, gold = _array(scores, 1, "scores"), _array(gold, 1, "gold ratings")
    if len(scores) != len(gold) or len(gold) < 2:
        raise ValueError(f"{len(scores)} scores for {len(gold)} ratings: two pairs at least")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        spearman = stats.spearmanr(scores, gold).statistic
        pearson = stats.pearsonr(scores, gold).statistic
    return {"spearman": float(spearman), "pearson": float(pearson)}


def pairs(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Pair classification: average precision "ap" of scores (n,) for labels (n,), 1 a true pair.

    sum over thresholds of (R_t - R_(t-1)) P_t, where pairs of one score pass a threshold together.
    Raises ValueError for other lengths, labels other than 0 and 1, or no true pair.
    """
    scores, labels = _array(scores, 1, "scores"), _array(labels, 1, "labels")
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} scores for {len(labels)} labels")
    if not np.isin(labels, (0, 1)).all() or not labels.any():
        raise ValueError("labels must be 0 or 1, with a true pair among them")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # the last pair of each threshold
    true = np.cumsum(labels[order])[last]
    precision = true / (1 + np.flatnonzero(last))
    return {"ap": float((np.diff(true, prepend=0) * precision).sum() / true[-1])}


def margin(a: ArrayLike, b: ArrayLike, k: int = 4) -> np.ndarray:
    """Ratio margins (n, m): cosine over how near the two are to whatever is nearest to them.

    cos(x, y) / (sum over x's k nearest y' of cos(x, y') / 2k + the same for y's k nearest x').
    k: taken down to n or m where there are fewer.
    Raises ValueError where that mean is not positive, since a ratio says nothing then.
    Source: Artetxe and Schwenk (2019), "Margin-based parallel corpus mining", equations 1 and 3.
    """
    if k < 1:
        raise ValueError(f"k is {k}: a margin needs one neighbor at least")
    similarity = cosine(a, b)  # (n, m)
    near_a = np.sort(similarity, 1)[:, -k:].mean(1, keepdims=True)  # (n, 1)
    near_b = np.sort(similarity, 0)[-k:].mean(0, keepdims=True)  # (1, m)
    average = (near_a + near_b) / 2  # (n, m)
    if (average <= 0).any():
        raise ValueError("some texts' nearest neighbors have cosines of 0 or less: use the cosine")
    return similarity / average


def bitext(a: ArrayLike, b: ArrayLike, k: int = 0) -> dict[str, float]:
    """Bitext mining: which of b (m, dim) is nearest to each of a (n, dim)? Right is b[i] for a[i].

    k: 0 for the cosine, else the margin with so many neighbors. Rows of b after n are distractors.
    "accuracy", and "f1": of each row of b as a label, averaged over the n that are right.
    """
    nearest = _first(margin(a, b, k) if k else cosine(a, b))  # (n,)
    n, m = len(a), len(b)
    if n > m:
        raise ValueError(f"{n} texts, but only {m} candidates: a[i] belongs to b[i]")
    hit = nearest == np.arange(n)
    times = np.bincount(nearest, minlength=m)[:n]  # how often each was chosen
    return {"accuracy": float(hit.mean()), "f1": float((2 * hit / (1 + times)).mean())}


def _first(scores: np.ndarray) -> np.ndarray:
    """The first document (n,) of each row's ranking: of equal ones the last."""
    return scores.shape[1] - 1 - scores[:, ::-1].argmax(1)


def clustering(
    vectors: ArrayLike,
    labels: Sequence,
    seeds: Iterable[int] = range(10),
    size: int | None = None,
) -> dict[str, float]:
    """Mean "v_measure" over seeds of k-means on samples drawn with replacement.

    vectors: (n, dim). labels: (n,) of any kind; k is how many differ. size: of a sample, n if None.
    Samples are mteb's for the seed; its k-means goes in mini-batches, this one over the whole.
    """
    vectors, (names, labels) = _array(vectors, 2, "vectors"), _coded(labels)
    if len(vectors) != len(labels) or len(names) < 2:
        raise ValueError(f"{len(vectors)} vectors for {len(labels)} labels, {len(names)} different")
    values = []
    for seed in seeds:
        sample = random.Random(seed).choices(range(len(labels)), k=size or len(labels))
        clusters = kmeans(vectors[sample], len(names), seed)
        values.append(v_measure(labels[sample], clusters))
    return {"v_measure": float(np.mean(values))}


def v_measure(labels: Sequence, clusters: Sequence) -> float:
    """2 I(labels; clusters) / (H(labels) + H(clusters)): 1 when each tells the other.

    The harmonic mean of homogeneity and completeness, with equal weights.
    Source: Rosenberg and Hirschberg (2007).
    """
    (names, rows), (groups, columns) = _coded(labels), _coded(clusters)
    joint = np.zeros((len(names), len(groups)))
    np.add.at(joint, (rows, columns), 1 / len(rows))
    rest = special.entr(joint.sum(1)).sum() + special.entr(joint.sum(0)).sum()
    return float(2 * (rest - special.entr(joint).sum()) / rest) if rest else 1.0


def kmeans(vectors: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Clusters (n,) of vectors (n, dim): k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's.

    Each further start is the best of 2 + log k, drawn with chances as their squared distances.
    """
    rng = np.random.default_rng(seed)
    starts = [int(rng.integers(len(vectors)))]
    nearest = _squares(vectors, vectors[starts])[:, 0]
    while len(starts) < k and nearest.sum() > 0:
        tries = rng.choice(len(vectors), 2 + int(np.log(k)), p=nearest / nearest.sum())
        after = np.minimum(nearest[:, None], _squares(vectors, vectors[tries]))  # (n, tries)
        best = after.sum(0).argmin()
        starts.append(int(tries[best]))
        nearest = after[:, best]
    return lloyd(vectors, vectors[starts])


def lloyd(vectors: np.ndarray, centers: np.ndarray, steps: int = 300) -> np.ndarray:
    """Clusters (n,) from these centers (k, dim): nearest center, then mean, until nothing moves.

    A cluster without a vector keeps its center.
    """
    centers, before = centers.copy(), None
    for _ in range(steps):
        clusters = _squares(vectors, centers).argmin(1)
        if before is not None and (clusters == before).all():
            break
        before = clusters
        member = (clusters[:, None] == np.arange(len(centers))).astype(vectors.dtype)  # (n, k)
        count = member.sum(0)[:, None]
        centers = np.where(count > 0, member.T @ vectors / np.maximum(count, 1), centers)
    return clusters


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (n, m)."""
    products = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)
    return np.maximum(products, 0)


def _coded(labels: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The labels that differ, and the number of each one's (n,)."""
    if isinstance(labels, torch.Tensor):
        labels = labels.cpu().numpy()
    return np.unique(np.asarray(labels), return_inverse=True)


def classification(
    train: ArrayLike,
    train_labels: Sequence,
    test: ArrayLike,
    test_labels: Sequence,
    per_class: int = 8,
    draws: int = 10,
    seed: int = 42,
) -> dict[str, float]:
    """Mean "accuracy" and macro "f1" on test of logistic regressions on a few labeled vectors each.

    train, test: (n, dim). Each draw takes per_class of each label, or all where there are fewer.
    Draws and settings are mteb's: scikit-learn's LogisticRegression(max_iter=100), shuffled again
    from the same seed for each draw.
    Raises ValueError for other lengths, or fewer than two labels.
    """
    train, test = _array(train, 2, "train vectors"), _array(test, 2, "test vectors")
    (names, coded), truth = _coded(train_labels), _coded(test_labels)
    for vectors, labels in ((train, coded), (test, truth[1])):
        if len(vectors) != len(labels) or len(names) < 2 or len(vectors) == 0:
            raise ValueError(
                f"{len(vectors)} vectors for {len(labels)} labels: one each, of two kinds or more"
            )
    order, scores = np.arange(len(train)), []
    for _ in range(draws):
        np.random.RandomState(seed).shuffle(order)
        chosen = _first_of_each(coded[order], per_class)
        weights = logistic(train[order[chosen]], coded[order[chosen]], len(names))
        predicted = names[_logits(weights, test).argmax(1)]
        scores.append(accuracy_and_f1(predicted, truth[0][truth[1]]))
    return dict(zip(("accuracy", "f1"), np.mean(scores, 0).tolist()))


def _first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of the first so many of each label, in order."""
    seen = (labels[:, None] == np.unique(labels)).cumsum(0)  # (n, labels)
    own = seen[np.arange(len(labels)), np.searchsorted(np.unique(labels), labels)]
    return np.flatnonzero(own <= count)


def logistic(
    vectors: np.ndarray, labels: np.ndarray, n_labels: int, steps: int = 100
) -> np.ndarray:
    """Weights (dim + 1, n_labels), the bias last, that minimize cross-entropy + |W|^2 / 2n.

    Of two labels only the second has a column, as in scikit-learn: that halves the penalty's hold.
    labels: (n,) int from 0. At most so many steps of L-BFGS.
    """
    shape = (vectors.shape[1] + 1, n_labels if n_labels > 2 else 1)
    truth = np.eye(n_labels)[labels]  # (n, n_labels)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        log_p = special.log_softmax(_logits(weights, vectors), axis=1)  # (n, n_labels)
        error = (np.exp(log_p) - truth)[:, -shape[1] :]
        slope = np.vstack([vectors.T @ error + weights[:-1], error.sum(0)])
        value = -(truth * log_p).sum() + (weights[:-1] ** 2).sum() / 2
        return value / len(vectors), slope.ravel() / len(vectors)

    options = {"maxiter": steps, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps}
    zero = np.zeros(shape[0] * shape[1])
    last = optimize.minimize(loss, zero, jac=True, method="L-BFGS-B", options=options)
    return last.x.reshape(shape)


def _logits(weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(n, n_labels); the first of two labels has 0."""
    logits = vectors @ weights[:-1] + weights[-1]
    return logits if logits.shape[1] > 1 else np.hstack([np.zeros_like(logits), logits])


def accuracy_and_f1(predicted: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Share that is right, and the mean of 2 TP / (2 TP + wrong) over labels of either kind."""
    f1 = []
    for label in np.union1d(predicted, truth):
        hits = ((predicted == label) & (truth == label)).sum()
        f1.append(2 * hits / ((predicted == label).sum() + (truth == label).sum()))
    return float((predicted == truth).mean()), float(np.mean(f1))
