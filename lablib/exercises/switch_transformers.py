"""Exercises of lab 302."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.exercises import Exercise


def _dropped(experts: Tensor, n_experts: int, capacity_factor: float) -> int:
    places = max(1, math.ceil(round(capacity_factor * len(experts) / n_experts, 6)))
    return int((experts.bincount(minlength=n_experts) - places).clamp(min=0).sum())


def _test_dropped(candidate) -> None:
    even = torch.arange(4).repeat(5)
    found = int(candidate(even, 4, 1.0))
    assert found == 0, (
        f"20 tokens spread evenly over 4 experts all find a place; yours drops {found}"
    )
    one = torch.zeros(20, dtype=torch.int64)
    found = int(candidate(one, 4, 1.0))
    assert found != 0, "20 tokens all ask for one of 4 experts with 5 places each: 15 are dropped"
    found = int(candidate(one, 4, 2.0))
    assert found == 10, (
        f"with capacity factor 2 an expert has 2 * 20 / 4 = 10 places, so 10 of the 20 tokens that "
        f"ask for it are dropped; yours says {found}"
    )
    experts = (torch.rand(60) ** 2 * 5).long()
    found, expected = int(candidate(experts, 5, 1.25)), _dropped(experts, 5, 1.25)
    counts = experts.bincount(minlength=5).tolist()
    assert found == expected, (
        f"tokens ask for the experts {counts} times; with 15 places each {expected} are dropped, "
        f"not {found}: free places of one expert don't help another"
    )


def _balancing_loss(probs: Tensor, experts: Tensor) -> Tensor:
    n_experts = probs.shape[1]
    share = experts.bincount(minlength=n_experts) / len(experts)
    return n_experts * (share * probs.mean(0)).sum()


def _test_balancing_loss(candidate) -> None:
    even = torch.full((8, 4), 0.25)
    found = float(candidate(even, torch.arange(4).repeat(2)))
    assert abs(found - 1) < 1e-5, (
        f"when all is even, f_i = P_i = 1/4 and N * sum f_i P_i = 1; yours is {found:.4f}"
    )
    probs = (2 * torch.randn(50, 6)).softmax(-1)
    probs.requires_grad_()
    loss = candidate(probs, probs.argmax(1))
    expected = _balancing_loss(probs, probs.argmax(1)).item()
    assert torch.is_tensor(loss) and loss.ndim == 0, "the loss is one number, as a tensor"
    assert abs(loss.item() - expected) < 1e-4, (
        f"expected {expected:.4f}, yours is {loss.item():.4f}: f_i is the share of tokens "
        "sent to expert i, P_i the mean over tokens of its probability"
    )
    assert loss.requires_grad, "gradients must reach the router through P: don't detach probs"


def _switch_layer(x: Tensor, router: Tensor, experts: list, capacity: int) -> Tensor:
    gate, chosen = (x @ router.t()).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for index, expert in enumerate(experts):
        rows = (chosen == index).nonzero()[:, 0][:capacity]
        if len(rows):
            out[rows] = gate[rows, None] * expert(x[rows])
    return out


def _test_switch_layer(candidate) -> None:
    x, router = torch.randn(12, 5), torch.randn(3, 5)
    weights = torch.randn(3, 5, 5)
    experts = [lambda rows, weight=weight: F.relu(rows @ weight) for weight in weights]
    found = candidate(x.clone(), router, experts, 12)
    assert tuple(found.shape) == (12, 5), f"one row a token: (12, 5), yours is {tuple(found.shape)}"
    full = _switch_layer(x, router, experts, 12)
    chosen = (x @ router.t()).argmax(-1)
    bare = torch.stack([experts[int(i)](row[None])[0] for i, row in zip(chosen, x)])
    assert not torch.allclose(found, bare, atol=1e-5), (
        "multiply each expert's output with the router's probability: it is the only way that a "
        "gradient reaches the router"
    )
    assert torch.allclose(found, full, atol=1e-5), (
        "with room for all, row t is p_i(x_t) E_i(x_t), i the expert of the highest probability; "
        f"your row 0 is {found[0].tolist()}, expected {full[0].tolist()}"
    )
    found, expected = candidate(x.clone(), router, experts, 1), _switch_layer(x, router, experts, 1)
    assert torch.allclose(found, expected, atol=1e-5), (
        "with capacity 1 only the first token of each expert is computed; dropped tokens get zeros "
        "(the residual connection carries them on)"
    )


dropped = Exercise(reference=_dropped, test=_test_dropped)
balancing_loss = Exercise(reference=_balancing_loss, test=_test_balancing_loss)
switch_layer = Exercise(reference=_switch_layer, test=_test_switch_layer)
