from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

from lablib.exercises import domain_experts as exercises
from lablib.experts import clusters
from lablib.experts import domain_experts as de
from lablib.models import GPT, GPTConfig

TEXTS = (
    "The king is dead. Long live the king!",
    "the queen and the king, 1603",
    "def sort(values): return sorted values",
    "values are sorted; the queen returns",
)


def small(**options):
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "dim": 8, "n_layers": 1, "n_heads": 2, "max_length": 16}
    return GPT(GPTConfig(**sizes | options))


def drawn(n, clusters, seed=0):
    return np.random.default_rng(seed).random((n, clusters)) * 2


def test_words_are_lower_case_letters_alone():
    assert clusters.words("The King's 2 ROSES_red, é ça") == ["the", "king", "roses", "red", "ça"]


# Of TfidfVectorizer(token_pattern=r"(?u)[^\W\d_]{2,}") of scikit-learn 1.9.1 on TEXTS.
RECORDED = {
    "dead": [0.35101740970748097, 0.0, 0.0, 0.0],
    "king": [0.5534923152870045, 0.4006257940667448, 0.0, 0.0],
    "sorted": [0.0, 0.0, 0.31901031892144127, 0.3814413283612338],
    "the": [0.4480997313625986, 0.648682215597334, 0.0, 0.3088096294175862],
}


def test_tf_idf_is_what_scikit_learn_gives():
    embedding = clusters.fit_embedding(TEXTS, dim=2, rare=1, common=1.0)
    table = embedding.tf_idf(TEXTS).toarray()
    for word, column in RECORDED.items():
        assert table[:, embedding.vocabulary[word]] == pytest.approx(column)


def test_embeddings_are_the_best_two_directions_and_unit_long():
    embedding = clusters.fit_embedding(TEXTS, dim=2, rare=1, common=1.0)
    table = embedding.tf_idf(TEXTS).toarray()
    _, s, v = np.linalg.svd(table)
    kept = table @ embedding.components
    assert np.linalg.norm(kept, axis=0) == pytest.approx(s[:2])
    assert np.abs(np.diag(embedding.components.T @ v[:2].T)) == pytest.approx(np.ones(2))
    rows = embedding([*TEXTS, "12 unknown"])
    assert rows.dtype == np.float32
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1, 1, 1, 0], abs=1e-6)


def test_rare_and_common_words_are_left_out():
    kept = clusters.fit_embedding(TEXTS, dim=1, rare=2, common=0.6).vocabulary
    assert "dead" not in kept and "the" not in kept and "king" in kept
    with pytest.raises(ValueError, match="don't span"):
        clusters.fit_embedding(TEXTS, dim=50)


def test_squared_distances_are_those_of_the_definition():
    x, centers = drawn(7, 3), drawn(4, 3, 1)
    found = clusters.squared_distances(x, centers)
    assert found == pytest.approx(((x[:, None] - centers) ** 2).sum(-1))
    assert (clusters.nearest(x, centers) == found.argmin(1)).all()


@pytest.mark.parametrize(("n", "k"), [(12, 3), (13, 3), (40, 8), (41, 8), (5, 5), (7, 1), (300, 4)])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_balanced_assignment_is_the_best_within_its_bound(n, k, tolerance):
    cost = drawn(n, k, n)
    labels = clusters.balanced_assignment(cost, tolerance)
    places = -(-n // k)
    assert np.bincount(labels, minlength=k).max() <= places
    rows, columns = linear_sum_assignment(np.repeat(cost, places, axis=1))
    best = cost[rows, columns // places].sum()
    found = cost[np.arange(n), labels].sum()
    assert best - 1e-9 <= found <= best + n * tolerance
    if k > 1 and n > 12:
        assert found > cost.min(1).sum(), "places are short here"


def test_balanced_assignment_ends_when_all_costs_are_alike():
    labels = clusters.balanced_assignment(np.ones((20, 4)))
    assert sorted(np.bincount(labels)) == [5, 5, 5, 5]


def test_kmeans_ends_where_centers_are_means_and_rows_at_their_nearest():
    x = np.random.default_rng(5).normal(0, 1, (60, 2)) + 6 * np.eye(2)[np.arange(60) % 2]
    centers, free = clusters.kmeans(x, 3, seed=2, balanced=False, rounds=100)
    assert (free == clusters.nearest(x, centers)).all()
    balanced, even = clusters.kmeans(x, 3, seed=2)
    assert np.bincount(even).tolist() == [20, 20, 20] != np.bincount(free).tolist()
    for middles, labels in ((centers, free), (balanced, even)):
        assert middles == pytest.approx(np.stack([x[labels == j].mean(0) for j in range(3)]))
    with pytest.raises(ValueError, match="can't fill"):
        clusters.kmeans(x, 61)


def test_top_words_tell_a_cluster_from_the_others():
    embedding = clusters.fit_embedding(TEXTS, dim=3, rare=1, common=1.0)
    vectors = embedding(TEXTS)
    centers = np.stack([vectors[:2].mean(0), vectors[2:].mean(0)])
    kings, code = clusters.top_words(embedding, centers, 3)
    assert "king" in kings and "values" in code


def test_expert_weights_are_the_formula():
    distances = torch.rand(5, 4) * 2
    weights = de.expert_weights(distances, 0.3)
    powers = (-distances / 0.3).exp()
    torch.testing.assert_close(weights, powers / powers.sum(1, keepdim=True))
    two = de.expert_weights(distances, 0.3, top_k=2)
    for row, few in zip(weights, two):
        kept = row.argsort(descending=True)[:2]
        assert set(few.nonzero()[:, 0].tolist()) == set(kept.tolist())
        torch.testing.assert_close(few[kept], row[kept] / row[kept].sum())
    assert torch.equal(de.expert_weights(distances, 0.3, top_k=9), weights)


def test_the_ensemble_is_the_mixture_of_probabilities():
    experts = [small() for _ in range(3)]
    for shift, expert in enumerate(experts):
        torch.nn.init.normal_(expert.embedding.weight, std=0.5 + shift)
    tokens = torch.randint(40, (6, 11))
    weights = de.expert_weights(torch.rand(6, 3), 0.5, top_k=2)
    log_p = de.SparseEnsemble(experts)(tokens[:, :-1], weights)
    by_hand = torch.zeros(6, 10, 40)
    for row in range(6):
        for j, expert in enumerate(experts):
            by_hand[row] += weights[row, j] * expert(tokens[row : row + 1, :-1])[0].softmax(-1)
    torch.testing.assert_close(log_p.exp(), by_hand)
    told = de.target_log_probs(experts, tokens, batch=4)
    loss = de.ensemble_loss(told, weights)
    torch.testing.assert_close(loss, F.nll_loss(log_p.mT, tokens[:, 1:], reduction="none"))


def test_experts_that_nobody_asks_are_not_computed():
    class Deaf(nn.Module):
        def forward(self, tokens):
            raise AssertionError("was asked")

    weights = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    model = small()
    tokens = torch.randint(40, (2, 5))
    log_p = de.SparseEnsemble([Deaf(), model])(tokens, weights)
    torch.testing.assert_close(log_p, model(tokens).log_softmax(-1))


def test_experts_trained_in_two_processes_are_those_trained_in_one():
    model = small()
    parts = [np.random.default_rng(j).integers(20 * j, 20 * j + 20, 600) for j in range(2)]
    options = {"steps": 3, "lr": 1e-2, "batch_size": 4, "length": 8, "seed": 1}
    alone = de.train_experts(model, parts, **options)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
        apart = de.train_experts(model, parts, executor=executor, **options)
    for here, there in zip(alone, apart):
        for one, other in zip(here.parameters(), there.parameters()):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert not torch.equal(alone[0].embedding.weight, alone[1].embedding.weight)
    assert torch.equal(model.embedding.weight, small().embedding.weight), "the seed model stays"


def test_contexts_end_where_what_is_judged_begins():
    documents = np.arange(80).reshape(2, 40)
    rows, contexts = de.inside(documents, places=(1, 3), window=8)
    assert rows.shape == (4, 9) and rows[0].tolist() == list(range(8, 17))
    assert contexts[0].tolist() == list(range(9)) and contexts[3].tolist() == list(range(40, 65))
    assert all(context[-1] == row[0] for context, row in zip(contexts, rows))


def test_parts_hold_each_document_once():
    documents = de.pieces(np.arange(103), 10)
    assert documents.shape == (10, 10)
    labels = np.arange(10) % 3
    parts = de.parts_of(documents, labels, 3)
    assert sorted(np.concatenate(parts)) == list(range(100))
    assert parts[1].tolist() == [*range(10, 20), *range(40, 50), *range(70, 80)]


def test_purity_is_the_share_of_the_commonest_domain():
    labels, domain = np.array([0, 0, 0, 1, 1]), np.array([2, 2, 0, 1, 1])
    assert de.purity(labels, domain) == 4 / 5


def idf_alone(counts):
    return counts * (np.log((1 + len(counts)) / (1 + (counts > 0).sum(0))) + 1)


def tf_alone(counts):
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def without_one(counts):
    table = counts * np.log((1 + len(counts)) / (1 + (counts > 0).sum(0)))
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)


def sums_to_one(counts):
    table = idf_alone(counts)
    return table / table.sum(1, keepdims=True)


def moves_alone(cost, labels):
    return float((cost[np.arange(len(cost)), labels] - cost.min(1)).max())


def forgets_zero(cost, labels):
    now = cost[np.arange(len(cost)), labels]
    other = cost[:, labels]
    saved = now[:, None] + now[None, :] - other - other.T
    np.fill_diagonal(saved, -9.0)
    return float(saved.max())


def counts_one_side(cost, labels):
    now = cost[np.arange(len(cost)), labels]
    return float(max((now[:, None] - cost[:, labels]).max(), 0.0))


def sees_the_token(log_probs, prior):
    score = np.cumsum(log_probs, 1) + np.log(prior)[:, None]
    p = np.exp(score - score.max(0))
    return (p / p.sum(0)).T


def the_prior(log_probs, prior):
    return np.tile(prior, (log_probs.shape[1], 1))


def without_prior(log_probs, prior):
    return exercises._by_likelihood(log_probs, np.ones(len(prior)))


def underflows(log_probs, prior):
    seen = np.cumsum(log_probs, axis=1) - log_probs
    p = np.exp(seen) * prior[:, None]
    return (p / np.maximum(p.sum(0), 1e-300)).T


WRONG = {
    "tf_idf": [idf_alone, tf_alone, without_one, sums_to_one],
    "best_exchange": [moves_alone, forgets_zero, counts_one_side],
    "by_likelihood": [sees_the_token, the_prior, without_prior, underflows],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
