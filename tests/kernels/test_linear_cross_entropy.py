import sys

import pytest
import torch

from lablib.kernels import linear_cross_entropy
from lablib.kernels.linear_cross_entropy import naive

module = sys.modules["lablib.kernels.linear_cross_entropy"]
CASES = [(37, 20, 101), (1, 3, 2), (64, 16, 4097), (5, 1, 7)]


def _inputs(tokens, d, vocab, device, dtype, ignored=1):
    torch.manual_seed(tokens + vocab)
    hidden = torch.randn(tokens, d, device=device, dtype=dtype)
    weight = torch.randn(vocab, d, device=device, dtype=dtype) / d**0.5
    target = torch.randint(vocab, (tokens,), device=device)
    if tokens > ignored:
        target[:ignored] = -100
    return hidden, weight, target


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mean", [True, False])
def test_triton_loss_and_gradients(case, mean, device, dtype, close, monkeypatch):
    from lablib.kernels.linear_cross_entropy import triton

    monkeypatch.setattr(module, "CHUNK", 16 * case[2])
    hidden, weight, target = _inputs(*case, device, dtype)
    ours = module._chunks(hidden, weight, target, -100, mean, True, True, rows=triton.rows)
    leaves = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    loss = naive.linear_cross_entropy(*leaves, target, mean=mean)
    loss.backward()
    for one, other in zip(ours, (loss, *(leaf.grad for leaf in leaves)), strict=True):
        close(one, other.detach())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 1000, 2**25])
def test_outputs_and_gradients_equal_naive(case, reduction, chunk, device, gradients, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, weight, target = _inputs(*case, device, torch.float32)
    ours = gradients(
        lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction), hidden, weight
    )
    expected = gradients(
        lambda h, w: naive.linear_cross_entropy(h, w, target, mean=reduction == "mean"),
        hidden,
        weight,
    )
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", ["cpu", "triton"])
def test_in_any_layout(rows, layout, device, gradients, monkeypatch):
    from lablib.kernels.linear_cross_entropy import triton

    monkeypatch.setattr(module, "CHUNK", 5 * 11)
    monkeypatch.setattr(module, "_rows", triton.rows if rows == "triton" else module._rows)
    hidden, weight, target = _inputs(12, 8, 11, device, torch.float32, ignored=0)
    target[5] = -100

    def laid(function):
        return lambda h, w: function(layout(h), layout(w), layout(target))

    ours = gradients(laid(linear_cross_entropy), hidden, weight)
    torch.testing.assert_close(ours, gradients(laid(naive.linear_cross_entropy), hidden, weight))


def _gradient_errors(function, hidden, weight, target, loss_scale=2.0**16):
    """Relative errors of float16 gradients under the loss scale that GradScaler begins with."""

    def gradients(function, dtype, scale):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        (scale * function(*leaves, target)).backward()
        return [leaf.grad.float() / scale for leaf in leaves]

    exact = gradients(naive.linear_cross_entropy, torch.float32, 1.0)
    half = gradients(function, torch.float16, loss_scale)
    return [float((a - b).norm() / b.norm()) for a, b in zip(half, exact, strict=True)]


@pytest.mark.parametrize(("rows", "tokens"), [("cpu", 8192), ("triton", 64)])
def test_float16_gradients_are_as_exact_as_those_of_logits_then_loss(
    rows, tokens, monkeypatch, device
):
    from lablib.kernels.linear_cross_entropy import triton

    monkeypatch.setattr(module, "CHUNK", 2048 * tokens // 4)
    monkeypatch.setattr(module, "_rows", triton.rows if rows == "triton" else module._rows)
    inputs = _inputs(tokens, 16, 2048, device if rows == "triton" else "cpu", torch.float16)
    ours = _gradient_errors(linear_cross_entropy, *inputs)
    plain = _gradient_errors(naive.linear_cross_entropy, *inputs)
    assert max(plain) < 5e-4  # what rounding the results alone gives
    assert ours[0] < 1.01 * plain[0]
    assert ours[1] < 1.5 * plain[1]  # rounded once a chunk, and once more as a sum


def test_float16_sums_over_many_tokens_do_not_overflow():
    hidden, weight = torch.full((70_000, 1), 8.0).half(), torch.zeros(2, 1).half().requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(70_000, dtype=torch.int64)).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-4.0], [4.0]]).half())


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed(needed):
    hidden, weight, target = _inputs(9, 4, 11, "cpu", torch.float32)
    hidden.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    loss = linear_cross_entropy(hidden, weight, target)
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == needed


def test_all_tokens_ignored_is_nan_as_in_torch():
    hidden, weight, target = _inputs(4, 3, 5, "cpu", torch.float32)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(target, -100))
    assert loss.isnan()
    assert linear_cross_entropy(hidden, weight, torch.full_like(target, -100), reduction="sum") == 0


def test_leading_axes_a_custom_ignore_index_and_half_precision():
    hidden, weight, target = _inputs(12, 8, 9, "cpu", torch.float32, ignored=0)
    target[3] = 0
    plain = naive.linear_cross_entropy(hidden, weight, target, ignore_index=0)
    shaped = linear_cross_entropy(hidden.view(3, 4, 8), weight, target.view(3, 4), ignore_index=0)
    torch.testing.assert_close(shaped, plain)
    half = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target, ignore_index=0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, atol=0.05, rtol=0.02)


def test_follows_autocast():
    hidden, weight, target = _inputs(12, 8, 9, "cpu", torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden.bfloat16(), weight, target)
    loss.backward()
    assert weight.grad.dtype == torch.float32


def test_the_upstream_gradient_scales_ours():
    hidden, weight, target = _inputs(12, 8, 9, "cpu", torch.float32)
    hidden.requires_grad_()
    (3 * linear_cross_entropy(hidden, weight, target)).backward()
    tripled, hidden.grad = hidden.grad, None
    linear_cross_entropy(hidden, weight, target).backward()
    torch.testing.assert_close(tripled, 3 * hidden.grad)


def test_registered_and_compiled():
    hidden, weight, target = _inputs(12, 8, 9, "cpu", torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    arguments = (hidden, weight, target, -100, True, True, True)
    torch.library.opcheck(torch.ops.lablib.linear_cross_entropy.default, arguments)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(hidden, weight, target), linear_cross_entropy(hidden, weight, target)
    )


def test_says_what_does_not_fit():
    hidden, weight, target = _inputs(12, 8, 9, "cpu", torch.float32)
    with pytest.raises(ValueError, match="vocab, d"):
        linear_cross_entropy(hidden, weight[:, :7], target)
    with pytest.raises(ValueError, match="none"):
        linear_cross_entropy(hidden, weight, target, reduction="none")
    with pytest.raises(ValueError, match="target 9 is outside the vocabulary of 9"):
        linear_cross_entropy(hidden, weight, target.clamp(min=9))
    with pytest.raises(TypeError, match="float64"):
        linear_cross_entropy(hidden.double(), weight, target)
