import numpy as np
import pytest
from scipy import stats

from lablib.data.tasks import load_task
from lablib.embeddings import collections, lexical, mmteb
from lablib.embeddings import mini_benchmark as mini
from lablib.evidence.claims import NOT_REPRODUCED, judge
from lablib.evidence.studies import Study
from lablib.exercises import Wrong
from lablib.exercises import mmteb as exercises
from lablib.papers import paper
from lablib.studies import mmteb as study


def scores(models=12, tasks=5, seed=0, levels=None):
    draw = np.random.default_rng(seed)
    made = draw.normal(size=(models, 1)) + draw.normal(size=(models, tasks))
    return made if levels is None else np.round(made * levels) / levels


# Foretelling.


@pytest.mark.parametrize(("models", "tasks"), [(12, 5), (30, 2), (51, 41)])
def test_one_fit_a_task_foretells_what_a_fit_without_each_model_does(models, tasks):
    table = scores(models, tasks)
    assert np.allclose(mmteb.foretold_fast(table), mmteb.foretold(table), atol=1e-9)


def test_a_foretold_score_does_not_know_the_score():
    table = scores()
    other = table.copy()
    other[3, 1] += 100
    assert mmteb.foretold(other)[3, 1] == pytest.approx(mmteb.foretold(table)[3, 1])
    assert not np.allclose(mmteb.foretold(other)[4, 1], mmteb.foretold(table)[4, 1])


def test_with_few_models_it_is_sklearns_smallest_weights():
    table = scores(6, 9)
    x, y = np.delete(table[1:], 2, 1), table[1:, 2]
    middle, level = x.mean(0), y.mean()
    w = np.linalg.pinv(x - middle) @ (y - level)
    wanted = level + (np.delete(table[0], 2) - middle) @ w
    assert mmteb.foretold_fast(table)[0, 2] == pytest.approx(wanted)


def test_as_linear_regression_of_a_peer_foretells():
    linear = pytest.importorskip("sklearn.linear_model")
    table = scores(9, 4)
    model = linear.LinearRegression().fit(table[1:, 1:], table[1:, 0])
    assert mmteb.foretold(table)[0, 0] == pytest.approx(model.predict(table[:1, 1:])[0])


def test_the_most_predictable_task_is_one_that_the_others_make():
    table = scores(40, 4)
    table = np.column_stack([table, table[:, 0] + 2 * table[:, 1]])
    by_rank = mmteb.most_predictable(table)
    by_error = mmteb.most_predictable(table, "error")
    assert {by_rank[0][0], by_error[0][0]} <= {0, 1, 4}  # each of the three follows from two
    assert by_rank[0][1] == pytest.approx(1) and by_error[0][2] == pytest.approx(0, abs=1e-9)
    assert [row[1] for row in by_rank] == sorted((row[1] for row in by_rank), reverse=True)
    assert [row[2] for row in by_error] == sorted(row[2] for row in by_error)


def test_tasks_go_one_by_one_and_the_last_of_a_type_stays():
    table, types = scores(40, 7), ["a", "a", "a", "b", "b", "c", "c"]
    gone = mmteb.downsample(table, types)
    left = [types[t] for t in range(7) if t not in {task for task, _ in gone}]
    assert sorted(left) == ["a", "b", "c"] and len({task for task, _ in gone}) == 4
    assert mmteb.downsample(table, types, keep=5) == gone[:2]
    first = mmteb.most_predictable(table)[0]
    assert gone[0] == (first[0], first[1])


def test_nothing_goes_that_is_not_foretold_above_the_threshold():
    table, types = scores(40, 7), ["a"] * 7
    fits = [fit for _, fit in mmteb.downsample(table, types)]
    between = (max(fits) + 1) / 2
    assert mmteb.downsample(table, types, threshold=between) == []
    some = mmteb.downsample(table, types, threshold=fits[0] - 1e-9)
    assert some and all(fit > fits[0] - 1e-9 for _, fit in some)


def test_types_are_one_a_task():
    with pytest.raises(ValueError, match="2 types for 5 tasks"):
        mmteb.downsample(scores(), ["a", "b"])


# Rankings.


@pytest.mark.parametrize("seed", range(3))
def test_correlations_with_ties_are_scipys(seed):
    a, b = scores(15, 2, seed, levels=1).T
    assert mmteb.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert mmteb.kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    assert mmteb.pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert np.array_equal(mmteb.mean_ranks(a), stats.rankdata(a))


def test_a_constant_side_has_no_correlation():
    assert np.isnan(mmteb.spearman(np.ones(4), np.arange(4)))


def test_borda_by_hand():
    table = np.array([[0.9, 0.5], [0.7, 0.5], [0.7, 0.1]])
    assert mmteb.borda(table).tolist() == [2 + 1.5, 0.5 + 1.5, 0.5 + 0]


def test_borda_points_are_ranks_summed():
    table = scores(levels=1)
    wanted = sum(stats.rankdata(column) - 1 for column in table.T)
    assert np.allclose(mmteb.borda(table), wanted)


def test_a_type_counts_once_however_many_tasks_it_has():
    table = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    assert mmteb.mean_by_type(["a", "a", "b"])(table).tolist() == [0.5, 0.25]


def test_bootstrapped_places_are_those_of_tasks_drawn_anew():
    table = scores(4, 6)
    places = mmteb.bootstrap(table, draws=200)
    assert places.shape == (200, 4) and (places.sum(1) == 10).all()
    assert (mmteb.bootstrap(table[:, :1], draws=5) == stats.rankdata(-table[:, 0])).all()
    assert len({tuple(row) for row in places.tolist()}) > 1


def test_random_tasks_are_of_all_types():
    types = ["a"] * 9 + ["b"]
    for seed in range(20):
        chosen = mmteb.random_tasks(types, 3, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == 3 and 9 in chosen
    with pytest.raises(ValueError, match="1 tasks can't be of 2 types"):
        mmteb.random_tasks(types, 1, np.random.default_rng(0))


# Hard negatives.


def test_relevant_documents_and_each_retrievers_best_stay():
    one = np.array([[9, 8, 7, 0, 0, 0.0]])
    two = np.array([[0, 0, 5, 6, 0, 0.0]])
    assert mmteb.hard_negative_split([[5]], [one, two], 2).tolist() == [0, 1, 2, 3, 5]
    assert mmteb.hard_negative_split([[5]], [one], 1).tolist() == [0, 5]
    with pytest.raises(ValueError, match="6 documents has no best 7"):
        mmteb.hard_negative_split([[5]], [one], 7)


def test_relevant_documents_keep_their_gains_under_new_numbers():
    assert mmteb.renumbered([{5: 2.0, 1: 1.0}], np.array([0, 5])) == [{1: 2.0}]


def test_who_chose_ten_negatives_scores_as_on_the_whole_corpus_others_no_lower():
    draw = np.random.default_rng(0)
    chooser, other = draw.normal(size=(2, 8, 300))
    relevant = [{int(d): 1.0} for d in draw.choice(300, 8, replace=False)]
    kept = mmteb.hard_negative_split(relevant, [chooser], 10)
    small = mmteb.renumbered(relevant, kept)

    def ndcg(scores, judged):
        return mini.evaluate.per_query(scores, judged)["ndcg@10"]

    assert np.allclose(ndcg(chooser[:, kept], small), ndcg(chooser, relevant))
    assert (ndcg(other[:, kept], small) >= ndcg(other, relevant) - 1e-12).all()


# Benchmarks.


def test_the_published_table_has_both_benchmarks():
    assert len(mmteb.ENGLISH_V2.names) == len(set(mmteb.ENGLISH_V2.names)) == 41
    assert len(mmteb.ENGLISH_V1.names) == len(set(mmteb.ENGLISH_V1.names)) == 56
    models, table = mmteb.published(mmteb.ENGLISH_V2)
    assert table.shape == (103, 41) == (len(models), 41)
    assert np.isfinite(table).all() and table.max() <= 1


def test_both_benchmarks_cover_44_models():
    models, new, old = mmteb.both_english()
    assert new.shape == (44, 41) and old.shape == (44, 56) and len(models) == 44
    shared = set(mmteb.ENGLISH_V1.names) & set(mmteb.ENGLISH_V2.names)
    one = next(iter(shared))
    assert np.array_equal(
        new[:, mmteb.ENGLISH_V2.names.index(one)], old[:, mmteb.ENGLISH_V1.names.index(one)]
    )


def test_a_benchmark_is_cut_down_by_name():
    small = mini.MINI.only(["lee", "names-ru"])
    assert small.names == ["lee", "names-ru"] and small.types == ["STS", "Bitext mining"]
    assert small.tasks[0].metric == "Spearman"
    with pytest.raises(KeyError, match="no task moon"):
        mini.MINI.only(["moon"])


def test_the_mini_benchmark_has_eight_types_and_three_tasks_in_two_languages():
    assert len(mini.MINI.names) == 12 and len(set(mini.MINI.types)) == 8
    assert sum(len(task.languages) > 1 for task in mini.MINI.tasks) == 3


@pytest.mark.parametrize("name", mini.MINI.names)
def test_a_task_scores_a_perfect_encoder_higher_than_a_blind_one(name):
    task = mini.drawn(name, 12)
    again = mini.drawn(name, 12)
    assert task.texts == again.texts and all(len(t.split()) <= 42 for t in task.texts)
    draw = np.random.default_rng(0)
    blind = draw.normal(size=(len(task.texts), 8))
    score = task.score(*mini.dense(lambda texts: blind)(task.texts))
    assert -1 <= score <= 1


def test_texts_that_are_alike_are_found():
    a, b = ["red", "green", "blue"], ["rouge", "vert", "bleu"]
    same = np.vstack([np.eye(3), np.eye(3)])
    turned = np.vstack([np.eye(3), np.roll(np.eye(3), 1, 0)])
    task = mini.searched(a, b, "recall@1", 1)
    assert task.score(same @ same.T, same) == 1 and task.score(turned @ turned.T, turned) == 0
    pairs = mini.told_apart(a, b, [1, 1, 0])
    near = same.copy()
    near[5] = [1, 0, 0]
    assert pairs.score(near @ near.T, near) == 1
    liked = mini.rated(a, b, [3, 2, 1])
    assert liked.score(np.diag([0.0] * 6) + near @ near.T, near) > 0.8


def test_candidates_are_the_own_text_its_neighbor_and_others():
    triples = [(f"q{i}", f"own{i}", f"near{i}") for i in range(6)]
    task = mini.reranked(triples)
    n = 6
    similar = np.zeros((18, 18))
    similar[np.arange(n), n + np.arange(n)] = 1
    assert task.score(similar, similar) == 1
    similar[np.arange(n), 2 * n + np.arange(n)] = 2  # the neighbor comes first
    assert task.score(similar, similar) == 0.5


def test_words_alone_take_part_everywhere():
    row = mini.column(mini.by_words(lexical.bm25), ["wordsim", "messages-fr"], size=10)
    assert row["wordsim"] == 0 and 0 <= row["messages-fr"] <= 1  # words alone are all different


def test_an_unknown_task_is_said():
    with pytest.raises(KeyError, match="'moon' is none of sts-b"):
        mini.drawn("moon")


def test_sizes_are_how_many_there_are_to_draw_from():
    sizes = {task.name: task.size for task in mini.MINI.tasks}
    assert sizes.pop("docstrings") is None  # of the Python that runs
    for name in ("headings", "messages-fr", "names-ru"):
        assert sizes.pop(name) == len(collections.pairs(name, "test"))
    chosen = [f in ("howto", "ref", "releases", "topics") for f in collections.folders("test")]
    counts = {"sections": sum(chosen), "lee": 50, "wordsim": len(collections.wordsim()[0])}
    counts |= {"polarity": len(collections.polarity()[0])}
    counts |= {"next verse": len(collections.triples("verses", "validation"))}
    counts |= {"kinds-fr": len(collections.names(["fr"], "test"))}
    counts |= {"sts-b": len(load_task("sts-b").test)}
    counts |= {"paraphrase": len(load_task("paraphrase").validation)}
    assert sizes == counts


# The study.


def test_a_tenth_holds_the_answers_and_no_more_than_a_tenth():
    draw = np.random.default_rng(0)
    found = [draw.normal(size=(4, 200)) for _ in range(2)]
    kept, k = study.tenth(found, np.arange(4), 20)
    assert set(range(4)) <= set(kept.tolist()) and len(kept) <= 20 and k >= 1
    more = mmteb.hard_negative_split([[q] for q in range(4)], found, k + 1)
    assert len(more) > 20


def test_splits_come_out_of_lists_with_their_numbers():
    one = study.split(100, 20)
    runs = [{"kind": "split", "seed": 20, **one}]
    runs.append({"kind": "cuts", "seed": 2} | {key: [at, 0, 0, 0] for at, key in enumerate(one)})
    rows = study.splits(runs)
    assert [row["seed"] for row in rows] == [20, 8, 9, 10, 11]
    assert [rows[1][key] for key in one] == list(range(len(one)))


def test_fewer_tasks_are_the_same_splits():
    told = study.sizes([100, 101])
    assert set(told) == {f"{n} {k}" for n in (10, 7) for k in ("predictable", "error", "random")}
    for keep in study.FEWER:
        rows = [study.split(number, keep) for number in (100, 101)]
        assert told[f"{keep} predictable"] == [row["predictable"] for row in rows]


def test_layers_of_one_pass_are_the_encoders():
    one, texts = study.small("tiny-1m"), ["In the beginning", "And God said, Let there be light"]
    both = study.vectors_of(one, texts, [None, 0])
    for place, layer in enumerate((None, 0)):
        alone = study.replace(one, layer=layer, normalize=False)(texts)
        assert np.allclose(both[place], alone.numpy(), atol=1e-5)


def test_the_mini_benchmarks_table_is_whole():
    names, table = study.table(Study(paper("mmteb")).runs())
    assert len(names) == 10 and table.shape == (10, 12) and np.isfinite(table).all()


def test_a_single_task_is_not_enough():
    rows = [row | {"kind": "split"} for row in study.splits(Study(paper("mmteb")).runs())]
    values = study.values([row | {"predictable": row["one"]} for row in rows])["halved"]
    assert judge(paper("mmteb").claim("halved"), values).verdict == NOT_REPRODUCED


# Exercises.


def without_ties(table):
    return (table[:, None] > table[None]).sum(1).mean(1)


def ties_as_wins(table):
    return (table[:, None] >= table[None]).sum(1).mean(1) - 1


def regardless_of_type(fits, types, threshold):
    return int(fits.argmax()) if fits.max() > threshold else -1


def without_threshold(fits, types, threshold):
    return exercises.next_to_go.reference(fits, types, -1.0)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("borda", without_ties),
        ("borda", ties_as_wins),
        ("borda", lambda table: table.mean(1)),
        ("next_to_go", regardless_of_type),
        ("next_to_go", without_threshold),
        ("most_opposed", exercises._pearson_pair),
        ("most_opposed", lambda table: exercises.most_opposed.reference(table)[::-1]),
    ],
)
def test_wrong_answers_fail(name, wrong):
    exercise = getattr(exercises, name)
    exercise.test(exercise.reference)
    with pytest.raises(Wrong):
        exercise.test(wrong)
