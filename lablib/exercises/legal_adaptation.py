"""Exercises of lab 709."""

import random

import numpy as np

from lablib.exercises import Exercise, Wrong, expect


def _prefix_numbers(length, dim, heads, kv_heads, blocks):
    width = dim // heads * kv_heads  # features of all heads' keys
    return 2 * length * width * blocks


def _test_prefix_numbers(candidate) -> None:
    why = "one row, one block, a model of width 8 with 4 heads, 2 of them for keys: a key of 4 "
    why += "numbers and a value of 4 numbers"
    expect(candidate(1, 8, 4, 2, 1), 8, why)
    for _ in range(3):
        length, blocks = int(np.random.randint(3, 30)), int(np.random.randint(2, 20))
        kv_heads, size = int(np.random.randint(2, 5)), int(np.random.randint(5, 40))
        heads = 3 * kv_heads
        given = length, size * heads, heads, kv_heads, blocks
        right = _prefix_numbers(*given)
        known = [
            (3 * right, "a row has the width of the keys, and fewer heads have keys than queries"),
            (right // 2, "a row is a key and a value"),
            (right // blocks, "that is one block; a deep prefix is in all of them"),
            (right // length, "that is one row"),
        ]
        expect(candidate(*given), right, why, known=known)


prefix_numbers = Exercise(
    reference=_prefix_numbers,
    test=_test_prefix_numbers,
    question="A prompt puts rows before the text only once, at the bottom. How many numbers is it?",
    hint="Each head's keys have dim / heads features. How many heads have keys?",
    minutes=5,
    difficulty="easy",
)


def _balanced(labels, per_class, draw):
    places = []
    for label in sorted(set(labels)):
        own = [place for place, other in enumerate(labels) if other == label]
        places += draw.sample(own, per_class)
    draw.shuffle(places)
    return places


def _uneven(per_class: int) -> list[int]:
    """Labels of three classes; the last one has `per_class` examples, two of them at the ends."""
    middle = [2] * (per_class - 2)
    filler = [n % 2 for n in range(4 * per_class + random.randint(4, 9))]
    for place, label in enumerate(middle):
        filler.insert(4 * place + 3, label)
    labels = [2, *filler, 2]
    # No neighbors are alike, so that a place that is one off has another label.
    fixed = labels[:1]
    for label in labels[1:]:
        fixed += [1 - label, label] if label == fixed[-1] else [label]
    return fixed


def _test_balanced(candidate) -> None:
    for per_class in (2, random.randint(3, 6)):
        labels = _uneven(per_class)
        _check_draw(candidate(labels, per_class, random.Random(random.random())), labels, per_class)
    draws = [list(candidate(labels, 2, random.Random(seed))) for seed in range(8)]
    for places in draws:  # a lucky draw of all labels alike is told by the next
        _check_draw(places, labels, 2)
    if all(draw == draws[0] for draw in draws):
        raise Wrong("eight draws gave the same places: let `draw` choose them")
    in_order = [sorted(labels[place] for place in draw) for draw in draws]
    if all([labels[place] for place in draw] == order for draw, order in zip(draws, in_order)):
        raise Wrong("one class after another: a batch would hold one label only; mix the places")


def _check_draw(places, labels, per_class) -> None:
    classes = sorted(set(labels))
    if not isinstance(places, (list, tuple)) or len(places) != per_class * len(classes):
        raise Wrong(f"expected a list of {per_class * len(classes)} places")
    for place in places:
        if not isinstance(place, (int, np.integer)) or isinstance(place, bool):
            raise Wrong(f"{place!r} is no place: a whole number from 0 on")
        if not 0 <= place < len(labels):
            raise Wrong(f"place {place}: the last of {len(labels)} is {len(labels) - 1}")
    if len(set(places)) < len(places):
        raise Wrong("a place came twice: draw without replacement")
    for label in classes:
        count = sum(labels[place] == label for place in places)
        if count != per_class:
            raise Wrong(f"{count} examples of class {label}; {per_class} were asked for")


balanced = Exercise(
    reference=_balanced,
    test=_test_balanced,
    question="A test set is balanced too. What would accuracy say if nine of ten licences in it "
    "were permissive?",
    hint="Collect the places of each class, then `draw.sample(places, per_class)`.",
    minutes=8,
    difficulty="easy",
)


def _calibration_error(confidence, right, bins):
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for b in range(bins):
        own = place == b
        if own.any():
            total += own.mean() * abs(right[own].mean() - confidence[own].mean())
    return total


def _test_calibration_error(candidate) -> None:
    why = "two predictions of confidence 0.9, one of them right: accuracy 0.5, so the error is 0.4"
    expect(candidate(np.array([0.9, 0.9]), np.array([True, False]), 5), 0.4, why)
    for bins in (5, 10, 15):
        confidence = np.random.uniform(0.2, 0.99, 60) ** 0.7
        chance = confidence + np.where(confidence < 0.6, 0.35, -0.35)  # too modest, too sure
        right = np.random.rand(60) < chance
        place = np.minimum((confidence * bins).astype(int), bins - 1)
        gaps, shares, signed = [], [], []
        for b in np.unique(place):
            own = place == b
            signed.append(right[own].mean() - confidence[own].mean())
            gaps.append(abs(signed[-1]))
            shares.append(own.mean())
        wanted = _calibration_error(confidence, right, bins)
        known = [
            (float(np.mean(gaps)), "weigh each bin by the share of predictions in it"),
            (float(np.sum(gaps)) / bins, "weigh each bin by the share of predictions in it"),
            (float(abs(np.dot(shares, signed))), "take each bin's gap without its sign, then sum"),
            (float(np.dot(shares, signed)), "too sure and too modest must not cancel: no signs"),
            (float(np.max(gaps)), "that is the largest gap; the mean is asked for"),
        ]
        expect(candidate(confidence, right, bins), wanted, why, known=known)


calibration_error = Exercise(
    reference=_calibration_error,
    test=_test_calibration_error,
    question="A classifier that answers 'permissive, 25 %' to everything is right about a quarter "
    "of four balanced classes. What is its calibration error, and is it a good classifier?",
    hint="For each bin: the share of predictions in it, times how far their accuracy is from their "
    "mean confidence.",
    minutes=12,
    difficulty="medium",
)
