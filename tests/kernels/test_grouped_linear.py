from importlib import import_module

import pytest
import torch

from lablib.kernels import grouped_linear, moe_mlp
from lablib.kernels.grouped_linear import naive
from lablib.kernels.moe_mlp import naive as naive_mlp

moe_mlp_module = import_module("lablib.kernels.moe_mlp")

# counts, d_in, d_out
CASES = [
    ([5, 0, 12, 20], 20, 33),
    ([0, 0, 7], 1, 3),
    ([130, 1, 64], 70, 65),
    ([0, 0], 4, 4),
    ([9], 16, 16),
]


def _inputs(counts, d_in, d_out, device, dtype):
    torch.manual_seed(sum(counts) + d_in)
    x = torch.randn(sum(counts), d_in, device=device, dtype=dtype)
    weight = torch.randn(len(counts), d_out, d_in, device=device, dtype=dtype) / d_in**0.5
    return x, weight, torch.tensor(counts, device=device)


@pytest.mark.parametrize("case", CASES)
def test_triton_multiplies_as_naive_does(case, device, dtype, close):
    from lablib.kernels.grouped_linear import triton

    x, weight, counts = _inputs(*case, device, dtype)
    close(triton.product(x, weight, counts), naive.grouped_linear(x, weight, counts))
    grad = torch.randn(len(x), weight.shape[1], device=device, dtype=dtype)
    by_x = triton.product(grad, weight.transpose(1, 2), counts)
    close(by_x, naive.grouped_linear(grad, weight.transpose(1, 2), counts))


@pytest.mark.parametrize("case", CASES)
def test_triton_weight_gradients(case, device, dtype, close):
    from lablib.kernels.grouped_linear import triton

    x, weight, counts = _inputs(*case, device, torch.float32)
    weight.requires_grad_()
    out = naive.grouped_linear(x, weight, counts)
    grad = torch.randn_like(out) / 16
    out.backward(grad)
    close(triton.outer(grad.to(dtype), x.to(dtype), counts), weight.grad)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_naive(case, device, gradients):
    x, weight, counts = _inputs(*case, device, torch.float32)
    ours = gradients(lambda *a: grouped_linear(*a, counts), x, weight)
    expected = gradients(lambda *a: naive.grouped_linear(*a, counts), x, weight)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_triton_in_any_layout(layout, device, dtype, close):
    from lablib.kernels.grouped_linear import triton

    x, weight, counts = map(layout, _inputs([4, 4, 4], 6, 5, device, dtype))
    close(triton.product(x, weight, counts), naive.grouped_linear(x, weight, counts))
    grad = layout(torch.randn(12, 5, device=device, dtype=dtype) / 16)
    close(triton.outer(grad, x, counts), naive.grouped_outer(grad, x, counts))


def test_outputs_and_gradients_in_any_layout(layout, device, gradients):
    x, weight, counts = _inputs([4, 4, 4], 6, 5, device, torch.float32)

    def laid(function):
        return lambda x, weight: layout(function(layout(x), layout(weight), layout(counts)))

    ours, expected = laid(grouped_linear), laid(naive.grouped_linear)
    torch.testing.assert_close(gradients(ours, x, weight), gradients(expected, x, weight))


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(needed):
    x, weight, counts = _inputs([3, 0, 2], 4, 5, "cpu", torch.float32)
    x.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    grouped_linear(x, weight, counts).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == needed


def test_second_derivatives():
    x, weight, counts = _inputs([3, 0, 2], 4, 5, "cpu", torch.float64)
    x.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda a, b: grouped_linear(a, b, counts).tanh(), (x, weight)
    )


def test_registered_and_compiled():
    x, weight, counts = _inputs([3, 0, 2], 4, 5, "cpu", torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.lablib.grouped_linear.default, (x, weight, counts))
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, counts), grouped_linear(x, weight, counts))


def test_follows_autocast():
    x, weight, counts = _inputs([3, 0, 2], 4, 5, "cpu", torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_linear(x, weight, counts)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_says_what_does_not_fit():
    x, weight, counts = _inputs([3, 0, 2], 4, 5, "cpu", torch.float32)
    with pytest.raises(ValueError, match="d_in"):
        grouped_linear(x[:, :3], weight, counts)
    with pytest.raises(ValueError, match="int64"):
        grouped_linear(x, weight, counts.float())
    with pytest.raises(ValueError, match="sum to 6, but x has 5"):
        grouped_linear(x, weight, counts + torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match="group 1 has -1"):
        grouped_linear(x, weight, counts + torch.tensor([1, -1, 0]))
    with pytest.raises(TypeError, match="float64"):
        grouped_linear(x, weight.double(), counts)


def _mlp_inputs(activation, counts=(5, 0, 3), tokens=6, dim=4, width=7):
    torch.manual_seed(1)
    hidden = 2 * width if activation == "swiglu" else width
    token = torch.randint(tokens, (sum(counts),))
    floats = (
        torch.randn(tokens, dim),
        torch.rand(sum(counts)),
        torch.randn(len(counts), hidden, dim),
        torch.randn(len(counts), dim, width),
    )
    return floats, token, torch.tensor(counts)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("counts", [(5, 0, 3), (0, 0, 0), (4,)])
@pytest.mark.parametrize("compiled", [False, True])
def test_moe_mlp_outputs_and_gradients_equal_naive(activation, counts, compiled, gradients):
    floats, token, counts = _mlp_inputs(activation, counts)
    ours = torch.compile(moe_mlp, backend="aot_eager") if compiled else moe_mlp

    def call(function):
        return lambda x, w, up, down: function(x, token, w, up, down, counts, activation)

    torch.testing.assert_close(
        gradients(call(ours), *floats), gradients(call(naive_mlp.moe_mlp), *floats)
    )


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("rows", [1, 5, 8, 100])
def test_moe_mlp_in_chunks_of_any_size_equals_naive(activation, rows, gradients, monkeypatch):
    floats, token, counts = _mlp_inputs(activation, (5, 0, 3, 2, 9, 1))
    monkeypatch.setattr(moe_mlp_module, "CHUNK", rows * floats[2].shape[1])

    def call(function):
        return lambda x, w, up, down: function(x, token, w, up, down, counts, activation)

    torch.testing.assert_close(
        gradients(call(moe_mlp), *floats), gradients(call(naive_mlp.moe_mlp), *floats)
    )
    with torch.no_grad():
        torch.testing.assert_close(call(moe_mlp)(*floats), call(naive_mlp.moe_mlp)(*floats))


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_moe_mlp_in_any_layout(activation, layout, gradients):
    floats, token, counts = _mlp_inputs(activation, (4, 4, 4))

    def laid(function):
        def call(*floats):
            x, weight, up, down = map(layout, floats)
            place, sizes = layout(token), layout(counts)
            return layout(function(x, place, weight, up, down, sizes, activation))

        return call

    torch.testing.assert_close(
        gradients(laid(moe_mlp), *floats), gradients(laid(naive_mlp.moe_mlp), *floats)
    )


def test_chunks_take_whole_groups_in_order(monkeypatch):
    monkeypatch.setattr(moe_mlp_module, "CHUNK", 8 * 3)
    groups = [(0, 0, 5), (2, 5, 8), (3, 8, 10), (4, 10, 19), (5, 19, 20)]
    chunks = [tuple(chunk) for chunk in moe_mlp_module._chunks(groups, hidden=3)]
    assert chunks == [
        (0, 8, [0, 2], [5, 3]),
        (8, 10, [3], [2]),
        (10, 19, [4], [9]),
        (19, 20, [5], [1]),
    ]


def test_moe_mlp_without_gradients_and_with_some():
    (x, weight, up, down), token, counts = _mlp_inputs("swiglu")
    with torch.no_grad():
        plain = moe_mlp(x, token, weight, up, down, counts)
    down.requires_grad_()
    torch.testing.assert_close(moe_mlp(x, token, weight, up, down, counts), plain)
    moe_mlp(x, token, weight, up, down, counts).sum().backward()
    assert down.grad[1].eq(0).all() and down.grad[0].ne(0).any()


def test_moe_mlp_says_what_does_not_fit():
    (x, weight, up, down), token, counts = _mlp_inputs("swiglu")
    with pytest.raises(ValueError, match="gelu"):
        moe_mlp(x, token, weight, up, down, counts, "gelu")
    with pytest.raises(ValueError, match="it should be"):
        moe_mlp(x, token, weight, up, down, counts, "relu")
    with pytest.raises(ValueError, match="token"):
        moe_mlp(x, token[1:], weight, up, down, counts)
    with pytest.raises(ValueError, match="sum to"):
        moe_mlp(x, token, weight, up, down, counts + 1)
