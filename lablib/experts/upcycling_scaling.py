"""Scaling Laws for Upcycling Mixture-of-Experts Language Models (Liew, Kato and Takase, 2025).

Lab 306. A dense model reads D1 tokens, is upcycled, and reads D2 more; `upcycled_loss` is the law
that the paper finds, with an interaction term. The same law without sizes is
`lablib.scaling.fits.JointLaw`. Then the printed laws (Table 2), the break-even with a mixture
trained from scratch, and the snapshots that let all rows of a grid share one dense training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn

from lablib.scaling.fits import JointLaw, PowerLaw
from lablib.training.losses import next_token_loss


def upcycled_loss(
    d1: float,
    d2: float,
    n: float,
    A: float = 16.3,
    a1: float = 0.043,
    a2: float = 0.085,
    a3: float = 7.98e-4,
    B: float = 8.53,
    b: float = 0.112,
    E: float = 0.165,
) -> float:
    """The loss of an upcycled model, in nats a token.

    d1: tokens of the dense training; d2: of the training after upcycling; n: the dense model's
    parameters. The coefficients are Table 2's, for 8 experts, top-2.
    """
    # More d1 lowers the loss ...
    dense = d1**-a1
    # ... and takes from what d2 can do: the exponent a2 shrinks with log d1.
    upcycled = d2 ** -(a2 - a3 * math.log(d1))
    # L = A D1^-a1 D2^(-a2 + a3 log D1) + B N^-b + E
    return A * dense * upcycled + B * n**-b + E


IRREDUCIBLE = 0.165  # Table 2's caption: E, one for all laws
TABLE_2 = {  # A, exponents of tokens, B, beta
    "dense": (8.83, (0.088,), 12.3, 0.116),
    "scratch": (32.0, (0.161,), 7.05, 0.080),
    "upcycled": (16.3, (0.043, 0.085, 7.98e-4), 8.53, 0.112),
}


def published(kind: str, n: float) -> PowerLaw | JointLaw:
    """Table 2's law in tokens, for one size: of a "dense" model, a mixture from "scratch", or an
    "upcycled" one.

    n: parameters of the dense model, also for mixtures. Raises ValueError for another kind.
    """
    if kind not in TABLE_2:
        raise ValueError(f"{kind!r} is none of {', '.join(TABLE_2)}")
    coefficient, exponents, b, beta = TABLE_2[kind]
    floor = b * n**-beta + IRREDUCIBLE
    if kind == "upcycled":
        return JointLaw(coefficient, *exponents, floor)
    return PowerLaw(coefficient, -exponents[0], floor)


def break_even(
    upcycled: JointLaw, scratch: PowerLaw, d1: float, low: float = 1.0, high: float = 1e18
) -> float:
    """Tokens at which a mixture trained from scratch is as good as one upcycled after d1 tokens.

    Both read so many tokens as a mixture; what the dense model read is spent already. Below it
    upcycling is the better use of tokens. Infinity when scratch is nowhere ahead up to `high`, 0
    when it is ahead at `low`.
    """

    def behind(log_d: float) -> float:
        d = math.exp(log_d)
        return float(scratch(d) - upcycled(d1, d))

    # Laws with floors of their own may cross twice, so the first crossing is looked for in steps.
    start, end = math.log(low), math.log(high)
    places = [start + (end - start) * step / 400 for step in range(401)]
    ahead = next((place for place in places if behind(place) <= 0), None)
    if ahead is None:
        return math.inf
    if ahead == start:
        return 0.0
    start, end = ahead - (end - start) / 400, ahead
    for _ in range(60):
        middle = (start + end) / 2
        start, end = (middle, end) if behind(middle) > 0 else (start, middle)
    return math.exp(end)


def snapshots(steps: Container[int], kept: dict[int, nn.Module]) -> Callable:
    """The next-token loss of `lablib.training.fit`, which also copies the model on its way.

    steps: after how many steps of training. kept: gets step -> a copy of the model. The state after
    the last step is the model that `fit` returns.
    """
    done = 0

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        nonlocal done
        if model.training and torch.is_grad_enabled():
            if done in steps:
                kept[done] = copy.deepcopy(model)
            done += 1
        return next_token_loss(model, tokens)

    return loss
