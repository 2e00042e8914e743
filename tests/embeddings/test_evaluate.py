import itertools
import json
import math
import runpy
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lablib.embeddings import evaluate as ev

HERE = Path(__file__).parent
DRAW = runpy.run_path(str(HERE / "record_evaluate.py"))  # the inputs
RECORD = json.loads((HERE / "evaluate.json").read_text())  # what the peers make of them
CUTS, SEEDS = DRAW["CUTS"], DRAW["SEEDS"]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def all_measures(scores, gains):
    return {name: v for k in CUTS for name, v in ev.per_query(scores, gains, k).items()}


# Retrieval and reranking.


def test_the_record_is_of_the_versions_that_are_named():
    assert RECORD["versions"]["mteb"] == "2.26.24"
    assert RECORD["versions"]["pytrec-eval-terrier"] == "0.5.11"


def test_the_drawn_rankings_hold_every_odd_case():
    scores, gains = DRAW["ranked"](0)
    assert gains[1] == {} and set(gains[0].values()) == {0} and (scores[2] == -np.inf).all()
    tied = [s for row, g in zip(scores, gains) for s in row[[*g]] if (row == s).sum() > 1]
    assert len(tied) > 20  # relevant documents among equals


@pytest.mark.parametrize("seed", SEEDS)
def test_each_query_measures_as_trec_eval_and_mteb_do(seed):
    names = {f"ndcg@{k}": f"ndcg_cut_{k}" for k in CUTS}
    names |= {f"recall@{k}": f"recall_{k}" for k in CUTS} | {f"mrr@{k}": f"mrr_{k}" for k in CUTS}
    theirs, ours = RECORD["trec"][seed], all_measures(*DRAW["ranked"](seed))
    judged = [int(n) for n in theirs]
    assert judged == [n for n in range(12) if n != 1]
    assert np.isnan([values[1] for values in ours.values()]).all()  # they leave it out
    for name, peer in {**names, "map": "map"}.items():
        close(ours[name][judged], [one[peer] for one in theirs.values()])
    close(ours["map"][judged], [one["mteb's map"] for one in theirs.values()])
    places = ev.per_query(*DRAW["ranked"](seed), 30)["mrr@30"][judged]
    close(places, [one["recip_rank"] for one in theirs.values()])


@pytest.mark.parametrize("seed", SEEDS)
def test_means_are_those_of_sentence_transformers(seed):
    """It leaves out queries without a relevant document, and of equals ranks the first name first.

    So documents are named backwards.
    """
    peer = pytest.importorskip("sentence_transformers.evaluation")
    scores, gains = DRAW["ranked"](seed)
    names = [f"{len(scores[0]) - d:02}" for d in range(len(scores[0]))]
    relevant = {str(n): {names[d] for d in g if g[d] > 0} for n, g in enumerate(gains)}
    names_of_k = ("ndcg_at_k", "mrr_at_k", "precision_recall_at_k")
    evaluator = peer.InformationRetrievalEvaluator(
        {n: n for n in relevant},
        dict.fromkeys(names),
        relevant,
        map_at_k=[30],
        **dict.fromkeys(names_of_k, CUTS),
    )
    rankings = {str(n): np.flatnonzero(row > -np.inf) for n, row in enumerate(scores)}
    hits = [
        [{"corpus_id": names[d], "score": scores[int(n), d]} for d in rankings[n]]
        for n in evaluator.queries_ids
    ]
    theirs = evaluator.compute_metrics(hits)
    kept = [int(n) for n in evaluator.queries_ids]
    binary = [{d: float(gain > 0) for d, gain in gains[n].items()} for n in kept]
    for k in CUTS:
        ours = ev.retrieval(scores[kept], binary, k)
        close(ours[f"ndcg@{k}"], theirs["ndcg@k"][k])
        close(ours[f"mrr@{k}"], theirs["mrr@k"][k])
        close(ours[f"recall@{k}"], theirs["recall@k"][k])
        close(ours["map"], theirs["map@k"][30])


def ranking(row):
    """Documents in order, by a plain sort: the score, then the number, both going down."""
    return sorted((d for d in range(len(row)) if row[d] > -np.inf), key=lambda d: (-row[d], -d))


def by_hand(row, gains, k):
    """The four measures of one query, walking down its ranking."""
    right = {d: g for d, g in gains.items() if g > 0}
    dcg = reciprocal = hits = precisions = 0
    for place, d in enumerate(ranking(row), start=1):
        if d not in right:
            continue
        hits, reciprocal = hits + 1, reciprocal or 1 / place
        precisions += hits / place
        dcg += right[d] / math.log2(place + 1) if place <= k else 0
    best = sum(g / math.log2(i + 2) for i, g in enumerate(sorted(right.values())[::-1][:k]))
    recall = len(set(ranking(row)[:k]) & set(right)) / len(right)
    return dcg / best, reciprocal * (reciprocal >= 1 / k), recall, precisions / len(right)


@pytest.mark.parametrize("seed", range(10, 14))
def test_a_walk_down_the_ranking_gives_the_same(seed):
    scores, gains = DRAW["ranked"](seed)
    chosen = [n for n in range(3, 12) if max(gains[n].values()) > 0]
    for k in (1, 4, 30):
        theirs = np.array([by_hand(scores[n], gains[n], k) for n in chosen])
        ours = ev.per_query(scores[chosen], [gains[n] for n in chosen], k)
        close(np.array([*ours.values()]).T, theirs)
        values = ev.retrieval(torch.tensor(scores[chosen]), [gains[n] for n in chosen], k)
        close([*values.values()], theirs.mean(0))


def test_of_equal_scores_the_later_document_comes_first():
    assert ev.ranks([0.5, 0.5, 0.7, 0.5, -np.inf], [0, 1, 2, 3, 4]).tolist() == [
        4,
        3,
        1,
        2,
        np.inf,
    ]
    assert ev.retrieval(np.zeros((1, 4)), [0])["mrr@10"] == 1 / 4
    # A model that says nothing is right as often as chance.
    assert ev.retrieval(np.zeros((20, 20)), range(20), 5)["recall@5"] == 5 / 20


def test_relevant_documents_come_as_one_as_several_or_with_gains():
    scores = np.random.default_rng(0).normal(size=(2, 6))
    three = ([2, 5], [{2}, (5,)], [{2: 1}, {5: 1.0}])
    one, several, gains = (ev.retrieval(scores, relevant, 2) for relevant in three)
    assert one == several == gains


@pytest.mark.parametrize("seed", SEEDS)
def test_reranking_equals_sentence_transformers(seed):
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    scores, right, samples, start, table = [], [], [], 0, []
    for query, documents, count in DRAW["candidates"](seed):
        scores.append(ev.cosine(query[None], documents)[0])
        right.append(range(count))
        names = [str(start + i) for i in range(len(documents) + 1)]
        samples.append(
            {"query": names[0], "positive": names[1 : count + 1], "negative": names[count + 1 :]}
        )
        table += [query, *documents]
        start += len(names)
    theirs = evaluation.RerankingEvaluator(samples).compute_metrics(lookup(np.array(table)))
    ours = ev.reranking(scores, right)
    close(
        [ours["map"], ours["mrr@10"], ours["ndcg@10"]], [theirs[n] for n in ("map", "mrr", "ndcg")]
    )


def lookup(vectors):
    """A model of sentence-transformers' kind, whose texts are numbers of vectors."""

    class Lookup:
        similarity_fn_name = "cosine"

        def encode(self, texts, **options):
            chosen = torch.tensor(vectors)[[int(text) for text in texts]]
            return chosen if options.get("convert_to_tensor") else chosen.numpy()

        encode_query = encode_document = encode

    return Lookup()


def test_reranking_takes_no_candidates_as_a_miss():
    ours = ev.reranking([[1.0, 3.0, 2.0], [], [4.0, 4.0]], [{0}, {0}, {0: 0}])
    close([*ours.values()], [1 / 9, 1 / 9, 1 / 6])
    assert list(ours) == ["map", "mrr@10", "ndcg@10"]


def test_a_thousand_queries_of_five_thousand_documents_take_under_a_second():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1000, 5000)).astype(np.float32)
    relevant = [{int(d): 1.0 for d in rng.integers(5000, size=5)} for _ in scores]
    took = []
    for _ in range(3):
        start = time.process_time()
        ev.retrieval(scores, relevant)
        took.append(time.process_time() - start)
    assert min(took) < 1


@pytest.mark.parametrize(
    ("scores", "relevant", "k", "message"),
    [
        (np.zeros((2, 3)), [0], 10, "2 rows of scores for 1 queries"),
        (np.zeros((1, 3)), [{}], 10, "no query has a relevant document"),
        (np.zeros((2, 3)), [{1: 0}, {2: -1}], 10, "no query has a relevant document"),
        (np.full((1, 3), np.nan), [0], 10, "scores hold NaN: 3 of 3"),
        ([[0.0], [0.0, np.nan]], [0, 0], 10, "scores of query 1 hold NaN"),
        (np.zeros((1, 3)), [{0: np.nan, 1: 1}], 10, "a gain is NaN"),
        (np.zeros((1, 3)), [3], 10, "numbered 0 to 2"),
        (np.zeros((1, 3)), [-1], 10, "numbered 0 to 2"),
        (np.zeros(3), [0, 1, 2], 10, "scores have shape"),
        (np.zeros((1, 3)), [0], 0, "k is 0"),
    ],
)
def test_rankings_that_cannot_be_measured_are_refused(scores, relevant, k, message):
    with pytest.raises(ValueError, match=message):
        ev.retrieval(scores, relevant, k)


# Similarity and pairs.


@pytest.mark.parametrize("seed", SEEDS)
def test_sts_equals_both_libraries(seed):
    a, b, gold = DRAW["rated"](seed)
    ours = ev.sts(a, b, gold)
    close([ours["spearman"], ours["pearson"]], [*RECORD["sts"][seed].values()])
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    first, second = [str(n) for n in range(40)], [str(n) for n in range(40, 80)]
    evaluator = evaluation.EmbeddingSimilarityEvaluator(
        first, second, gold.tolist(), similarity_fn_names=["cosine"]
    )
    evaluator.store_metrics_in_model_card_data = lambda *a, **k: None
    theirs = evaluator(lookup(np.concatenate([a, b])))
    close([*ours.values()], [theirs["spearman_cosine"], theirs["pearson_cosine"]])


def test_sts_by_hand_with_ties():
    """Ranks 1.5 1.5 3 4 and 1 2.5 2.5 4: covariance 4.5, squares 4.5 and 4.5."""
    a = np.array([[1.0, 0], [2, 0], [1, 1], [0, 3]])
    b = np.array([[0, 1.0], [0, 5], [0, 1], [0, 1]])
    ours = ev.sts(a, b, [0.0, 1, 1, 3])
    close(ours["spearman"], 3.75 / 4.5)
    cosines = np.array([0, 0, math.sqrt(0.5), 1])
    close(ours["pearson"], np.corrcoef(cosines, [0, 1, 1, 3])[0, 1])


def test_tensors_of_any_precision_and_zero_vectors_are_taken():
    a, b, gold = (torch.tensor(x) for x in DRAW["rated"](0))
    close(ev.sts(a, b, gold)["pearson"], ev.sts(a.numpy(), b.numpy(), gold.numpy())["pearson"])
    low = ev.sts(a.bfloat16().requires_grad_(), b.bfloat16(), gold)["spearman"]
    assert abs(low - ev.sts(a, b, gold)["spearman"]) < 0.05
    assert ev.cosine(torch.zeros(1, 6), b.float()).tolist() == [[0.0] * 40]
    assert math.isnan(ev.correlation([1.0, 1, 1], [1, 2, 3])["spearman"])


def test_cosines_of_every_pair():
    a, b, _ = DRAW["rated"](1)
    ours = ev.cosine(a, b[:7])
    for i, j in itertools.product(range(40), range(7)):
        close(ours[i, j], a[i] @ b[j] / math.sqrt(a[i] @ a[i] * (b[j] @ b[j])))


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_equal_scikit_learn_and_mteb(seed):
    a, b, _ = DRAW["rated"](seed)
    scores, labels = DRAW["true_pairs"](seed)
    cosines = np.diag(ev.cosine(a[:30], b[:30]))
    close(ev.pairs(cosines, labels[:30])["ap"], RECORD["pairs"][seed])
    metrics = pytest.importorskip("sklearn.metrics")
    assert len(set(scores)) < 12  # many ties
    close(ev.pairs(scores, labels)["ap"], metrics.average_precision_score(labels, scores))
    order = np.random.default_rng(seed).permutation(60)
    close(ev.pairs(scores[order], labels[order])["ap"], ev.pairs(scores, labels)["ap"])


def test_pairs_by_hand():
    """Thresholds 3 (one true of one), 2 (two of four), 1 (three of five)."""
    scores, labels = [2.0, 3, 2, 1, 2], [0, 1, 1, 1, 0]
    close(ev.pairs(scores, labels)["ap"], (1 + 2 / 4 + 3 / 5) / 3)
    assert ev.pairs([1.0, 1, 1], [1, 0, 0])["ap"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ev.sts(np.ones((3, 2)), np.ones((2, 2)), [1, 2, 3]), "pairs need two vectors"),
        (lambda: ev.sts(np.ones((3, 2)), np.ones((3, 2)), [1, 2]), "3 scores for 2 ratings"),
        (lambda: ev.sts(np.ones((3, 2)), np.ones((3, 2)), [1, 2, np.nan]), "ratings hold NaN"),
        (lambda: ev.sts(np.full((3, 2), np.nan), np.ones((3, 2)), [1, 2, 3]), "vectors hold NaN"),
        (lambda: ev.correlation([1.0], [1.0]), "two pairs at least"),
        (lambda: ev.cosine(np.ones((3, 2)), np.ones((3, 4))), "of 2 and of 4 numbers"),
        (lambda: ev.pairs([1.0, 2], [1]), "2 scores for 1 labels"),
        (lambda: ev.pairs([1.0, 2], [0, 0]), "a true pair among them"),
        (lambda: ev.pairs([1.0, 2], [1, 2]), "must be 0 or 1"),
        (lambda: ev.pairs([1.0, np.nan], [1, 0]), "scores hold NaN"),
        (lambda: ev.bitext(np.ones((3, 2)), np.ones((2, 2))), "3 texts, but only 2 candidates"),
        (lambda: ev.margin(np.ones((3, 2)), np.ones((2, 2)), 0), "k is 0"),
        (lambda: ev.margin(np.eye(2), -np.eye(2)), "cosines of 0 or less"),
        (lambda: ev.clustering(np.ones((3, 2)), [0, 1]), "3 vectors for 2 labels"),
        (lambda: ev.clustering(np.ones((3, 2)), [1, 1, 1]), "1 different"),
        (lambda: ev.clustering(np.full((2, 2), np.nan), [0, 1]), "vectors hold NaN"),
        (
            lambda: ev.classification(np.ones((3, 2)), [0, 1], np.ones((1, 2)), [0]),
            "3 vectors for 2 labels",
        ),
        (
            lambda: ev.classification(np.ones((2, 2)), [0, 1], np.ones((1, 2)), [0, 1]),
            "1 vectors for 2 labels",
        ),
        (
            lambda: ev.classification(np.ones((2, 2)), [1, 1], np.ones((1, 2)), [1]),
            "of two kinds or more",
        ),
    ],
)
def test_other_bad_inputs_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Bitext.


@pytest.mark.parametrize("seed", SEEDS)
def test_bitext_equals_mteb(seed):
    ours = ev.bitext(*DRAW["parallel"](seed))
    close([ours["accuracy"], ours["f1"]], [*RECORD["bitext"][seed].values()])
    metrics = pytest.importorskip("sklearn.metrics")
    predicted = ev.cosine(*DRAW["parallel"](seed)).argmax(1)
    close(ours["f1"], metrics.f1_score(np.arange(40), predicted, average="weighted"))


@pytest.mark.parametrize(("seed", "k"), [(0, 1), (1, 4), (2, 60)])
def test_margins_equal_a_plain_loop(seed, k):
    a, b = (np.abs(x) for x in DRAW["parallel"](seed))
    cosine, ours = ev.cosine(a, b), ev.margin(a, b, k)
    for i, j in itertools.product(range(0, 40, 7), range(0, 50, 7)):
        near = sum(sorted(cosine[i])[-k:]) / min(k, 50) + sum(sorted(cosine[:, j])[-k:]) / min(
            k, 40
        )
        close(ours[i, j], cosine[i, j] / (near / 2))
    share = np.mean(ours.argmax(1) == np.arange(40))
    assert ev.bitext(a, b, k)["accuracy"] == pytest.approx(share)


@pytest.mark.parametrize("seed", range(4))
def test_a_margin_holds_back_what_is_near_to_everything(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(50, 8)) + 2
    b = np.concatenate([a + 1.2 * rng.normal(size=(50, 8)), np.full((1, 8), 2.0)])
    assert (ev.cosine(a, b).argmax(1) == 50).mean() > 0.1  # the last is a hub
    assert ev.bitext(a, b, 4)["accuracy"] > ev.bitext(a, b)["accuracy"] + 0.05


def test_equal_translations_count_for_the_last_of_them():
    a = np.array([[1.0, 0], [1, 0], [0, 1]])
    assert ev.bitext(a, a) == {"accuracy": 2 / 3, "f1": (2 / 3 + 1) / 3}


# Clusters.


@pytest.mark.parametrize("seed", SEEDS)
def test_v_measure_equals_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    for labels, clusters in DRAW["partitions"](seed):
        close(ev.v_measure(labels, clusters), metrics.v_measure_score(labels, clusters))
    assert ev.v_measure(["x", "y", "x"], [5, 2, 5]) == pytest.approx(1)
    assert ev.v_measure([1, 1], [2, 2]) == metrics.v_measure_score([1, 1], [2, 2]) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_lloyd_equals_scikit_learn_from_the_same_centers(seed):
    cluster = pytest.importorskip("sklearn.cluster")
    vectors, _ = DRAW["grouped"](seed, 6.0)
    theirs = cluster.KMeans(5, init=vectors[:5], n_init=1, tol=0).fit(vectors).labels_
    assert (ev.lloyd(vectors, vectors[:5]) == theirs).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_clusters_that_lie_apart_measure_as_mteb_does(seed):
    """Whatever the k-means, it finds them; a third of the labels come by lot."""
    vectors, labels = DRAW["grouped"](seed, 0.01)
    ours = [ev.clustering(vectors, labels, [draw])["v_measure"] for draw in range(10)]
    close(ours, RECORD["clustering apart"][seed])
    assert 0.2 < np.mean(ours) < 0.8
    close(ev.clustering(vectors, labels)["v_measure"], np.mean(ours))


def test_clusters_that_overlap_measure_about_as_mteb_does():
    """Its mini-batches find other clusters; over thirty samples the means are near."""
    ours = [ev.clustering(*DRAW["grouped"](seed, 4.0))["v_measure"] for seed in SEEDS]
    assert abs(np.mean(ours) - np.mean(RECORD["clustering"])) < 0.03


def test_a_sample_has_the_size_asked_for():
    vectors, labels = DRAW["grouped"](0, 4.0)
    small = ev.clustering(vectors, labels.tolist(), [0], size=8)["v_measure"]
    assert small != ev.clustering(torch.tensor(vectors), labels, [0])["v_measure"]
    assert ev.clustering(np.ones((6, 2)), list("aabbcc"), [0])["v_measure"] == 0  # one place


# Classification.


@pytest.mark.parametrize("kind", DRAW["CLASSIFIED"])
def test_classification_equals_mteb(kind):
    _, per_class, _ = DRAW["CLASSIFIED"][kind]
    ours = ev.classification(*DRAW["labeled"](kind), per_class=per_class)
    close([ours["accuracy"], ours["f1"]], [*RECORD["classification"][kind].values()])
    assert ours["accuracy"] != ours["f1"]


@pytest.mark.parametrize("kind", DRAW["CLASSIFIED"])
def test_the_regression_equals_scikit_learn(kind):
    linear = pytest.importorskip("sklearn.linear_model")
    vectors, labels = (part[:60] for part in DRAW["labeled"](kind)[:2])
    theirs = linear.LogisticRegression(max_iter=1000).fit(vectors, labels)
    _, coded = np.unique(labels, return_inverse=True)
    ours = ev.logistic(vectors, coded, coded.max() + 1, steps=1000)
    np.testing.assert_allclose(ours[:-1].T, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours[-1], theirs.intercept_, atol=1e-6)


def test_labels_may_be_words_and_every_draw_takes_a_few_of_each():
    train, labels, test, truth = DRAW["labeled"]("five")
    names = np.array(["sun", "rain", "snow", "wind", "fog"])
    assert ev._first_of_each(np.array([2, 0, 2, 2, 0, 1]), 2).tolist() == [0, 1, 2, 4, 5]
    as_words = ev.classification(train, names[labels], test, names[truth].tolist())
    close(as_words["accuracy"], ev.classification(train, labels, test, truth)["accuracy"])


def test_macro_f1_counts_labels_that_occur_or_are_predicted():
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, truth = np.array([0, 1, 1, 4, 2]), np.array([0, 1, 2, 3, 2])
    theirs = metrics.f1_score(truth, predicted, average="macro", zero_division=0)
    close(ev.accuracy_and_f1(predicted, truth), (3 / 5, theirs))
