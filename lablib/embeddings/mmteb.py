"""MMTEB (Enevoldsen et al., 2025): which tasks a benchmark needs, and what its ranking is worth.

Lab 1007. A task that can be foretold from the others tells nothing new, so it can go; a corpus can
go down to its relevant documents and those that some retriever takes for relevant. Scores are
arrays (models, tasks). Sources: abstract; the released task selection and the descriptions of the
hard-negative tasks in the authors' repository.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lablib.paths import data_dir

Rule = Callable[[np.ndarray], np.ndarray]  # scores (models, tasks) -> points (models,)


def foretold(scores: np.ndarray) -> np.ndarray:
    """Each score as a linear fit of the other models foretells it from the model's other scores.

    scores: (models, tasks) -> the same shape. With as few models as tasks the smallest of the
    weights that fit are taken.
    """
    found = np.empty_like(scores, dtype=float)
    for task in range(scores.shape[1]):
        y, x = scores[:, task], np.delete(scores, task, 1)  # (models,), (models, tasks - 1)
        for model in range(len(scores)):
            others = np.arange(len(scores)) != model
            middle, level = x[others].mean(0), y[others].mean()
            # y - mean(y) = (x - mean(x)) w
            w = np.linalg.lstsq(x[others] - middle, y[others] - level)[0]
            found[model, task] = level + (x[model] - middle) @ w
    return found


BY = {"spearman": lambda row: -row[1], "error": lambda row: row[2]}


def most_predictable(scores: np.ndarray, by: str = "spearman") -> list[tuple[int, float, float]]:
    """(task, Spearman, error) of each task, the most predictable one first.

    Spearman is that of scores and foretold scores; error their mean squared difference in
    variances of the scores. by: which of them decides. Source: the released task selection.
    """
    guesses = foretold_fast(scores)
    error = ((guesses - scores) ** 2).mean(0) / scores.var(0)  # (tasks,)
    fits = [spearman(*columns) for columns in zip(scores.T, guesses.T)]
    return sorted(((t, fits[t], float(error[t])) for t in range(len(fits))), key=BY[by])


def downsample(
    scores: np.ndarray,
    types: Sequence[str],
    threshold: float = -1.0,
    keep: int = 1,
    by: str = "spearman",
) -> list[tuple[int, float]]:
    """(task, Spearman) of each task that is taken out, in order.

    Again and again the most predictable of the tasks that are left goes, unless it is the last of
    its type; until the one to go is foretold with no Spearman above the threshold, or `keep` are
    left. types: of the tasks. by: as in `most_predictable`. Raises ValueError when the types are
    not one a task.
    """
    if len(types) != scores.shape[1]:
        raise ValueError(f"{len(types)} types for {scores.shape[1]} tasks")
    left, gone = list(range(len(types))), []
    while len(left) > keep:
        kinds = [types[task] for task in left]
        ranked = most_predictable(scores[:, left], by)
        free = [row for row in ranked if kinds.count(kinds[row[0]]) > 1]
        if not free or free[0][1] <= threshold:
            break
        place, fit, _ = free[0]
        gone.append((left.pop(place), fit))
    return gone


def foretold_fast(scores: np.ndarray) -> np.ndarray:
    """`foretold`, in one fit a task where there are more models than tasks.

    The fit to all models misses a model by e; without that model it misses by e / (1 - h), where h
    is the model's own entry of the matrix that makes fits of scores.
    """
    n_models, n_tasks = scores.shape
    if n_models <= n_tasks + 1:
        return foretold(scores)
    found = np.empty_like(scores, dtype=float)
    for task in range(n_tasks):
        y, x = scores[:, task], scores.astype(float)
        x[:, task] = 1  # the level, in the place of the task itself
        q = np.linalg.qr(x)[0]  # (models, tasks); q q' y are the fits
        own = (q * q).sum(1)  # h
        found[:, task] = y - (y - q @ (q.T @ y)) / (1 - own)
    return found


# Rankings.


def mean(scores: np.ndarray) -> np.ndarray:
    """Points of each model: the mean of its scores."""
    return scores.mean(1)


def borda(scores: np.ndarray) -> np.ndarray:
    """Points of each model: on each task one for each model that it beats, half for a tie."""
    ours, theirs = scores[:, None], scores[None]  # (models, 1, tasks), (1, models, tasks)
    beaten = (ours > theirs).sum((1, 2)) + 0.5 * (ours == theirs).sum((1, 2))
    return beaten - 0.5 * scores.shape[1]  # a model ties with itself


def mean_by_type(types: Sequence[str]) -> Rule:
    """A rule: the mean over the types of the mean over a type's tasks."""
    kinds = np.array(types)

    def points(scores: np.ndarray) -> np.ndarray:
        return np.mean([scores[:, kinds == kind].mean(1) for kind in sorted(set(types))], 0)

    return points


def mean_ranks(points: np.ndarray) -> np.ndarray:
    """Rank of each value, the smallest 1; values that tie share the mean of their ranks."""
    points = np.asarray(points)
    below, same = (op(points[:, None], points[None]).sum(1) for op in (np.greater, np.equal))
    return below + (same + 1) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks; nan where one side is constant."""
    return pearson(mean_ranks(a), mean_ranks(b))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the values; nan where one side is constant."""
    a, b = (np.asarray(side, float) - np.mean(side) for side in (a, b))
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else float("nan")


def kendall(a: np.ndarray, b: np.ndarray) -> float:
    """Pairs in the same order less pairs in opposite order, over pairs that don't tie: tau-b."""
    over = np.triu_indices(len(a), 1)
    one, two = (np.sign(np.subtract.outer(side, side))[over] for side in (a, b))
    return float((one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum()))


def bootstrap(
    scores: np.ndarray, rule: Rule = mean, draws: int = 1000, seed: int = 0
) -> np.ndarray:
    """Place of each model, 1 the best, when as many tasks are drawn anew: (draws, models)."""
    draw = np.random.default_rng(seed)
    n_tasks = scores.shape[1]
    chosen = [draw.integers(n_tasks, size=n_tasks) for _ in range(draws)]
    return np.array([mean_ranks(-rule(scores[:, tasks])) for tasks in chosen])


def random_tasks(types: Sequence[str], keep: int, draw: np.random.Generator) -> np.ndarray:
    """So many tasks at random, at least one of each type.

    Raises ValueError when there are more types than tasks to keep.
    """
    kinds, order = np.array(types), draw.permutation(len(types))
    first = [order[kinds[order] == kind][0] for kind in sorted(set(types))]
    if len(first) > keep:
        raise ValueError(f"{keep} tasks can't be of {len(first)} types")
    rest = [task for task in order if task not in first]
    return np.sort([*first, *rest[: keep - len(first)]])


# Hard negatives.


def hard_negative_split(
    relevant: Sequence[Iterable[int]], found: Sequence[np.ndarray], k: int
) -> np.ndarray:
    """Places of the documents to keep, in order: relevant ones and each retriever's best k a query.

    relevant: of each query, its documents. found: of each retriever, its scores (queries,
    documents). The paper's tasks have k = 250 and three retrievers: BM25, multilingual-e5-large and
    e5-mistral-7b-instruct (descriptions of the tasks). Raises ValueError when the corpus has fewer
    than k documents.
    """
    if found and min(scores.shape[1] for scores in found) < k:
        raise ValueError(f"a corpus of {found[0].shape[1]} documents has no best {k}")
    kept = {place for places in relevant for place in places}
    for scores in found:
        best = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :k]  # (queries, k)
        kept |= set(best.ravel().tolist())
    return np.array(sorted(kept), dtype=int)


def renumbered(relevant: Sequence[Mapping[int, float]], kept: np.ndarray) -> list[dict]:
    """The queries' relevant documents by their places among those that were kept."""
    place = {int(document): at for at, document in enumerate(kept)}
    return [{place[d]: gain for d, gain in row.items() if d in place} for row in relevant]


# Tasks and benchmarks.

METRICS = {
    "Bitext mining": "accuracy",
    "Classification": "accuracy",
    "Clustering": "V-measure",
    "Code retrieval": "nDCG@10",
    "Pair classification": "average precision",
    "Reranking": "MAP",
    "Retrieval": "nDCG@10",
    "STS": "Spearman",
    "Summarization": "Spearman",
}


@dataclass(frozen=True)
class Task:
    """One task. type: of METRICS. size: how many texts it has, where that is known."""

    name: str
    type: str
    languages: tuple[str, ...] = ("eng",)
    domains: tuple[str, ...] = ()
    size: int | None = None

    @property
    def metric(self) -> str:
        """What its score is."""
        return METRICS[self.type]


@dataclass(frozen=True)
class Benchmark:
    """A named list of tasks."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def names(self) -> list[str]:
        """Of the tasks, in order."""
        return [task.name for task in self.tasks]

    @property
    def types(self) -> list[str]:
        """Of each task its type."""
        return [task.type for task in self.tasks]

    def only(self, names: Iterable[str]) -> Benchmark:
        """The benchmark cut down to some of its tasks. Raises KeyError for one it doesn't have."""
        wanted = set(names)
        if unknown := wanted - set(self.names):
            raise KeyError(f"{self.name} has no task {min(unknown)}")
        return Benchmark(self.name, tuple(t for t in self.tasks if t.name in wanted))


def benchmark(name: str, **tasks: str) -> Benchmark:
    """From names of tasks, separated by spaces, under their type's name."""
    rows = ((kind.replace("_", " "), one) for kind, found in tasks.items() for one in found.split())
    return Benchmark(name, tuple(Task(one, kind) for kind, one in rows))


ENGLISH_V2 = benchmark(
    "MTEB(eng, v2)",
    Retrieval="ArguAna CQADupstackGamingRetrieval CQADupstackUnixRetrieval "
    "ClimateFEVERHardNegatives FEVERHardNegatives FiQA2018 HotpotQAHardNegatives SCIDOCS TRECCOVID "
    "Touche2020Retrieval.v3",
    Reranking="AskUbuntuDupQuestions MindSmallReranking",
    Clustering="ArXivHierarchicalClusteringP2P ArXivHierarchicalClusteringS2S "
    "BiorxivClusteringP2P.v2 MedrxivClusteringP2P.v2 MedrxivClusteringS2S.v2 "
    "StackExchangeClustering.v2 StackExchangeClusteringP2P.v2 TwentyNewsgroupsClustering.v2",
    Classification="AmazonCounterfactualClassification Banking77Classification "
    "ImdbClassification MTOPDomainClassification MassiveIntentClassification "
    "MassiveScenarioClassification ToxicConversationsClassification "
    "TweetSentimentExtractionClassification",
    STS="BIOSSES SICK-R STS12 STS13 STS14 STS15 STS17 STS22.v2 STSBenchmark",
    Pair_classification="SprintDuplicateQuestions TwitterSemEval2015 TwitterURLCorpus",
    Summarization="SummEvalSummarization.v2",
)
ENGLISH_V1 = benchmark(
    "MTEB(eng, v1)",
    Retrieval="ArguAna CQADupstackRetrieval ClimateFEVER DBPedia FEVER FiQA2018 HotpotQA MSMARCO "
    "NFCorpus NQ QuoraRetrieval SCIDOCS SciFact TRECCOVID Touche2020",
    Reranking="AskUbuntuDupQuestions MindSmallReranking SciDocsRR StackOverflowDupQuestions",
    Clustering="ArxivClusteringP2P ArxivClusteringS2S BiorxivClusteringP2P BiorxivClusteringS2S "
    "MedrxivClusteringP2P MedrxivClusteringS2S RedditClustering RedditClusteringP2P "
    "StackExchangeClustering StackExchangeClusteringP2P TwentyNewsgroupsClustering",
    Classification="AmazonCounterfactualClassification AmazonPolarityClassification "
    "AmazonReviewsClassification Banking77Classification EmotionClassification "
    "ImdbClassification MTOPDomainClassification MTOPIntentClassification "
    "MassiveIntentClassification MassiveScenarioClassification "
    "ToxicConversationsClassification TweetSentimentExtractionClassification",
    STS="BIOSSES SICK-R STS12 STS13 STS14 STS15 STS16 STS17 STS22 STSBenchmark",
    Pair_classification="SprintDuplicateQuestions TwitterSemEval2015 TwitterURLCorpus",
    Summarization="SummEval",
)


def published(tested: Benchmark) -> tuple[list[str], np.ndarray]:
    """Models with a published score on each task, and the scores, 0 to 1: (models, tasks)."""
    with (data_dir() / "published" / "mteb-eng-scores.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if all(row[n] for n in tested.names)]
    scores = [[float(row[name]) for name in tested.names] for row in rows]
    return [row["model"] for row in rows], np.array(scores)


def both_english() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Models with scores on both English benchmarks, and their scores on v2 and on v1."""
    (new, newer), (old, older) = published(ENGLISH_V2), published(ENGLISH_V1)
    common = [model for model in new if model in old]
    rows = [[names.index(model) for model in common] for names in (new, old)]
    return common, newer[rows[0]], older[rows[1]]
