import pytest
import torch

from lablib.kernels import route
from lablib.kernels.route import naive

CASES = [(37, 11, 3), (64, 64, 8), (1, 3, 3), (0, 4, 2), (300, 5, 1), (129, 100, 1)]


def _logits(tokens, n_experts, device, dtype):
    """Random logits without ties, also in half precision."""
    torch.manual_seed(tokens + n_experts)
    order = torch.rand(tokens, n_experts, device=device).argsort(-1)
    return ((order - n_experts / 2) / 16).to(dtype)


@pytest.mark.parametrize("case", CASES)
def test_triton_routes_as_naive_does(case, device, dtype, close):
    from lablib.kernels.route import triton

    tokens, n_experts, top_k = case
    logits = _logits(tokens, n_experts, device, dtype)
    ours, expected = triton.route(logits, top_k), naive.route(logits, top_k)
    torch.testing.assert_close(ours[0], expected[0])
    for one, other in zip(ours[1:], expected[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("softmax", ["before", "after"])
def test_weights_counts_order_and_gradients(case, softmax, device, gradients):
    tokens, n_experts, top_k = case
    logits = _logits(tokens, n_experts, device, torch.float32)
    routing = route(logits, top_k, softmax)
    _, experts, counts, order = naive.route(logits, top_k)
    for one, other in zip(routing[2:], (experts, counts, order), strict=True):
        assert torch.equal(one, other)
    assert int(routing.counts.sum()) == tokens * top_k
    assert (routing.experts.flatten()[routing.order].diff() >= 0).all()

    def weights(logits):
        chosen = logits.softmax(-1).gather(1, experts)
        return chosen if softmax == "before" else chosen / chosen.sum(1, keepdim=True)

    ours = gradients(lambda x: route(x, top_k, softmax).weights, logits)
    torch.testing.assert_close(ours, gradients(weights, logits))
    ours = gradients(lambda x: route(x, top_k, softmax).probs, logits)
    torch.testing.assert_close(ours, gradients(lambda x: x.softmax(-1), logits))


def test_a_large_sort_is_stable_and_complete(device):
    from lablib.kernels.route.triton import sort_by_expert

    experts = torch.randint(7, (5000,), device=device)
    counts, order = sort_by_expert(experts, 7)
    assert torch.equal(order, experts.argsort(stable=True))
    assert torch.equal(counts, experts.bincount(minlength=7))


def test_triton_in_any_layout(layout, device, dtype):
    from lablib.kernels.route import triton

    logits = layout(_logits(20, 6, device, dtype))
    ours, expected = triton.route(logits, 2), naive.route(logits, 2)
    torch.testing.assert_close(ours[0], expected[0])
    for one, other in zip(ours[1:], expected[1:], strict=True):
        assert torch.equal(one, other)
    experts = layout(torch.arange(20, device=device) % 6)
    counts, order = triton.sort_by_expert(experts, 6)
    assert torch.equal(order, experts.argsort(stable=True))
    assert torch.equal(counts, experts.bincount(minlength=6))


def test_gradients_in_any_layout(layout, device, gradients):
    logits = _logits(20, 6, device, torch.float32)
    ours = gradients(lambda x: layout(route(layout(x), 2).probs), logits)
    torch.testing.assert_close(ours, gradients(lambda x: layout(layout(x).softmax(-1)), logits))


def test_half_precision_logits_are_routed_in_float32():
    logits = _logits(20, 6, "cpu", torch.float16)
    routing = route(logits, 2)
    assert routing.probs.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.probs.sum(1), torch.ones(20))


def test_registered_and_compiled():
    logits = torch.randn(8, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.lablib.route.default, (logits, 2))
    compiled = torch.compile(lambda x: route(x, 2, "after"), backend="aot_eager", fullgraph=True)
    for one, other in zip(compiled(logits), route(logits, 2, "after"), strict=True):
        torch.testing.assert_close(one, other)


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="tokens, n_experts"):
        route(torch.randn(2, 3, 4), 1)
    with pytest.raises(ValueError, match="top_k 4 of 3"):
        route(torch.randn(2, 3), 4)
    with pytest.raises(ValueError, match="during"):
        route(torch.randn(2, 3), 1, "during")
