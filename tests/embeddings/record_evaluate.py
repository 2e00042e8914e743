"""Write evaluate.json: what the peers of evaluate.py and lexical.py compute on drawn inputs.

For an environment of its own, since mteb brings many others:
    python -m venv peer
    peer/bin/pip install mteb==2.26.24 pytrec-eval-terrier==0.5.11 bm25s==0.3.16 datasets==4.4.0
    peer/bin/python tests/embeddings/record_evaluate.py tests/embeddings/evaluate.json
The tests draw the inputs again: from RandomState, whose numbers never change.
"""

import json
import sys

import numpy as np

SEEDS = (0, 1, 2)
CUTS = (1, 3, 10)
N_DOCUMENTS = 30
CONSTANTS = ((1.5, 0.75), (1.2, 0.3))  # k1 and b of BM25
PACKAGES = ("mteb", "pytrec-eval-terrier", "bm25s", "scikit-learn")


# Inputs.


def ranked(seed: int) -> tuple[np.ndarray, list[dict[int, int]]]:
    """Scores (12, 30) with many ties, and gains: some queries lack judgments or a ranking."""
    rng = np.random.RandomState(seed)
    scores = rng.randint(-4, 5, (12, N_DOCUMENTS)) / 4
    scores[2] = -np.inf  # an empty ranking
    scores[3, rng.permutation(N_DOCUMENTS)[:18]] = -np.inf  # a short one
    judged = [rng.permutation(N_DOCUMENTS)[: rng.randint(1, 15)] for _ in scores]
    gains = [{int(d): int(rng.randint(0, 4)) for d in documents} for documents in judged]
    gains[0] = dict.fromkeys(gains[0], 0)  # judged, and nothing is relevant
    gains[1] = {}  # not judged
    gains[2][0] = gains[3][5] = 2
    return scores, gains


def candidates(seed: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Of each of ten queries: its vector (8,), candidates (n, 8), the first so many relevant."""
    rng = np.random.RandomState(seed)
    sizes = [(rng.randint(1, 5), rng.randint(1, 20)) for _ in range(10)]
    return [(rng.randn(8), rng.randn(right + wrong, 8), right) for right, wrong in sizes]


def rated(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of vectors (40, 6), some of them twice, with ratings from 0 to 5 in halves."""
    rng = np.random.RandomState(seed)
    a = rng.randn(40, 6)
    b = a + 2 * rng.randn(40, 6)
    a[30:], b[30:] = a[:10], b[:10]
    return a, b, rng.randint(0, 11, 40) / 2


def true_pairs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (60,) with many ties, and labels."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, 2, 60)
    return rng.randint(0, 8, 60) / 8 + labels / 4, labels


def parallel(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts (40, 6), and what they should find (50, 6), ten of which belong to none."""
    rng = np.random.RandomState(seed)
    a = rng.randn(40, 6)
    return a, np.concatenate([a + rng.randn(40, 6), rng.randn(10, 6)])


def grouped(seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (120, 6) around five centers; a third of their labels come by lot."""
    rng = np.random.RandomState(seed)
    group = rng.randint(0, 5, 120)
    vectors = 6 * rng.randn(5, 6)[group] + spread * rng.randn(120, 6)
    return vectors, np.where(rng.rand(120) < 1 / 3, rng.randint(0, 5, 120), group)


def partitions(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels and clusters (50,): by lot, one cluster, one label, one each."""
    rng = np.random.RandomState(seed)
    labels, same = rng.randint(0, 4, 50), np.zeros(50, int)
    clusters = np.where(rng.rand(50) < 0.5, labels, rng.randint(0, 7, 50))
    return [(labels, clusters), (labels, same), (same, labels), (labels, np.arange(50))]


CLASSIFIED = {  # labels, examples of each, how large vectors are
    "two": (2, 8, 1.0),
    "five": (5, 8, 1.0),
    "five of 16": (5, 16, 1.0),
    "not converged": (4, 8, 40.0),
}


def labeled(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vectors and labels to learn from (200, 12) and to test (100, 12); the last label is rare."""
    n_labels, _, scale = CLASSIFIED[kind]
    rng = np.random.RandomState(n_labels)
    labels = np.concatenate([rng.randint(0, n_labels, 295) * (rng.rand(295) < 0.9), [1] * 5])
    labels[labels == n_labels - 1] *= rng.rand((labels == n_labels - 1).sum()) < 0.3
    labels[:n_labels] = np.arange(n_labels)
    vectors = scale * (rng.randn(n_labels, 12)[labels] + 1.5 * rng.randn(300, 12))
    return vectors[:200], labels[:200], vectors[200:], labels[200:]


def texts(seed: int) -> tuple[list[str], list[str]]:
    """Forty documents, one of them empty, and queries with repeated and unknown words."""
    rng = np.random.RandomState(seed)
    chance = 1 / np.arange(1, 31)
    names, chance = [f"w{i}" for i in range(30)], chance / chance.sum()
    drawn = [" ".join(rng.choice(names, rng.randint(1, 40), p=chance)) for _ in range(45)]
    return ["", *drawn[:39]], [*drawn[39:], "w1 w1 w1 w7", "w2 unknown", "unknown"]


# Outputs.


class Lookup:
    """A model whose texts are numbers of vectors."""

    similarity_fn_name = "cosine"

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors
        self.encode_query = self.encode_document = self.encode
        self.mteb_model_meta = self.model_card_data = None

    def encode(self, inputs, **options):
        import torch

        if not isinstance(inputs, list):  # mteb's batches
            inputs = [text for batch in inputs for text in batch["text"]]
        return torch.tensor(self.vectors[[int(text) for text in inputs]])

    def similarity(self, a, b):
        from sentence_transformers.util import cos_sim

        return cos_sim(a, b)

    def similarity_pairwise(self, a, b):
        from sentence_transformers.util import pairwise_cos_sim

        return pairwise_cos_sim(a, b)


def numbers(start: int, count: int) -> list[str]:
    """Texts for `Lookup`."""
    return [str(n) for n in range(start, start + count)]


def run(base: type, name: str, model: Lookup, splits: dict, **settings) -> dict[str, float]:
    """Scores of a task of mteb's with these columns."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.task_metadata import TaskMetadata

    metadata = TaskMetadata(
        dataset={"path": "none/none", "revision": "0"},
        name=name,
        description=name,
        type=name,
        eval_langs=["eng-Latn"],
        main_score=settings.pop("main_score"),
    )
    task = type(name, (base,), {"metadata": metadata, **settings})(seed=settings.get("seed", 42))
    task.dataset = DatasetDict({n: Dataset.from_dict(split) for n, split in splits.items()})
    task.data_loaded = True
    return task.evaluate(model, "test", encode_kwargs={})["default"]


def trec(seed: int) -> dict[str, dict[str, float]]:
    """Of each judged query: trec_eval's measures, and those that mteb computes or takes over."""
    import pytrec_eval
    from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores, mrr

    scores, gains = ranked(seed)
    rankings = {f"{n}": named(row) for n, row in enumerate(scores)}
    judged = {f"{n}": {f"{d:02}": g for d, g in one.items()} for n, one in enumerate(gains)}
    cuts = ",".join(map(str, CUTS))
    wanted = {f"ndcg_cut.{cuts}", f"recall.{cuts}", "map", "recip_rank"}
    values = pytrec_eval.RelevanceEvaluator(judged, wanted).evaluate(rankings)
    rankings = {n: rankings[n] for n in values}
    whole = calculate_retrieval_scores(rankings, judged, [N_DOCUMENTS]).all_scores
    places = mrr(judged, rankings, CUTS)
    for row, n in enumerate(values):
        values[n] |= {f"mrr_{k}": places[f"MRR@{k}"][row] for k in CUTS}
        values[n]["mteb's map"] = whole[n][f"map_cut_{N_DOCUMENTS}"]
    return values


def named(row: np.ndarray) -> dict[str, float]:
    """Scores of the documents that were retrieved."""
    return {f"{d:02}": float(score) for d, score in enumerate(row) if score > -np.inf}


def similar(seed: int) -> dict[str, float]:
    """mteb's correlations."""
    from mteb.abstasks.sts import AbsTaskSTS

    a, b, gold = rated(seed)
    columns = {"sentence1": numbers(0, 40), "sentence2": numbers(40, 40), "score": gold.tolist()}
    model = Lookup(np.vstack([a, b]))
    values = run(AbsTaskSTS, "STS", model, {"test": columns}, main_score="cosine_spearman")
    return {name: values[f"cosine_{name}"] for name in ("spearman", "pearson")}


def paired(seed: int) -> float:
    """mteb's average precision of the cosines of 30 pairs."""
    from mteb.abstasks.pair_classification import AbsTaskPairClassification as Task

    a, b, _ = rated(seed)
    labels = true_pairs(seed)[1][:30].tolist()
    columns = {"sentence1": numbers(0, 30), "sentence2": numbers(30, 30), "labels": labels}
    model = Lookup(np.vstack([a[:30], b[:30]]))
    values = run(Task, "PairClassification", model, {"test": columns}, main_score="max_ap")
    return values["cosine_ap"]


def mined(seed: int) -> dict[str, float]:
    """mteb's accuracy and F1."""
    from mteb._evaluators import BitextMiningEvaluator
    from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining

    a, b = parallel(seed)
    model = Lookup(a)
    nearest = BitextMiningEvaluator._similarity_search(None, a, b, model)
    values = AbsTaskBitextMining._compute_metrics(None, nearest, [(i, i) for i in range(len(a))])
    return {name: values[name] for name in ("accuracy", "f1")}


def clustered(seed: int, spread: float) -> list[float]:
    """mteb's v-measure for one sample of each of ten seeds."""
    import random

    from mteb.abstasks.clustering import _evaluate_clustering_bootstrapped

    vectors, labels = grouped(seed, spread)
    return [
        _evaluate_clustering_bootstrapped(
            vectors,
            [[int(label)] for label in labels],
            n_clusters=1,
            cluster_size=len(labels),
            kmean_batch_size=512,
            max_depth=None,
            rng_state=random.Random(draw),
            seed=draw,
        )[0]["v_measure"]["Level 0"][0]
        for draw in range(10)
    ]


def classified(kind: str) -> dict[str, float]:
    """mteb's scores."""
    from mteb.abstasks.classification import AbsTaskClassification

    train, train_labels, test, test_labels = labeled(kind)
    splits = {
        "train": {"text": numbers(0, len(train)), "label": train_labels.tolist()},
        "test": {"text": numbers(len(train), len(test)), "label": test_labels.tolist()},
    }
    model = Lookup(np.vstack([train, test]))
    settings = {"main_score": "accuracy", "samples_per_label": CLASSIFIED[kind][1]}
    values = run(AbsTaskClassification, "Classification", model, splits, **settings)
    return {name: values[name] for name in ("accuracy", "f1")}


def by_words(seed: int, k1: float, b: float) -> list[list[float]]:
    """bm25s's scores (queries, documents); it refuses unknown words, which count nothing."""
    import bm25s

    documents, queries = texts(seed)
    index = bm25s.BM25(method="lucene", k1=k1, b=b, dtype="float64")
    index.index([text.split() for text in documents], show_progress=False)
    known = [[word for word in text.split() if word != "unknown"] for text in queries]
    return [index.get_scores(one).tolist() if one else [0.0] * len(documents) for one in known]


def record(file: str) -> None:
    """All of it, with ten digits."""
    from importlib.metadata import version

    values = {
        "versions": {name: version(name) for name in PACKAGES},
        "trec": [trec(seed) for seed in SEEDS],
        "sts": [similar(seed) for seed in SEEDS],
        "pairs": [paired(seed) for seed in SEEDS],
        "bitext": [mined(seed) for seed in SEEDS],
        "clustering apart": [clustered(seed, 0.01) for seed in SEEDS],
        "clustering": [clustered(seed, 4.0) for seed in SEEDS],
        "classification": {kind: classified(kind) for kind in CLASSIFIED},
        "bm25": [[by_words(seed, *one) for one in CONSTANTS] for seed in SEEDS],
    }
    values = json.loads(
        json.dumps(values, default=float), parse_float=lambda x: round(float(x), 10)
    )
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    with open(file, "w") as out:
        out.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record(sys.argv[1])
