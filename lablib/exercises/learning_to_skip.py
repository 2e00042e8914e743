"""Exercises of lab 301."""

import numpy as np
import torch

from lablib.exercises import Exercise


def _equal_density(n_dense: int, n_layers: int, always: float, skippable: float) -> float:
    return (n_dense * (always + skippable) / n_layers - always) / skippable


def _test_equal_density(candidate) -> None:
    random = np.random.default_rng()
    n_dense, always = int(random.integers(2, 7)), float(random.uniform(1, 3))
    n_layers, skippable = 2 * n_dense, float(random.uniform(8, 12))
    found = float(candidate(n_dense, n_layers, always, skippable))
    dense = n_dense * (always + skippable)
    cost = n_layers * (always + found * skippable)
    assert abs(found - n_dense / n_layers) > 1e-9, (
        f"{found:.3f} is the ratio of layers: with it the routed model costs {cost:.1f}, the dense "
        f"one {dense:.1f}. Keys and values are made in all {n_layers} layers, whoever skips"
    )
    assert abs(cost - dense) < 1e-6 * dense, (
        f"at density {found:.3f} the routed model costs {n_layers} x ({always:.2f} + {found:.3f} x "
        f"{skippable:.2f}) = {cost:.2f}, the dense one {dense:.2f}"
    )


def _straight_through(margin: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    soft = (margin + noise).sigmoid()
    hard = (soft > 0.5).float()
    return hard + soft - soft.detach()


def _test_straight_through(candidate) -> None:
    margin, noise = torch.randn(2, 64)
    margin.requires_grad_()
    gate = candidate(margin, noise)
    hard = (margin + noise > 0).float()
    off = (gate - hard).abs().max().item()
    assert off < 1e-5, (
        f"forward, the gate is 1 where margin + noise > 0 and else 0; yours is off by {off:.2f}"
    )
    assert gate.requires_grad, (
        "no gradient reaches the margin: a comparison has none, so add something that is zero "
        "forward and has the soft gate's gradient"
    )
    (found,) = torch.autograd.grad(gate.sum(), margin)
    soft = (margin + noise).sigmoid().detach()
    expected = soft * (1 - soft)
    assert torch.allclose(found, expected, atol=1e-5), (
        "backward, the gate is sigmoid(margin + noise), whose slope is s (1 - s): at the first "
        f"token {expected[0]:.3f}, yours has {found[0]:.3f}"
    )


def _skip_layer(x: torch.Tensor, mask: torch.Tensor, layer) -> torch.Tensor:
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

    before = x.clone()
    found, kept = candidate(x, mask, layer), int(mask.sum())
    assert found.shape == x.shape, (
        f"all 12 tokens go on to the next layer: shape (12, 4), yours is {tuple(found.shape)}"
    )
    assert torch.equal(x, before), "x was changed in place; the caller still needs it"
    assert torch.equal(found[~mask], x[~mask]), (
        "a token that skips the layer must leave it as it came"
    )
    assert torch.allclose(found[mask], x[mask] @ weight + x[mask], atol=1e-5), (
        "kept tokens must come out as layer(x) gives them, each in its own place"
    )
    assert sum(seen) == kept, (
        f"the layer computed {sum(seen)} rows, but only {kept} run it: skipping has saved nothing"
    )


equal_density = Exercise(reference=_equal_density, test=_test_equal_density)
straight_through = Exercise(reference=_straight_through, test=_test_straight_through)
skip_layer = Exercise(reference=_skip_layer, test=_test_skip_layer)
