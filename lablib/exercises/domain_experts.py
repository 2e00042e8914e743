"""Exercises of lab 308."""

import numpy as np

from lablib.exercises import Exercise, expect


def _tf_idf(counts: np.ndarray) -> np.ndarray:
    holders = (counts > 0).sum(0)  # documents with each word: (words,)
    idf = np.log((1 + len(counts)) / (1 + holders)) + 1
    table = counts * idf  # (documents, words)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


def _test_tf_idf(candidate) -> None:
    counts = np.array([[2.0, 0.0], [1.0, 1.0]])
    second = np.log(3 / 2) + 1
    length = np.hypot(1, second)
    wanted = np.array([[1.0, 0.0], [1 / length, second / length]])
    why = "Two documents. The first word is in both, its idf is ln(3/3) + 1 = 1; the second is in "
    why += "one, ln(3/2) + 1. Then each row is divided by its length"
    expect(candidate(counts), wanted, why)
    counts = np.random.default_rng().poisson(0.8, (7, 5)).astype(float)
    counts[:, 0] += 1  # no row is empty
    rare = np.log(8 / (1 + (counts > 0).sum(0))) + 1
    known = [
        (counts * rare, "divide each row by its length: long documents are not further away"),
        (counts / np.linalg.norm(counts, axis=1, keepdims=True), "these are counts alone: a word "
         "that is in every document weighs as much as a rare one"),
        (_by_occurrences(counts), "idf asks in how many documents a word is, not how often"),
    ]  # fmt: skip
    expect(candidate(counts), _tf_idf(counts), "counts * idf, then unit rows", known=known)


def _by_occurrences(counts: np.ndarray) -> np.ndarray:
    table = counts * (np.log((1 + len(counts)) / (1 + counts.sum(0))) + 1)
    return table / np.linalg.norm(table, axis=1, keepdims=True)


tf_idf = Exercise(
    reference=_tf_idf,
    test=_test_tf_idf,
    question="Every row has length 1. What is the largest squared distance that two can have?",
    hint="`(counts > 0).sum(0)` says in how many documents each word is. "
    "`np.linalg.norm(table, axis=1, keepdims=True)` are the lengths of the rows.",
    minutes=6,
    difficulty="easy",
)


def _best_exchange(cost: np.ndarray, labels: np.ndarray) -> float:
    now = cost[np.arange(len(cost)), labels]  # what each document costs: (n,)
    other = cost[:, labels]  # document i in document j's cluster: (n, n)
    saved = now[:, None] + now[None, :] - other - other.T  # if i and j exchange clusters
    return float(max(saved.max(), 0.0))


def _test_best_exchange(candidate) -> None:
    cost = np.array([[1.0, 5.0], [4.0, 2.0]])
    why = "Document 0 costs 5 in cluster 1, document 1 costs 4 in cluster 0; exchanged, 1 and 2"
    expect(candidate(cost, np.array([1, 0])), 6.0, why)
    why = "Both are where they cost least: no exchange saves anything, and 0 is returned"
    expect(candidate(cost, np.array([0, 1])), 0.0, why)
    draw = np.random.default_rng()
    hint = (
        "For documents i and j: what they cost now, minus cost[i, labels[j]] + cost[j, labels[i]]"
    )
    for _ in range(2):  # a rounded number can be right by chance once
        cost, labels = draw.random((9, 3)), draw.permutation(np.arange(9) % 3)
        now = cost[np.arange(9), labels]
        known = [(float((now - cost.min(1)).max()), "that is what one document saves by moving "
                  "alone, which leaves the clusters unequal: two must exchange")]  # fmt: skip
        expect(candidate(cost, labels), _best_exchange(cost, labels), hint, known=known)


best_exchange = Exercise(
    reference=_best_exchange,
    test=_test_best_exchange,
    question="Think of three: is what no exchange of two improves always the best assignment?",
    hint="`cost[:, labels]` holds at [i, j] what document i costs in the cluster of document j.",
    minutes=10,
    difficulty="medium",
)


def _by_likelihood(log_probs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    seen = np.cumsum(log_probs, axis=1) - log_probs  # log p(x_<t | D = j): (experts, tokens)
    score = seen + np.log(prior)[:, None]
    p = np.exp(score - score.max(0))  # Bayes' rule, up to a factor
    return (p / p.sum(0)).T  # (tokens, experts)


def _test_by_likelihood(candidate) -> None:
    log_probs = np.log(np.array([[0.5, 0.5], [0.1, 0.5]]))
    wanted = np.array([[0.5, 0.5], [5 / 6, 1 / 6]])
    why = (
        "Before the first token nothing is seen: the prior. The first token was 5 times as likely "
    )
    why += "for expert 0, so before the second it has 5 of 6 parts"
    expect(candidate(log_probs, np.array([0.5, 0.5])), wanted, why)
    draw = np.random.default_rng()
    log_probs = -draw.exponential(3.0, (3, 400))
    prior = draw.dirichlet(np.ones(3))
    right = _by_likelihood(log_probs, prior)
    ahead = np.exp(np.cumsum(log_probs, 1) - np.cumsum(log_probs, 1).max(0)) * prior[:, None]
    known = [
        ((ahead / ahead.sum(0)).T, "these weights have seen the token that they are to predict: "
         "leave each token's own probability out"),
        (np.tile(prior, (400, 1)), "that is the prior: what was read must change it"),
    ]  # fmt: skip
    hint = "Sum log-probabilities of the tokens before; 400 of them underflow as a product"
    expect(candidate(log_probs, prior), right, hint, known=known)


by_likelihood = Exercise(
    reference=_by_likelihood,
    test=_test_by_likelihood,
    question="It needs no clusters at inference. What does it need that distances do without?",
    hint="`np.cumsum(log_probs, axis=1) - log_probs` sums what came before each token. Subtract "
    "the largest score of a token before `np.exp`.",
    minutes=15,
    difficulty="open",
)
