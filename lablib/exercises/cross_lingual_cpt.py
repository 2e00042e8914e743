"""Exercises of lab 410."""

import math

import numpy as np

from lablib.exercises import Exercise, expect


def _tokens_saved(tokens, loss, from_scratch, losses):
    logs = np.interp(-loss, -np.asarray(losses), np.log(from_scratch))
    return math.exp(logs) - tokens


def _test_tokens_saved(candidate) -> None:
    scratch, losses = np.array([1.0, 4.0]), np.array([3.0, 2.0])
    why = "loss 2.5 is halfway from 3 to 2, so halfway from 1 to 4 in logarithms: at 2"
    expect(candidate(0.5, 2.5, scratch, losses), 1.5, why)
    random = np.random.default_rng()
    scratch = np.array([2.0, 4.0, 8.0, 16.0]) * random.uniform(0.5, 2)
    losses = 4 - np.cumsum(random.uniform(0.3, 0.6, 4))
    place = random.integers(3)
    loss = losses[place] + random.uniform(0.3, 0.7) * (losses[place + 1] - losses[place])
    right = _tokens_saved(0.9, loss, scratch, losses)
    known = [
        (right + 0.9, "that is what the fresh model reads; how much less did the other read?"),
        (-right, "what the fresh model reads minus what the other read"),
        (right / (right + 0.9), "that is the share; the amount is asked for"),
        (np.interp(-loss, -losses, scratch) - 0.9, "interpolate between logarithms of tokens"),
        (np.exp(np.interp(loss, losses, np.log(scratch))) - 0.9, "`np.interp` wants rising x"),
    ]
    why = "find where the fresh model has that loss, and subtract what the other read"
    expect(candidate(0.9, loss, scratch, losses), right, why, known=known)


tokens_saved = Exercise(
    reference=_tokens_saved,
    test=_test_tokens_saved,
    question="And if the loss lies below all that the fresh model has reached?",
    hint="`np.interp` wants rising x: interpolate `np.log(from_scratch)` over `-losses`.",
    minutes=10,
    difficulty="medium",
)


def _crossing(one, other):
    (c, a), (d, b) = one, other
    return (d / c) ** (1 / (a - b))


def _test_crossing(candidate) -> None:
    why = "2 C^0.5 and 8 C^0.3 are equal where C^0.2 = 4: at 1,024"
    expect(candidate((2.0, 0.5), (8.0, 0.3)), 1024.0, why)
    random = np.random.default_rng()
    c, d = random.uniform(1, 2), random.uniform(3, 6)
    a, b = random.uniform(0.8, 0.9), random.uniform(0.3, 0.4)
    right = _crossing((c, a), (d, b))
    known = [
        ((c / d) ** (1 / (a - b)), "below 1? one of the two quotients is upside down"),
        ((d / c) ** (a - b), "C^(a - b) = d / c: now take the root"),
        (math.log(right), "that is its logarithm"),
    ]
    why = "c C^a = d C^b, so C^(a - b) = d / c"
    expect(candidate((c, a), (d, b)), right, why, known=known)


crossing = Exercise(
    reference=_crossing,
    test=_test_crossing,
    question="How far does the crossing move when one exponent is wrong by 0.005?",
    hint="Divide both sides by C^b and by c.",
    minutes=6,
    difficulty="easy",
)


def _english_text(new, ratio):
    return new * ratio / (1 - ratio)


def _test_english_text(candidate) -> None:
    why = "9 KiB of Chichewa and 1 of English: a tenth of 10"
    expect(candidate(9.0, 0.1), 1.0, why)
    random = np.random.default_rng()
    new, ratio = random.uniform(2, 9), random.uniform(0.1, 0.4)
    right = _english_text(new, ratio)
    known = [
        (new * ratio, "the share is of all that is read, not of the Chichewa"),
        (new + right, "that is all that is read"),
        (new / (1 - ratio), "that is all that is read"),
    ]
    expect(candidate(new, ratio), right, "English / (English + new) = ratio", known=known)


english_text = Exercise(
    reference=_english_text,
    test=_test_english_text,
    question="Half of all is English: how much longer does the training take?",
    hint="Solve x / (x + new) = ratio for x.",
    minutes=5,
    difficulty="easy",
)


def _detour(model, read, loss, english, chichewa, hebrew):
    def after(*texts):
        reader = model
        for text in (*texts, hebrew):  # a training each; the Hebrew comes last, and is the same
            reader = read(reader, text)
        return loss(reader)

    by_chichewa = after(chichewa)
    return after() - by_chichewa, after(english[: len(chichewa)]) - by_chichewa


def _test_detour(candidate) -> None:
    def add(model, text):
        return model / 2 + float(text.sum())

    texts = [np.array(text) for text in ([2.0, 2.0, 2.0], [4.0, 4.0], [3.0])]
    why = "A reading halves the model and adds the text: 4 becomes 5, by Chichewa 8, by English 6"
    _expect_gains(candidate, why, 4.0, add, lambda model: 100 - model, *texts)
    random = np.random.default_rng()
    start = random.dirichlet(np.full(8, 5.0))
    *texts, unseen = (random.integers(8, size=n) for n in (30, 12, 10, 20))

    def read(model, text):
        for place, letter in enumerate(text):  # the rate falls to 0 in each training
            rate = 0.3 * (1 - place / len(text))
            model = (1 - rate) * model + rate * np.eye(8)[letter]
        return model

    def loss(model):
        return float(-np.log(model[unseen]).mean())

    why = "three models: Hebrew alone, Chichewa and Hebrew, as much English and Hebrew"
    _expect_gains(candidate, why, start, read, loss, *texts)


def _expect_gains(candidate, why, model, read, loss, english, chichewa, hebrew) -> None:
    """Raise Wrong unless the candidate's gains are right."""

    def gains(direct, by_english, by_chichewa):
        least = loss(by_chichewa)
        return loss(direct) - least, loss(by_english) - least

    detours = english[: len(chichewa)], chichewa
    early = [read(model, text) for text in detours]
    direct, *late = (read(reader, hebrew) for reader in (model, *early))
    longer = read(read(model, english), hebrew)
    turned = [read(direct, text) for text in detours]
    at_once = [read(model, np.concatenate([text, hebrew])) for text in detours]
    right = first, second = gains(direct, *late)
    known = [
        ((-first, -second), "above 0 where Chichewa helps: subtract the loss of the model with it"),
        ((second, first), "first the gain over no detour, then that over as much English"),
        (gains(direct, longer, late[1]), "as much English as there is Chichewa, and no more"),
        (gains(model, *early), "all three read the Hebrew before they are judged"),
        (gains(direct, early[0], late[1]), "the one with more English must read Hebrew, too"),
        (gains(direct, direct, late[1]), "the second rival reads on in English before the Hebrew"),
        (gains(direct, *turned), "the Hebrew comes last"),
        (gains(direct, *at_once), "two trainings, one after the other: each has its own schedule"),
    ]
    found = candidate(model, read, loss, english, chichewa, hebrew)
    expect(found, right, why, known=known)


detour = Exercise(
    reference=_detour,
    test=_test_detour,
    question="Run it with `study.build`, `study.read` and `study.text`, for several seeds: which "
    "of the two gains tells whether a second foreign language is cheaper than the first?",
    hint="`read(read(model, chichewa), hebrew)`. What else has changed, beside the language?",
    minutes=20,
    difficulty="open",
)
