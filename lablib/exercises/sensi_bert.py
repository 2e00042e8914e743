"""Exercises of lab 707."""

import numpy as np
import torch

from lablib.exercises import Exercise, expect


def _sensitivity(loss, weight, width):
    (gradient,) = torch.autograd.grad(loss, weight)
    return (gradient * weight.detach()).sum(0).unflatten(0, (-1, width)).sum(1).abs()


def _test_sensitivity(candidate) -> None:
    for width in (1, 3):
        weight = torch.randn(4, 6, requires_grad=True)
        x = torch.randn(5, 6)

        def loss(weight=weight, x=x):
            return (x @ weight.T).tanh().square().mean()

        (g,) = torch.autograd.grad(loss(), weight)
        gw = (g * weight).detach()
        known = [
            (gw.abs().sum(0).unflatten(0, (-1, width)).sum(1), "add first, then take the size: "
             "weights of one unit may push the loss in opposite directions"),
            (g.sum(0).unflatten(0, (-1, width)).sum(1).abs(), "a gate multiplies the weights: "
             "by the chain rule each g comes with its w"),
            (gw.sum(0).unflatten(0, (-1, width)).sum(1), "its size, without the sign"),
        ]  # fmt: skip
        if width > 1:
            known.append((gw.sum(0).abs(), f"{width} neighboring columns belong to one unit"))
        hint = "torch.autograd.grad gives g; add g w over rows and over a unit's columns"
        expect(
            candidate(loss(), weight, width), _sensitivity(loss(), weight, width), hint, known=known
        )


sensitivity = Exercise(
    reference=_sensitivity,
    test=_test_sensitivity,
    question="At a minimum of the loss every gradient is zero. What does this score say there, and "
    "what would you measure instead?",
    hint="L(gate) with W -> gate W: dL / dgate at gate 1 is the sum of g w over those weights.",
    minutes=10,
    difficulty="medium",
)


def _shares(felt, sizes, budget):
    order = sorted(range(len(felt)), key=lambda i: felt[i])
    ranks = [1 + order.index(i) for i in range(len(felt))]
    low, high = 0.0, 1.0
    for _ in range(60):
        c = (low + high) / 2
        kept = sum(s * min(1.0, c * r) for s, r in zip(sizes, ranks, strict=True))
        low, high = (low, c) if kept >= budget * sum(sizes) else (c, high)
    return [min(1.0, high * rank) for rank in ranks]


def _test_shares(candidate) -> None:
    easy = candidate([5.0, 1.0], [100, 100], 0.3)
    expect(easy, [0.4, 0.2], "ranks 2 and 1: 0.4 and 0.2 of 100 are 60 of 200")
    for budget in (0.35, 0.8):
        n = 5
        felt = np.random.lognormal(size=n).tolist()
        sizes = np.random.randint(50, 400, n).tolist()
        ranks = np.argsort(np.argsort(felt)) + 1.0
        plain = budget * sum(sizes) / float(np.dot(sizes, ranks)) * ranks
        known = [
            (np.minimum(plain, 1).tolist(), "once a share is cut to 1, the others must make up "
             "for it: look for c again") if plain.max() > 1 else (None, ""),
            (plain.tolist(), "no part keeps more than all of itself") if plain.max() > 1
            else (None, ""),
            (_shares([-f for f in felt], sizes, budget), "rank 1 is the least sensitive"),
            ([budget] * n, "that is the same share for all; the rank should decide"),
        ]  # fmt: skip
        known = [(wrong, why) for wrong, why in known if wrong is not None]
        hint = f"shares min(1, c rank) with {budget:.0%} of the sizes kept in all"
        got = candidate(felt, sizes, budget)
        expect(got, _shares(felt, sizes, budget), hint, atol=1e-4, known=known)


shares = Exercise(
    reference=_shares,
    test=_test_shares,
    question="The rank forgets how far apart two sensitivities are. When is that a blessing?",
    hint="What is kept grows with c. Halve an interval of c until the budget is met.",
    minutes=12,
    difficulty="medium",
)


def _flops(dim, heads, head_dim, neurons, length):
    projections = 4 * dim * heads * head_dim + 2 * dim * neurons
    return 2 * projections + 4 * length * heads * head_dim


def _test_flops(candidate) -> None:
    for _ in range(2):
        dim, heads, head_dim = (int(np.random.randint(*r)) for r in ((20, 90), (2, 9), (7, 40)))
        neurons, length = int(np.random.randint(30, 300)), int(np.random.randint(11, 80))
        inner = heads * head_dim
        weights = 4 * dim * inner + 2 * dim * neurons
        known = [
            (weights + 2 * length * inner, "a multiplication and an addition: two for each weight"),
            (2 * weights, "heads also compare tokens: length scores a head, and as many values"),
            (2 * weights + 2 * length * inner, "scores and the mix of values: twice 2 length"),
            (2 * (4 * dim * dim + 2 * dim * neurons) + 4 * length * dim, "heads were cut: they are "
             "narrower than the stream, heads * head_dim"),
        ]  # fmt: skip
        hint = "four matrices of heads, two of neurons, and attention itself"
        found = candidate(dim, heads, head_dim, neurons, length)
        expect(found, _flops(dim, heads, head_dim, neurons, length), hint, known=known)


flops = Exercise(
    reference=_flops,
    test=_test_flops,
    question="At which length does a head cost more operations by comparing than by projecting?",
    hint="2 for a weight; for each head and token, length scores of head_dim products, then as "
    "many values are mixed.",
    minutes=8,
    difficulty="easy",
)
