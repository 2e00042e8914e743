"""Exercises of lab 402."""

import numpy as np

from lablib.exercises import Exercise, expect

NAMES = ("e", "a", "b", "c", "alpha", "beta", "gamma")


def _drawn(random) -> dict[str, float]:
    low = (0.3, 5.0, 50.0, 1.0, 0.1, 0.1, 0.2)
    high = (1.5, 50.0, 500.0, 30.0, 0.5, 0.5, 1.5)
    return dict(zip(NAMES, random.uniform(low, high).tolist()))


def _from_total(total, D, S, e, a, b, c, alpha, beta, gamma):
    floor = e * (1 - S) ** gamma
    idle = c * S / (total * (1 - S)) ** alpha  # active parameters: N_total (1 - S)
    return floor + a / total**alpha + idle + b / D**beta


def _test_from_total(candidate) -> None:
    simple = {"e": 1.0, "a": 8.0, "b": 0.0, "c": 4.0, "alpha": 0.5, "beta": 0.5, "gamma": 0.0}
    why = "64 parameters, 3/4 idle, e = 1, a = 8, c = 4, alpha = 1/2: 1 + 8/8 + 4 * 0.75 / 4 = 2.75"
    expect(candidate(64, 100, 0.75, *simple.values()), 2.75, why)
    random = np.random.default_rng()
    values = _drawn(random)
    total, D, S = random.uniform(1e3, 1e6), random.uniform(1e5, 1e7), random.uniform(0.3, 0.9)
    right = _from_total(total, D, S, **values)
    a, c, alpha = values["a"], values["c"], values["alpha"]
    active = total * (1 - S)
    shift = a * ((1 - S) ** alpha - 1) / total**alpha
    known = [
        (right + shift, "(1 - S)^alpha is gone once a is divided by the total size"),
        (right + c * S * (total**-alpha - active**-alpha), "idle parameters: over N active"),
        (right + a * (active**-alpha - total**-alpha), "a is over all parameters, active and idle"),
    ]  # fmt: skip
    expect(
        candidate(total, D, S, *values.values()),
        right,
        "put N = N_total (1 - S) into the law",
        known=known,
    )


from_total = Exercise(
    reference=_from_total,
    test=_test_from_total,
    question="Which term makes a sparse model worse than a dense one of its total size?",
    hint="(1 - S)^alpha / N^alpha = 1 / (N / (1 - S))^alpha, and N / (1 - S) is the total.",
    minutes=8,
    difficulty="easy",
)


def _equivalent(N, S, e, a, c, alpha, gamma):
    above = e * (1 - S) ** gamma + (a * (1 - S) ** alpha + c * S) / N**alpha - e
    return (a / above) ** (1 / alpha)  # from e + a / N'^alpha


def _test_equivalent(candidate) -> None:
    simple = {"e": 1.0, "a": 8.0, "c": 4.0, "alpha": 0.5, "gamma": 0.0}
    why = "16 active, 3/4 idle: (8 * 0.5 + 4 * 0.75) / 4 = 1.75 above the floor, 8 / sqrt(N')"
    expect(candidate(16, 0.75, *simple.values()), (8 / 1.75) ** 2, why)
    random = np.random.default_rng()
    values = {name: value for name, value in _drawn(random).items() if name in simple}
    values["gamma"] = random.uniform(-0.02, 0.02)
    N, S = random.uniform(1e3, 1e5), random.uniform(0.3, 0.9)
    e, a, c, alpha, gamma = (values[name] for name in ("e", "a", "c", "alpha", "gamma"))
    right = _equivalent(N, S, **values)
    sparse = e * (1 - S) ** gamma + (a * (1 - S) ** alpha + c * S) / N**alpha
    known = [
        ((a / sparse) ** (1 / alpha), "the dense model has the floor e, too: take it off first"),
        ((a / (sparse - e * (1 - S) ** gamma)) ** (1 / alpha), "a dense model's floor is e"),
        (N / (1 - S), "that is the total size: idle parameters count for less"),
        (a / (sparse - e), "undo the power: N'^alpha is not N'"),
    ]  # fmt: skip
    expect(
        candidate(N, S, *values.values()),
        right,
        "solve e + a / N'^alpha = the sparse loss",
        known=known,
    )


equivalent = Exercise(
    reference=_equivalent,
    test=_test_equivalent,
    question="The data term is missing. Why may it be?",
    hint="Both models read the same text, so b / D^beta is the same on both sides.",
    minutes=10,
    difficulty="medium",
)


def _slope(N, e, a, c, alpha, gamma):
    return -gamma * e + (c - alpha * a) / N**alpha


def _test_slope(candidate) -> None:
    simple = {"e": 1.0, "a": 8.0, "c": 4.0, "alpha": 0.5, "gamma": 0.0}
    why = "at N = 16 the size terms are (8 sqrt(1-S) + 4 S) / 4, with slope (-4 + 4) / 4 at S = 0"
    expect(candidate(16, *simple.values()), 0.0, why)
    random = np.random.default_rng()
    values = {name: value for name, value in _drawn(random).items() if name in simple}
    N = random.uniform(1e3, 1e6)
    e, a, _c, alpha, gamma = (values[name] for name in ("e", "a", "c", "alpha", "gamma"))
    right = _slope(N, **values)
    known = [
        (right + gamma * e, "the floor e (1 - S)^gamma moves with S, too"),
        (right + 2 * gamma * e, "the slope of (1 - S)^gamma is negative: -gamma"),
        (right + (alpha * a - a) / N**alpha, "the slope of (1 - S)^alpha at 0 is -alpha"),
        (right * N**alpha, "the size terms are divided by N^alpha, the floor is not"),
        (-right, "idle parameters that help have a negative slope"),
    ]  # fmt: skip
    expect(
        candidate(N, *values.values()), right, "differentiate term by term at S = 0", known=known
    )


slope = Exercise(
    reference=_slope,
    test=_test_slope,
    question="With gamma = 0: above which c does the first idle parameter make a model worse?",
    hint="The slope of (1 - S)^p at S = 0 is -p.",
    minutes=10,
    difficulty="medium",
)


def _still_floor(N, D, S, loss, alpha, beta):
    columns = [np.ones_like(N), (1 - S) ** alpha / N**alpha, D**-beta, S / N**alpha]
    values, *_ = np.linalg.lstsq(np.stack(columns, 1), loss, rcond=None)
    return values


def _columns(random, rows: int = 24) -> list[np.ndarray]:
    """N, D and S of some models, and the exponents."""
    N, D = 10 ** random.uniform(3, 5, rows), 10 ** random.uniform(5, 7, rows)
    return [N, D, random.choice([0, 0.4, 0.7], rows), *random.uniform(0.3, 0.6, 2)]


def _test_still_floor(candidate) -> None:
    random = np.random.default_rng()
    N, D, S, alpha, beta = _columns(random)
    e, a, b, c = random.uniform((0.5, 5, 50, 1), (1.5, 50, 500, 30)).tolist()
    own = np.array([e, a, b, c])
    exact = e + (a * (1 - S) ** alpha + c * S) / N**alpha + b / D**beta
    first = np.asarray(candidate(N, D, S, exact, alpha, beta))
    why = "losses made by the law itself, gamma = 0: its own e, a, b and c must come out"
    expect(first, own, why, known=_slips(N, D, S, exact, alpha, beta), atol=1e-3)
    noisy = exact * np.exp(0.02 * random.standard_normal(len(N)))
    right = _still_floor(N, D, S, noisy, alpha, beta)
    known = _slips(N, D, S, noisy, alpha, beta)
    known.append((own, "these losses are noisy: fit them"))
    found = np.asarray(candidate(N, D, S, noisy, alpha, beta))
    expect(found, right, "least squares of the losses themselves", known=known, atol=1e-4)


def _slips(N, D, S, loss, alpha, beta) -> list:
    """Wrong values, and what was forgotten."""

    def least(*columns):
        return np.linalg.lstsq(np.stack(columns, 1), loss, rcond=None)[0]

    one, size, data, idle = np.ones_like(N), N**-alpha, D**-beta, S * N**-alpha
    both = (1 - S) ** alpha * size
    return [
        (least(one, size, data, idle), "a stands beside (1 - S)^alpha: it is over the total size"),
        (least(one, both, data, S), "idle parameters are over N^alpha, too"),
        (np.r_[0, least(both, data, idle)], "without gamma the floor stays: it is not zero"),
        (least(one, both, idle, data), "in the order e, a, b, c"),
    ]


still_floor = Exercise(
    reference=_still_floor,
    test=_test_still_floor,
    question="Which exponents fit best, and how far off is that law where it was not fitted?",
    hint="A column each: 1, (1 - S)^alpha / N^alpha, 1 / D^beta, S / N^alpha; then lstsq.",
    minutes=20,
    difficulty="open",
)
