"""Exercises of lab 407."""

import numpy as np

from lablib.exercises import Exercise, expect


def _rate_exponents(N: np.ndarray, D: np.ndarray, lr: np.ndarray) -> tuple[float, float]:
    columns = np.column_stack([np.ones(len(N)), np.log(N), np.log(D)])
    _, a, b = np.linalg.lstsq(columns, np.log(lr), rcond=None)[0]
    return float(a), float(b)


def _test_rate_exponents(candidate) -> None:
    N, D = np.array([1.0, 4.0, 1.0, 4.0]), np.array([1.0, 1.0, 9.0, 9.0])
    why = "Rates N^-1/2 D^1/2 for N of 1 and 4, D of 1 and 9"
    expect(candidate(N, D, N**-0.5 * D**0.5), (-0.5, 0.5), why)
    random = np.random.default_rng()
    N, D = 10 ** random.uniform(4, 9, 12), 10 ** random.uniform(6, 11, 12)
    lr = random.uniform(1, 3) * N**-0.7 * D**0.3 * np.exp(random.normal(0, 0.3, 12))
    a, b = _rate_exponents(N, D, lr)
    no_constant = np.linalg.lstsq(np.log(np.column_stack([N, D])), np.log(lr), rcond=None)[0]
    alone = [float(np.polyfit(np.log(x), np.log(lr), 1)[0]) for x in (N, D)]
    plain = np.linalg.lstsq(np.column_stack([np.ones(12), N, D]), lr, rcond=None)[0]
    known = [
        (tuple(no_constant.tolist()), "the law has a constant, too: a column of ones"),
        (tuple(alone), "fit both at once: here N and D do not vary independently"),
        (tuple(plain[1:].tolist()), "powers are straight in logarithms: take those of N, D and lr"),
        ((b, a), "N's exponent comes first"),
    ]  # fmt: skip
    expect(candidate(N, D, lr), (a, b), "ln lr = ln c + a ln N + b ln D", known=known)


rate_exponents = Exercise(
    reference=_rate_exponents,
    test=_test_rate_exponents,
    question="If all your models had D = 20 N, which of the two exponents could you still tell?",
    hint="np.linalg.lstsq with the columns 1, ln N and ln D.",
    minutes=9,
    difficulty="medium",
)


def _plateau_area(hessian: np.ndarray, least: float, within: float) -> float:
    return float(2 * np.pi * within * least / np.sqrt(np.linalg.det(hessian)))


def _test_plateau_area(candidate) -> None:
    why = "L = 2 + (x^2 + y^2)/2, 1 % above 2: the circle x^2 + y^2 = 0.04"
    expect(candidate(np.eye(2), 2.0, 0.01), np.pi * 0.04, why)
    random = np.random.default_rng()
    a, b = random.uniform(0.5, 3, 2)
    tilt = random.uniform(0.3, 0.8) * np.sqrt(a * b)  # so that its axes are far from x and y
    hessian = np.array([[a, tilt], [tilt, b]])
    least, within = float(random.uniform(1.5, 4)), float(random.uniform(0.001, 0.02))
    right = _plateau_area(hessian, least, within)
    det = float(np.linalg.det(hessian))
    known = [
        (right / least, "`within` is a share of the loss: the height is within * least"),
        (right * np.sqrt(det) / det, "each half axis has a square root: divide by sqrt(det H)"),
        (right / 2, "L rises as x H x / 2: the half axes are sqrt(2 height / eigenvalue)"),
        (right / np.pi, "an ellipse has the area pi times its half axes"),
        (2 * np.pi * within * least / np.sqrt(np.prod(np.diag(hessian))), "the axes are tilted: "
         "use the eigenvalues, or the determinant, not the diagonal"),
    ]  # fmt: skip
    hint = "half axes sqrt(2 within least / eigenvalue)"
    expect(candidate(hessian, least, within), right, hint, known=known)


plateau_area = Exercise(
    reference=_plateau_area,
    test=_test_plateau_area,
    question="A bowl twice as steep in both directions: how much of the plateau is left?",
    hint="Along an eigenvector the loss rises by eigenvalue x^2 / 2; set that to within * least.",
    minutes=9,
    difficulty="medium",
)


def _weighted_rate(lr: np.ndarray, loss: np.ndarray, width: float) -> float:
    weight = np.exp(-(loss / loss.min() - 1) / width)
    return float(np.exp((weight * np.log(lr)).sum() / weight.sum()))


def _test_weighted_rate(candidate) -> None:
    lr = np.array([0.01, 0.04])
    why = "Two runs of equal loss weigh the same: the geometric mean of 0.01 and 0.04"
    expect(candidate(lr, np.array([2.0, 2.0]), 0.01), 0.02, why)
    random = np.random.default_rng()
    lr = 10 ** random.uniform(-3, -1, 9)
    loss = random.uniform(2, 3) * (1 + random.uniform(0, 0.05, 9))
    width = float(random.uniform(0.01, 0.04))

    def mean(weight, log=True):
        shown = np.log(lr) if log else lr
        value = (weight * shown).sum() / weight.sum()
        return float(np.exp(value) if log else value)

    share = loss / loss.min() - 1
    known = [
        (mean(np.exp(-share / width), log=False), "average the logarithms: rates are multiples"),
        (mean(np.exp(-(loss - loss.min()) / width)), "the share above the best: loss / least - 1"),
        (mean(np.exp(share / width)), "a run of larger loss weighs less"),
        (mean(np.ones(9)), "weigh the runs"),
        (float(lr[loss.argmin()]), "the best run alone is what weights are to replace"),
        (mean(np.exp(-share * width)), "divide by width: a narrow one trusts only the best"),
        (float(np.log(mean(np.exp(-share / width)))), "that is the logarithm of the rate: undo it"),
    ]
    right = _weighted_rate(lr, loss, width)
    hint = "weights exp(-(loss / least - 1) / width), a weighted mean of ln lr"
    expect(candidate(lr, loss, width), right, hint, known=known)


weighted_rate = Exercise(
    reference=_weighted_rate,
    test=_test_weighted_rate,
    question="The paper's weight is 1 within 0.25 % and 0 beyond. Which varies less?",
    hint="exp(-share / width) is 1 for the best run, and falls by e for each `width` above it.",
    minutes=12,
    difficulty="open",
)
