"""Derivatives beyond the first backward pass: forward mode, and gradients of gradients."""

import pytest
import torch
from torch.autograd import forward_ad

from lablib.kernels import (
    grouped_linear,
    linear_cross_entropy,
    merge_tokens,
    moe_mlp,
    route,
    select_tokens,
)
from lablib.kernels.grouped_linear import naive as grouped
from lablib.kernels.linear_cross_entropy import naive as entropy
from lablib.kernels.moe_mlp import naive as mlp
from lablib.kernels.route import naive as routing
from lablib.kernels.select_tokens import naive as tokens

MASK = torch.tensor([True, False, True, True, False, True])
INDEX = torch.tensor([0, 5, 5, 2])
TARGET = torch.tensor([3, 0, -100, 6, 1, 1])
TOKEN = torch.tensor([0, 2, 5, 1, 1])
COUNTS = torch.tensor([3, 0, 2])


def _mlp(function, activation):
    return lambda x, weight, up, down: function(x, TOKEN, weight, up, down, COUNTS, activation)


# name: ours, the definition, the shapes of what both are differentiated in
OPS = {
    "grouped_linear": (
        lambda x, w: grouped_linear(x, w, COUNTS),
        lambda x, w: grouped.grouped_linear(x, w, COUNTS),
        [(5, 4), (3, 6, 4)],
    ),
    "linear_cross_entropy": (
        lambda h, w: linear_cross_entropy(h, w, TARGET),
        lambda h, w: entropy.linear_cross_entropy(h, w, TARGET),
        [(6, 4), (7, 4)],
    ),
    "merge_tokens": (
        lambda x, rows, w: merge_tokens(x, rows, INDEX, w),
        lambda x, rows, w: tokens.merge_tokens(x, rows, INDEX, w),
        [(6, 4), (4, 4), (4,)],
    ),
    "moe_mlp, relu": (
        _mlp(moe_mlp, "relu"),
        _mlp(mlp.moe_mlp, "relu"),
        [(6, 4), (5,), (3, 7, 4), (3, 4, 7)],
    ),
    "moe_mlp, swiglu": (
        _mlp(moe_mlp, "swiglu"),
        _mlp(mlp.moe_mlp, "swiglu"),
        [(6, 4), (5,), (3, 14, 4), (3, 4, 7)],
    ),
    "route": (lambda x: route(x, 2).probs, lambda x: routing.route(x, 2)[0], [(6, 5)]),
    "select_tokens": (
        lambda x: select_tokens(x, MASK)[0],
        lambda x: tokens.select_tokens(x, MASK)[0],
        [(6, 4)],
    ),
}


@pytest.fixture(params=OPS)
def op(request):
    """(ours, the definition, inputs)"""
    torch.manual_seed(0)
    ours, definition, shapes = OPS[request.param]
    return ours, definition, [torch.randn(shape) for shape in shapes]


@pytest.fixture(params=[False, True], ids=["", "composed"])
def composed(request, monkeypatch):
    """As on CUDA and under torch.compile, where moe_mlp consists of the other ops."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)


def test_forward_mode(op, composed):
    ours, definition, inputs = op
    tangents = tuple(torch.randn_like(x) for x in inputs)
    _, by_ours = torch.func.jvp(ours, tuple(inputs), tangents)
    _, expected = torch.func.jvp(definition, tuple(inputs), tangents)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(by_ours, expected)


def _tangents_of_gradients(function, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)  # before tangents exist: they enter through the upstream gradient
    slope = torch.linspace(-1, 1, out.numel()).view(out.shape)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(slope, slope.cos())
        found = torch.autograd.grad(out, leaves, upstream)
        return [forward_ad.unpack_dual(gradient).tangent for gradient in found]


@pytest.mark.parametrize("op", sorted(OPS.keys() - {"moe_mlp, swiglu"}), indirect=True)
def test_forward_mode_of_a_gradient(op, composed):
    ours, definition, inputs = op
    expected = _tangents_of_gradients(definition, inputs)
    assert all(tangent.abs().sum() > 0 for tangent in expected)
    torch.testing.assert_close(_tangents_of_gradients(ours, inputs), expected)


@pytest.mark.parametrize("op", ["moe_mlp, swiglu"], indirect=True)
def test_forward_mode_that_torch_lacks_is_refused(op, composed):
    ours, _, inputs = op
    with pytest.raises(NotImplementedError, match="silu_backward"):
        _tangents_of_gradients(ours, inputs)


def test_gradients_of_gradients(op, composed):
    ours, definition, inputs = op

    def penalized(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        # One input depends on another, as a tied head's hidden states do.
        out = function(leaves[0] * leaves[-1].mean(), *leaves[1:])
        slope = torch.linspace(-1, 1, out.numel()).view(out.shape)
        first = torch.autograd.grad((out * slope).sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return first, second

    torch.testing.assert_close(penalized(ours), penalized(definition))


def test_gradients_of_gradients_in_one_input_only(op):
    ours, definition, (first, *others) = op

    def hessian_vector(function):
        x = first.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x, *others).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)

    torch.testing.assert_close(hessian_vector(ours), hessian_vector(definition))


def test_forward_mode_compiled(op):
    ours, definition, inputs = op
    tangents = tuple(torch.ones_like(x) for x in inputs)

    def tangent(function):
        return lambda *inputs: torch.func.jvp(function, inputs, tangents)[1]

    compiled = torch.compile(tangent(ours), backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), tangent(definition)(*inputs))
