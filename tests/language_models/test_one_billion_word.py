"""The benchmark's recipe, the models' distributions, EM, and the lab's exercises."""

import math
import random

import numpy as np
import pytest
import torch

from lablib.exercises import one_billion_word as exercises
from lablib.language_models import one_billion_word as lm
from lablib.language_models.kneser_ney import KneserNey
from lablib.language_models.lstm import LSTM, SentenceBatches
from lablib.language_models.maxent import MaxEnt
from lablib.language_models.vocabulary import END, Encoder


def corpus(seed: int, size: int) -> list[list[str]]:
    """Sentences of 1 to 9 words in which a word's successor is one of a few."""
    rng, made = random.Random(seed), []
    for _ in range(size):
        word, sentence = rng.randrange(40), []
        for _ in range(rng.randrange(1, 10)):
            sentence.append(f"w{word}")
            word = (word * 3 + rng.randrange(3)) % 40
        made.append(sentence)
    return made


@pytest.fixture(scope="module")
def data():
    return lm.benchmark(corpus(0, 1500), shards=10, seed=1)


def test_no_held_out_sentence_was_trained_on():
    sentences = corpus(0, 600) * 3
    made = lm.benchmark(sentences, min_count=1, shards=10, held_out_shards=3, seed=0)
    train = set(map(tuple, made.train))
    held_out = [tuple(s) for shard in made.held_out for s in shard]
    assert len(made.held_out) == 3
    assert len(train) + len(held_out) == len(set(map(tuple, sentences)))
    unknown = [s for s in held_out if lm.UNKNOWN in s]
    assert not train & (set(held_out) - set(unknown))


def test_the_vocabulary_counts_training_text_only():
    made = lm.benchmark(corpus(0, 600), min_count=3, shards=5, seed=0)
    counts = {w: sum(s.count(w) for s in made.train) for w in made.vocabulary[2:]}
    assert made.vocabulary[:2] == [lm.UNKNOWN, END]
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert min(counts.values()) >= 3
    words = [w for shard in made.held_out for s in shard for w in [*s, END]]
    assert set(words) <= set(made.vocabulary)
    assert made.oov_rate == words.count(lm.UNKNOWN) / len(words)


def test_seeds_shuffle_differently_and_repeatably():
    first, again, other = (lm.benchmark(corpus(0, 300), shards=5, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.train != other.train


def test_training_words_can_be_limited():
    made = lm.benchmark(corpus(0, 600), shards=5, train_words=500, seed=0)
    assert 480 < sum(len(sentence) + 1 for sentence in made.train) <= 500


def test_too_few_sentences_say_so():
    with pytest.raises(ValueError, match=r"can't fill 100 shards"):
        lm.benchmark(corpus(0, 50))


@pytest.fixture(scope="module")
def models(data):
    torch.manual_seed(0)
    lstm = LSTM(data.vocabulary, width=16, hidden=16, dropout=0.0)
    optimizer = torch.optim.AdamW(lstm.parameters(), lr=2e-2)
    batches = SentenceBatches(data.train, lstm.encode, size=256)
    for _ in range(3):
        for batch in batches:
            optimizer.zero_grad()
            lstm.loss(batch).backward()
            optimizer.step()
    maxent = MaxEnt(data.vocabulary, bits=12).fit(data.train, size=256)
    return KneserNey(3).fit(data.train), lstm, maxent


def test_every_model_learns_what_the_chain_allows(data, models):
    test = data.held_out[1]
    for model in models:
        assert 3 < lm.perplexity(model.word_logprobs(test)) < 12  # three ways on, unknown ends


@pytest.mark.parametrize("context", [[], ["w3"], ["w3", "w9", "never-seen"], ["w1"] * 7])
def test_distributions_sum_to_one_and_agree_with_scores(data, models, context):
    for model in models:
        words = model.vocabulary if isinstance(model, KneserNey) else data.vocabulary
        probs = model.distribution(context)
        assert probs.shape == (len(words),)
        assert probs.sum() == pytest.approx(1, abs=1e-5)
        for word in ("w5", "w0"):
            scored = model.word_logprobs([[*context, word]])[len(context)]
            assert math.log(probs[words.index(word)]) == pytest.approx(scored, abs=1e-4)


def test_models_score_the_same_words_in_the_same_order(data, models):
    test = [*data.held_out[0], []]
    words = sum(len(sentence) + 1 for sentence in test)
    for model in models:
        found = model.word_logprobs(test)
        assert found.shape == (words,)
        assert found[-1] == pytest.approx(model.word_logprobs([[]])[0], abs=1e-5)
        whole = np.concatenate([model.word_logprobs([sentence]) for sentence in test[:20]])
        assert whole == pytest.approx(found[: len(whole)], abs=1e-4)


def test_batches_hold_every_sentence_once_in_new_order(data):
    encode = Encoder(data.vocabulary)
    batches = SentenceBatches(data.train, encode, size=128)
    first, second = list(batches), list(batches)
    rows = sorted(tuple(i for i in row.tolist() if i >= 0) for batch in first for row in batch)
    assert rows == sorted(tuple(encode(sentence)) for sentence in data.train)
    assert [b.shape for b in first] != [b.shape for b in second]
    assert max(batch[:, 1:].numel() for batch in first) <= 128


def test_em_finds_what_direct_optimization_finds(data, models):
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    logprobs = np.stack([model.word_logprobs(data.held_out[0]) for model in models])
    weights = lm.em_weights(logprobs)

    def loss(free):
        return -logsumexp(logprobs, axis=0, b=free[:, None]).mean()

    simplex = {"type": "eq", "fun": lambda free: free.sum() - 1}
    start, bounds = np.full(3, 1 / 3), [(1e-12, 1)] * 3
    best = minimize(loss, start, bounds=bounds, constraints=simplex, tol=1e-14)
    assert -lm.mixture(logprobs, weights).mean() == pytest.approx(best.fun, abs=1e-7)
    assert weights == pytest.approx(best.x, abs=1e-3)
    assert weights.sum() == pytest.approx(1)


def test_no_step_of_em_makes_the_words_less_probable():
    random = np.random.default_rng(0)
    probs, weights, before = random.uniform(1e-6, 1, (4, 50)), np.full(4, 0.25), -np.inf
    for _ in range(40):
        weights = lm.em_step(probs, weights)
        now = lm.mixture(np.log(probs), weights).sum()
        assert now >= before - 1e-12 and weights.sum() == pytest.approx(1)
        before = now


def test_mixture_of_one_model_is_that_model():
    logprobs = np.log([[0.2, 0.5, 1e-300], [0.1, 0.1, 0.3]])
    assert lm.mixture(logprobs, [1, 0]) == pytest.approx(logprobs[0])
    assert lm.em_weights(logprobs[:1]) == pytest.approx([1])
    assert lm.perplexity(np.log([0.25, 0.25])) == pytest.approx(4)


def test_odd_input_says_what_is_wrong():
    with pytest.raises(ValueError, match="do not fit"):
        lm.mixture(np.zeros((2, 3)), [1])
    for weights in ([1, 0.5], [1.5, -0.5], [np.nan, 1]):
        with pytest.raises(ValueError, match="at least 0 and sum to 1"):
            lm.mixture(np.zeros((2, 3)), weights)
    with pytest.raises(ValueError, match="probability 0 under every model"):
        lm.em_weights(np.full((2, 3), -np.inf))
    with pytest.raises(ValueError, match="must be"):
        lm.em_weights(np.zeros(3))


def _counts_as_n(counts):
    n = [0, *counts[:4]]
    y = n[1] / (n[1] + 2 * n[2])
    return tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))


def _off_by_one(counts):
    n = [counts.count(k) for k in range(6)]
    y = n[1] / (n[1] + 2 * n[2])
    return tuple(k - k * y * n[k + 1] / n[k] for k in (1, 2, 3))


def _one_discount(counts):
    n = [counts.count(k) for k in range(6)]
    return n[1] / (n[1] + 2 * n[2])


def _not_normalized(logprobs, weights):
    return (weights[:, None] * np.exp(logprobs)).mean(1)


def _ignores_old_weights(logprobs, weights):
    probs = np.exp(logprobs)
    return (probs / probs.sum(0)).mean(1)


def _forgets_the_exponential(logprobs, weights):
    owed = weights[:, None] * logprobs
    return (owed / owed.sum(0)).mean(1)


def _peeks(logprobs, words, weight, window, size):
    made = []
    for i, word in enumerate(words):
        recent = words[max(0, i - window) : i + 1]
        made.append(
            np.log((1 - weight) * np.exp(logprobs[i]) + weight * recent.count(word) / len(recent))
        )
    return np.array(made)


def _never_forgets(logprobs, words, weight, window, size):
    made = []
    for i, word in enumerate(words):
        share = words[:i].count(word) / i if i else 1 / size
        made.append(np.log((1 - weight) * np.exp(logprobs[i]) + weight * share))
    return np.array(made)


WRONG = {
    "discounts": [_counts_as_n, _off_by_one, _one_discount],
    "em_step": [_not_normalized, _ignores_old_weights, _forgets_the_exponential],
    "cached": [_peeks, _never_forgets],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_lstm_learns_under_autocast():
    torch.manual_seed(0)
    lstm = LSTM([END, "a", "b", "c", "d"], width=4, hidden=4, dropout=0.0)
    batch = torch.tensor([[0, 1, 2, 3, 0], [0, 4, 0, -1, -1]])
    exact = lstm.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lstm.loss(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), abs=0.02)
    assert lstm.embedding.weight.grad.abs().sum() > 0
