"""Exercises of lab 201."""

import numpy as np

from lablib.exercises import Exercise, Wrong, expect, same_kind


def _n_states(vocabulary: int, context: int) -> int:
    return sum(vocabulary**length for length in range(1, context + 1))


def _test_n_states(candidate) -> None:
    random = np.random.default_rng()
    for vocabulary in random.permutation(np.arange(2, 7)).tolist()[:3]:
        context = int(random.integers(2, 7))
        wanted = _n_states(vocabulary, context)
        only = (
            f"that counts full contexts alone; prompts shorter than K = {context} are states, too"
        )
        expect(
            candidate(vocabulary, context),
            wanted,
            f"T = {vocabulary}, K = {context}: a state is a sequence of 1 to K tokens",
            known=[
                (vocabulary**context, only),
                (wanted + 1, "the empty sequence is no state: a model needs one token at least"),
            ],
        )


n_states = Exercise(
    reference=_n_states,
    test=_test_n_states,
    question="Which of these states can a text come back to once it is longer than the context?",
    hint="How many sequences of exactly one token are there, of exactly two, ..., of exactly K?",
    minutes=3,
    difficulty="easy",
)


def _stationary(matrix: np.ndarray) -> np.ndarray:
    share = np.full(len(matrix), 1 / len(matrix))
    for _ in range(2000):
        share = share @ matrix
    return share


def _test_stationary(candidate) -> None:
    matrix = np.random.default_rng().dirichlet(np.ones(4), size=4)
    found, wanted = candidate(matrix), _stationary(matrix)
    same_kind(found, wanted)
    if abs(found.sum() - 1) > 1e-6:
        raise Wrong(f"shares sum to 1; yours sum to {found.sum():.3f}")
    expect(
        found,
        wanted,
        f"One step changes yours from {found.round(3)} to {(found @ matrix).round(3)}; the "
        "stationary one stays. Rows are where you come from, so a step is share @ matrix",
    )


stationary = Exercise(
    reference=_stationary,
    test=_test_stationary,
    question="On which matrix of two states does repeating the step never settle, and why?",
    hint="Start with equal shares, take the step share @ matrix, and take it again until it stays.",
    minutes=6,
    difficulty="medium",
)


def _predict_next(prompt: np.ndarray, size: int) -> np.ndarray:
    before, after = prompt[:-1], prompt[1:]
    counts = np.bincount(after[before == prompt[-1]], minlength=size) + 1
    return counts / counts.sum()


def _test_predict_next(candidate) -> None:
    nothing = "Nothing has followed 1 yet, so add-one smoothing gives each symbol the same"
    expect(candidate(np.array([0, 1]), 3), np.full(3, 1 / 3), nothing)
    last = "Of 0, 1, 0 the pair (0, 1) tells what follows the last 0: shares of 1/3 and 2/3"
    expect(candidate(np.array([0, 1, 0]), 2), np.array([1, 2]) / 3, last)
    random = np.random.default_rng()
    prompt = random.integers(0, 3, size=40)
    prompt[:3] = prompt[-1], (prompt[-1] + 1) % 3, prompt[-1]
    expect(
        candidate(prompt, 3),
        _predict_next(prompt, 3),
        f"That is after {prompt[-1]}: count only what followed its earlier occurrences, then add "
        "one to each count",
        known=[(np.full(3, 1 / 3), "equal shares are right for an empty prompt alone")],
    )


predict_next = Exercise(
    reference=_predict_next,
    test=_test_predict_next,
    question="Which number in place of one would be better if you knew that rows are peaked?",
    hint="Where in prompt[:-1] does the last symbol occur, and what stands one place after it?",
    minutes=10,
    difficulty="open",
)
