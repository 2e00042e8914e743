"""Exercises of lab 1007."""

import random

import numpy as np

from lablib.exercises import Exercise, expect


def _borda(scores):
    points = np.zeros(len(scores))
    for column in scores.T:
        for model, score in enumerate(column):
            points[model] += (score > column).sum() + 0.5 * ((score == column).sum() - 1)
    return points / scores.shape[1]


def _test_borda(candidate) -> None:
    why = "one task, scores 3, 1, 3: the first beats the second and ties with the third"
    expect(candidate(np.array([[3.0], [1.0], [3.0]])), np.array([1.5, 0.0, 1.5]), why)
    for _ in range(3):
        n_tasks = random.choice((3, 6, 7))
        scores = np.random.randint(0, 4, (random.randint(4, 7), n_tasks)) / 4
        scores[:2, 0], scores[2, 0] = 0.5, 0.25  # a tie and a win in any case
        right = _borda(scores)
        half = [sum((s == c).sum() - 1 for s, c in zip(row, scores.T)) / n_tasks for row in scores]
        half = np.array(half) / 2
        known = [
            (right + 0.5, "a model doesn't tie with itself"),
            (right + half, "a tie is worth half a point to each, not a whole one"),
            (right - half, "a tie is worth half a point, not nothing"),
            (right * n_tasks, "on average over the tasks: divide by how many there are"),
        ]
        why = "On each task: one point for a model that is beaten, half for a tie"
        expect(candidate(scores.copy()), right, why, known=known)


borda = Exercise(
    reference=_borda,
    test=_test_borda,
    question="How many points do all models share on one task, and does a tie change that?",
    hint="For one task compare a model's score with the whole column: `>` counts whom it beats, "
    "`==` whom it ties with, itself among them.",
    minutes=8,
    difficulty="easy",
)


def _next_to_go(fits, types, threshold):
    order = np.argsort(-fits, kind="stable")
    free = [task for task in order if (types == types[task]).sum() > 1]
    if not free or fits[free[0]] <= threshold:
        return -1
    return int(free[0])


def _test_next_to_go(candidate) -> None:
    fits, types = np.array([0.9, 0.97, 0.93]), np.array([0, 1, 0])
    why = "task 1 is foretold best, but it is the last of its type; of the others task 2 is"
    expect(candidate(fits, types, 0.5), 2, why)
    expect(candidate(fits, types, 0.95), -1, "task 2 is not above a threshold of 0.95: nobody goes")
    for _ in range(4):
        n = random.randint(6, 12)
        fits = np.random.permutation(np.linspace(0.5, 0.99, n))
        types = np.concatenate([np.random.randint(0, 3, n - 1), [3]])
        fits[-1] = 0.995  # the last of its type is foretold best of all
        best = int(fits[:-1].argmax())
        for threshold in (0.6, random.uniform(0.9, 0.98), 0.992):
            right = _next_to_go(fits, types, threshold)
            known = [(n - 1, "the last task of a type stays, however well it is foretold")]
            if right == -1:
                known += [(best, "none that may go lies above the threshold: -1")]
            why = "The best foretold of those with another task of their type, if above"
            expect(candidate(fits.copy(), types.copy(), threshold), right, why, known=known)


next_to_go = Exercise(
    reference=_next_to_go,
    test=_test_next_to_go,
    question="With a rule that spared no type, which type of MTEB(eng, v2) would be gone first?",
    hint="Count how often each task's type occurs, leave out those with a count of 1, then look "
    "at the best of the rest.",
    minutes=10,
    difficulty="medium",
)


def _most_opposed(scores):
    ranks = scores.argsort(0).argsort(0).astype(float)
    ranks -= ranks.mean(0)
    ranks /= np.sqrt((ranks**2).sum(0))
    together = ranks.T @ ranks
    first, second = np.unravel_index(together.argmin(), together.shape)
    return int(min(first, second)), int(max(first, second))


def _pearson_pair(scores):
    together = np.corrcoef(scores.T)
    first, second = np.unravel_index(together.argmin(), together.shape)
    return int(min(first, second)), int(max(first, second))


def _test_most_opposed(candidate) -> None:
    scores = np.array([[1.0, 3.0, 1.5], [2.0, 2.0, 2.5], [3.0, 1.0, 2.0], [4.0, 0.0, 9.0]])
    expect(candidate(scores), (0, 1), "tasks 0 and 1 rank these four models in opposite orders")
    made = 0
    while made < 4:
        n_models, n_tasks = random.randint(6, 9), random.randint(4, 7)
        scores = np.random.rand(n_models, n_tasks)
        scores[0] *= 30  # one model far out: values and ranks disagree
        right, other = _most_opposed(scores), _pearson_pair(scores)
        if right == other:
            continue
        made += 1
        known = [
            (other, "that pair is opposed in its values; ranks are asked for"),
            (right[::-1], "the smaller place first"),
        ]
        why = "Rank the models on each task, then correlate the ranks of each two tasks"
        expect(candidate(scores.copy()), right, why, known=known)


most_opposed = Exercise(
    reference=_most_opposed,
    test=_test_most_opposed,
    question="Two tasks rank models in opposite orders. Does a benchmark need both, one, or none?",
    hint="`scores.argsort(0).argsort(0)` are ranks when no scores tie. Correlate them.",
    minutes=10,
    difficulty="medium",
)
