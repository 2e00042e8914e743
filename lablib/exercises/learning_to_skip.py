"""Exercises of lab 301."""

import numpy as np
import torch
from torch import Tensor

from lablib.exercises import Exercise, Wrong, expect


def _equal_density(n_dense: int, n_layers: int, always: float, skippable: float) -> float:
    return (n_dense * (always + skippable) / n_layers - always) / skippable


def _test_equal_density(candidate) -> None:
    random = np.random.default_rng()
    n_dense, always = int(random.integers(2, 7)), float(random.uniform(1, 3))
    n_layers, skippable = (
        n_dense + int(random.integers(1, n_dense + 1)),
        float(random.uniform(8, 12)),
    )
    wanted = _equal_density(n_dense, n_layers, always, skippable)
    expect(
        candidate(n_dense, n_layers, always, skippable),
        wanted,
        f"The dense model costs {n_dense} x ({always:.2f} + {skippable:.2f}), the routed one "
        f"{n_layers} x ({always:.2f} + density x {skippable:.2f})",
        known=[(n_dense / n_layers, f"that is the ratio of layers; but keys and values are made in "
                f"all {n_layers} layers, whoever skips: {always:.2f} a layer")],
    )  # fmt: skip


equal_density = Exercise(
    reference=_equal_density,
    test=_test_equal_density,
    question="With how many routed layers is no density low enough, because `always` takes it all?",
    hint="Write down what each model costs a token, set the two equal, solve for the density.",
    minutes=5,
    difficulty="easy",
)


def _straight_through(margin: Tensor, noise: Tensor) -> Tensor:
    soft = (margin + noise).sigmoid()
    hard = (soft > 0.5).float()
    return hard + soft - soft.detach()


def _test_straight_through(candidate) -> None:
    margin, noise = torch.randn(2, 64)
    margin.requires_grad_()
    gate, soft = candidate(margin, noise), (margin + noise).sigmoid().detach()
    expect(
        gate,
        (margin + noise > 0).float(),
        "Forward, the gate is 1 where margin + noise is above 0 and else 0",
        known=[(soft, "that is the soft gate; forward, the gate is 1 or 0")],
        atol=1e-5,
    )
    found = None
    if gate.requires_grad:
        (found,) = torch.autograd.grad(gate.sum(), margin, allow_unused=True)
    if found is None:
        raise Wrong(
            "no gradient reaches the margin: a comparison has none, so add something that is zero "
            "forward and has the soft gate's gradient"
        )
    slope = (
        "That is the gradient; backward, the gate is s = sigmoid(margin + noise): slope s (1 - s)"
    )
    expect(found, soft * (1 - soft), slope, atol=1e-5)


straight_through = Exercise(
    reference=_straight_through,
    test=_test_straight_through,
    question="Far below the threshold the gradient is almost 0: what if a layer skips all tokens?",
    hint="`soft - soft.detach()` is zero and has soft's gradient.",
    minutes=8,
    difficulty="medium",
)


def _skip_layer(x: Tensor, mask: Tensor, layer) -> Tensor:
    y = x.clone()
    y[mask] = layer(x[mask])
    return y


def _test_skip_layer(candidate) -> None:
    x, weight, seen = torch.randn(12, 4), torch.randn(4, 4), []
    mask = torch.rand(12) < 0.5
    mask[:2] = torch.tensor([True, False])

    def layer(rows):
        seen.append(len(rows))
        return rows @ weight + rows

    everywhere = x @ weight + x
    expect(
        candidate(x, mask, layer),
        torch.where(mask[:, None], everywhere, x),
        f"mask is {mask.int().tolist()}: a row with 0 leaves as it came, a row with 1 as layer "
        "gives it, each in its own place",
        known=[(everywhere, "a token that skips the layer must leave it as it came")],
        atol=1e-5,
    )
    if sum(seen) != mask.sum():
        raise Wrong(
            f"the layer computed {sum(seen)} rows, but only {int(mask.sum())} run it: skipping has "
            "saved nothing"
        )


skip_layer = Exercise(
    reference=_skip_layer,
    test=_test_skip_layer,
    question="Attention's keys and values of skipped tokens are still needed: what does that cost?",
    hint="`x[mask]` gathers the rows that run, and assigning to `y[mask]` puts them back.",
    minutes=10,
    difficulty="open",
)
