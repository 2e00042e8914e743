"""Exercises of lab 1002."""

import random

import numpy as np

from lablib.exercises import Exercise, expect


def _last_state(states, mask):
    places = np.arange(mask.shape[1])
    last = (mask * places).max(1)
    return states[np.arange(len(mask)), last]


def _padded(lengths, width, sides):
    mask = np.zeros((len(lengths), width), dtype=bool)
    for row, (length, left) in enumerate(zip(lengths, sides)):
        mask[row, width - length if left else 0 : width if left else length] = True
    return mask


def _test_last_state(candidate) -> None:
    for sides in ((0, 0, 0), (1, 1, 1), (1, 0, 1)):
        lengths = [*random.sample(range(2, 7), 2), 8]
        mask = _padded(lengths, 8, sides)
        states = np.random.randn(3, 8, 4)
        wanted = _last_state(states, mask)
        padding = "behind" if not any(sides) else "in front" if all(sides) else "on either side"
        counted = states[np.arange(3), mask.sum(1) - 1]
        known = [
            (states[:, -1], "the last column is padding where the padding is behind"),
            (counted, "counting the tokens finds the last only where the padding is behind"),
            (states[np.arange(3), mask.argmax(1)], "that is the first token of each text"),
            ((states * mask[..., None]).sum(1) / mask.sum(1)[:, None], "one state, not the mean"),
        ]
        why = f"Here the padding is {padding}; find the last column where a row's mask is True"
        expect(candidate(states.copy(), mask.copy()), wanted, why, known=known)


last_state = Exercise(
    reference=_last_state,
    test=_test_last_state,
    question="With padding in front the answer is the last column. What does the model need to be "
    "told so that the states there are the same?",
    hint="Number the columns, and let padding count as column 0: which number of a row is highest?",
    minutes=6,
    difficulty="easy",
)


def _spearman(x, y):
    def ranks(v):
        below = (v < v[:, None]).sum(1)
        same = (v == v[:, None]).sum(1)
        return below + (same + 1) / 2

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def _in_order(v):
    return np.argsort(np.argsort(v, kind="stable"))


def _test_spearman(candidate) -> None:
    x, y = np.array([1.0, 2.0, 2.0, 9.0]), np.array([0.1, 0.3, 0.2, 0.4])
    why = "of 1, 2, 2, 9 the ranks are 1, 2.5, 2.5 and 4: ties share the mean of their ranks"
    for _ in range(3):
        known = [
            (float(np.corrcoef(x, y)[0, 1]), "that is Pearson's, of the values and not the ranks"),
            (
                float(np.corrcoef(_in_order(x), _in_order(y))[0, 1]),
                "ties take the order they stand in; they share the mean of their ranks",
            ),
            (
                float(np.corrcoef(*((v < v[:, None]).sum(1) for v in (x, y)))[0, 1]),
                "tied values share the lowest rank here; it is the mean of their ranks",
            ),
        ]
        expect(candidate(x.copy(), y.copy()), _spearman(x, y), why, known=known)
        n = random.randint(9, 15)
        x, y = np.random.randint(0, 6, n).astype(float), np.exp(np.random.randn(n))
        y[:3] = y[3]


spearman = Exercise(
    reference=_spearman,
    test=_test_spearman,
    question="People rate pairs from 0 to 5, cosines lie near 1. Why compare ranks?",
    hint="The rank of a value: how many are smaller, and half of one more than how many are equal.",
    minutes=10,
    difficulty="medium",
)


def _dictionary(functions):
    pairs = []
    for name, docstring in functions:
        sentence = docstring.split(".")[0] + "."
        if name.isalpha() and name not in sentence.lower():
            pairs.append((sentence, name.capitalize()))
    return pairs


FUNCTIONS = (
    ("filter", "Keep the items that a function accepts. Order stays."),
    ("quote", "Put marks around a text so that a shell takes it as one word."),
    ("merge", "Merge several sorted inputs into one. Inputs must be sorted."),
    ("round_up", "Give the next whole number."),
    ("shuffle", "Bring the items of a list into a random order. In place."),
    ("sort", "Sorting of a list, smallest first."),
    ("base64", "Write bytes as letters and digits."),
    ("invert", "Exchange keys and values. Values must be different."),
    ("sleep", "Wait for so many seconds."),
    ("pad_left", "Add spaces in front."),
    ("copy", "Make another object of the same value. It is not deep."),
    ("reverse", "Turn the order of a list around. The list itself stays."),
)


def _test_dictionary(candidate) -> None:
    for _ in range(3):
        functions = random.sample(FUNCTIONS, len(FUNCTIONS) - 1)
        wanted = _dictionary(functions)
        every = [(d.split(".")[0] + ".", n.capitalize()) for n, d in functions]
        names = dict(zip([d for d, _ in every], [n for n, _ in functions]))
        words = [pair for pair in every if names[pair[0]].isalpha()]
        own = [pair for pair in every if names[pair[0]] not in pair[0].lower()]
        known = [
            (every, "leave out names that are no word, and sentences that hold their word"),
            (words, "a sentence that holds its word, in capitals or not, defines nothing"),
            (own, "a name such as round_up or base64 is no word"),
            ([(s, w.lower()) for s, w in wanted], "words start with a capital"),
            ([(s[:-1], w) for s, w in wanted], "the sentence keeps its period"),
            ([(w, s) for s, w in wanted], "the sentence first, then its word"),
        ]
        why = "The first sentence ends with the first period; names are in the order given"
        expect(candidate(list(functions)), wanted, why, known=known)


dictionary = Exercise(
    reference=_dictionary,
    test=_test_dictionary,
    question="Dictionaries are written to define, docstrings to instruct. What would a model learn "
    "from such demonstrations that you don't want?",
    hint="docstring.split, str.isalpha and str.lower are all it takes.",
    minutes=8,
    difficulty="medium",
)
