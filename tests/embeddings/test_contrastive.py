"""Contrastive losses against naive loops and sentence-transformers; cached gradients."""

import functools
import math

import pytest
import torch
from torch import nn

from lablib.embeddings.contrastive import grad_cache, hard_negatives, info_nce, matryoshka


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return [torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def naive(a, b, negatives=(), temperature=0.05):
    """Two loops, one sum at a time."""

    def similar(x, y):
        return math.exp((x @ y / x.norm() / y.norm()).item() / temperature)

    total = 0.0
    for i, x in enumerate(a):
        others = sum(similar(x, y) for y in b) + sum(similar(x, y) for y in negatives)
        total -= math.log(similar(x, b[i]) / others)
    return total / len(a)


def test_the_loss_is_the_naive_one(vectors):
    a, b, c = vectors
    assert math.isclose(info_nce(a, b).item(), naive(a, b), rel_tol=1e-12)
    assert math.isclose(info_nce(a, b, c, 0.1).item(), naive(a, b, c, 0.1), rel_tol=1e-12)
    assert math.isclose(info_nce(a, b, c[:2]).item(), naive(a, b, c[:2]), rel_tol=1e-12)
    both = (naive(a, b, c) + naive(b, a)) / 2
    assert math.isclose(info_nce(a, b, c, symmetric=True).item(), both, rel_tol=1e-12)
    with pytest.raises(ValueError, match=r"\(5, 8\) and \(4, 8\) are no pairs"):
        info_nce(a, b[:4])


def test_by_hand():
    a = torch.eye(2, dtype=torch.float64)
    assert math.isclose(info_nce(a, a, temperature=1.0).item(), math.log(1 + math.exp(-1)))
    assert info_nce(a, a, temperature=0.01).item() < 1e-6
    alike = torch.ones(4, 3, dtype=torch.float64)
    assert math.isclose(info_nce(alike, alike).item(), math.log(4))


class _Vectors(nn.Module):
    """What sentence-transformers' losses ask for: features that are vectors already."""

    def forward(self, features):
        return features

    def get_embedding_dimension(self):
        return 8


@pytest.fixture
def losses():
    st = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = _Vectors()
    model.truncate_dim = None

    def called(loss, *sides):
        return loss([{"sentence_embedding": side} for side in sides], None)

    return st, model, called


@pytest.mark.parametrize("n_negatives", [0, 1])
def test_the_loss_is_that_of_sentence_transformers(vectors, losses, n_negatives):
    st, model, called = losses
    sides = vectors[: 2 + n_negatives]
    theirs = called(st.MultipleNegativesRankingLoss(model, scale=20.0), *sides)
    assert math.isclose(theirs.item(), info_nce(*sides).item(), rel_tol=1e-6)
    wanted = torch.autograd.grad(theirs, sides)
    for ours, want in zip(torch.autograd.grad(info_nce(*sides), sides), wanted):
        torch.testing.assert_close(ours, want, atol=1e-6, rtol=1e-5)


def test_the_symmetric_loss_is_that_of_sentence_transformers(vectors, losses):
    st, model, called = losses
    a, b, _ = vectors
    theirs = called(st.MultipleNegativesSymmetricRankingLoss(model, scale=20.0), a, b)
    assert math.isclose(theirs.item(), info_nce(a, b, symmetric=True).item(), rel_tol=1e-6)


def test_matryoshka_is_that_of_sentence_transformers(vectors, losses):
    st, model, called = losses
    inner = st.MultipleNegativesRankingLoss(model, scale=20.0)
    theirs = st.MatryoshkaLoss(model, inner, [8, 4, 2], matryoshka_weights=[1, 0.5, 2])
    ours = matryoshka(info_nce, [8, 4, 2], [1, 0.5, 2])(*vectors)
    assert math.isclose(called(theirs, *vectors).item(), ours.item(), rel_tol=1e-6)


def test_matryoshka_is_a_sum_over_cut_vectors(vectors):
    a, b, _ = vectors
    loss = matryoshka(functools.partial(info_nce, temperature=0.2), [2, 8])
    wanted = naive(a[:, :2], b[:, :2], (), 0.2) + naive(a, b, (), 0.2)
    assert math.isclose(loss(a, b).item(), wanted, rel_tol=1e-9)
    with pytest.raises(ValueError, match="3 weights for 2 sizes"):
        matryoshka(info_nce, [2, 4], [1, 1, 1])
    with pytest.raises(ValueError, match="the vectors have 8 numbers, not 9"):
        matryoshka(info_nce, [9])(a, b)


def test_hard_negatives_are_the_nearest_that_are_not_ones_own():
    documents = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, -0.1]])
    queries = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert hard_negatives(queries, documents, [0, 2], 2).tolist() == [[1, 2], [1, 0]]
    # The second document is as near to the first query as a right answer: passed over.
    assert hard_negatives(queries, documents, [0, 2], 1, margin=0.05).tolist() == [[2], [1]]
    # With nothing else left it comes after all others.
    assert hard_negatives(queries, documents, [0, 2], 3, margin=0.05)[0].tolist() == [2, 3, 1]
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k is {k}: with 4 documents"):
            hard_negatives(queries, documents, [0, 2], k)


class _Embeds(nn.Sequential):
    """A network of ours, called as sentence-transformers calls its models."""

    def forward(self, features):
        return {"sentence_embedding": super().forward(features["input_ids"])}

    def get_embedding_dimension(self):
        return 4


@pytest.mark.parametrize("size", [3, 5, 10])
def test_cached_gradients_are_those_of_sentence_transformers(losses, size):
    st, _, _ = losses
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    sides = [torch.randn(10, 6, dtype=torch.float64) for _ in range(3)]
    model = _Embeds(network)
    loss = st.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=size)
    theirs = loss([{"input_ids": side} for side in sides], None)
    theirs.backward()
    wanted = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    ours = grad_cache(network, [side.split(size) for side in sides], info_nce)
    assert math.isclose(ours.item(), theirs.item(), rel_tol=1e-9)
    for parameter, want in zip(network.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, want, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("loss", [info_nce, matryoshka(info_nce, [2, 4])])
def test_cached_gradients_are_those_of_the_whole_batch(pieces, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    sides = [torch.randn(10, 6, dtype=torch.float64) for _ in range(3)]
    whole = loss(*map(model, sides))
    whole.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    value = grad_cache(model, [side.chunk(pieces) for side in sides], loss)
    assert not value.requires_grad and math.isclose(value.item(), whole.item(), rel_tol=1e-12)
    for parameter, want in zip(model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, want, atol=1e-12, rtol=1e-9)


def test_cached_dropout_draws_the_same_twice():
    """One piece a side is then the whole batch: the same masks give the same gradients."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 4)).double()
    sides = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    torch.manual_seed(3)
    info_nce(*map(model, sides)).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    grad_cache(model, [[side] for side in sides], info_nce)
    for parameter, want in zip(model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, want)
