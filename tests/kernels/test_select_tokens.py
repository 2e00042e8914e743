import pytest
import torch

from lablib.kernels import merge_tokens, select_tokens
from lablib.kernels.select_tokens import naive

SHAPES = [(37, 20), (64, 1), (1, 5), (0, 8), (130, 1030)]


def _masked(tokens, d, device, dtype, keep=0.5):
    torch.manual_seed(tokens + d)
    x = torch.randn(tokens, d, device=device, dtype=dtype)
    return x, torch.rand(tokens, device=device) < keep


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_triton_selects_the_same_rows(shape, keep, device, dtype):
    from lablib.kernels.select_tokens import triton

    x, mask = _masked(*shape, device, dtype, keep)
    rows, index = triton.select_tokens(x, mask)
    expected = naive.select_tokens(x, mask)
    assert torch.equal(rows, expected[0])
    assert torch.equal(index, expected[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_triton_merges_as_naive_does_repeats_too(shape, weighted, device, dtype, close):
    from lablib.kernels.select_tokens import triton

    x, _ = _masked(*shape, device, dtype)
    index = torch.randint(max(1, len(x)), (2 * len(x),), device=device)
    rows = torch.randn(len(index), shape[1], device=device, dtype=dtype)
    weight = torch.rand(len(index), device=device, dtype=dtype) if weighted else None
    close(triton.merge_tokens(x, rows, index, weight), naive.merge_tokens(x, rows, index, weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_select_gives_naive_outputs_and_gradients(shape, device, gradients):
    x, mask = _masked(*shape, device, torch.float32)
    ours = gradients(lambda x: select_tokens(x, mask)[0], x)
    expected = gradients(lambda x: naive.select_tokens(x, mask)[0], x)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1][0], expected[1][0])


def test_merge_gives_naive_outputs_and_gradients(device, gradients):
    torch.manual_seed(0)
    x, rows, weight = torch.randn(9, 4), torch.randn(12, 4), torch.rand(12)
    index = torch.randint(9, (12,))
    x, rows, weight, index = (t.to(device) for t in (x, rows, weight, index))
    ours = gradients(lambda *a: merge_tokens(a[0], a[1], index, a[2]), x, rows, weight)
    expected = gradients(lambda *a: naive.merge_tokens(a[0], a[1], index, a[2]), x, rows, weight)
    torch.testing.assert_close(ours, expected)


def _merge_inputs(device, dtype):
    torch.manual_seed(0)
    x, rows = torch.randn(9, 4, device=device), torch.randn(12, 4, device=device)
    weight, index = torch.rand(12, device=device), torch.randint(9, (12,), device=device)
    return x.to(dtype), rows.to(dtype), index, weight.to(dtype)


def test_triton_in_any_layout(layout, device, dtype, close):
    from lablib.kernels.select_tokens import triton

    x, mask = map(layout, _masked(20, 6, device, dtype, keep=0.7))
    ours, expected = triton.select_tokens(x, mask), naive.select_tokens(x, mask)
    assert all(map(torch.equal, ours, expected))
    inputs = [layout(t) for t in _merge_inputs(device, dtype)]
    close(triton.merge_tokens(*inputs), naive.merge_tokens(*inputs))


def test_outputs_and_gradients_in_any_layout(layout, device, gradients):
    x, rows, index, weight = _merge_inputs(device, torch.float32)
    mask = torch.arange(9, device=device) % 3 != 1

    def laid(select, merge):
        def call(x, rows, weight):
            merged = merge(layout(x), layout(rows), layout(index), layout(weight))
            return layout(merged), layout(select(layout(x), layout(mask))[0])

        return lambda *floats: torch.cat(call(*floats))

    ours = gradients(laid(select_tokens, merge_tokens), x, rows, weight)
    expected = gradients(laid(naive.select_tokens, naive.merge_tokens), x, rows, weight)
    torch.testing.assert_close(ours, expected)


def test_selecting_and_merging_nothing_new_gives_x_back():
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    rows, index = select_tokens(x, mask)
    assert index.tolist() == [0, 2, 5]
    assert torch.equal(merge_tokens(x, torch.zeros_like(rows), index), x)
    doubled = merge_tokens(x, rows, index)
    assert torch.equal(doubled[mask], 2 * x[mask])
    assert torch.equal(doubled[~mask], x[~mask])


def test_registered_as_torch_library_expects():
    x, mask = torch.randn(6, 3, requires_grad=True), torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    torch.library.opcheck(torch.ops.lablib.select_tokens.default, (x, mask))
    rows, index = torch.randn(3, 3, requires_grad=True), torch.tensor([0, 0, 5])
    weight = torch.rand(3, requires_grad=True)
    for given in (weight, None):
        torch.library.opcheck(torch.ops.lablib.merge_tokens.default, (x, rows, index, given))


def test_compiled_as_one_graph():
    def skip(x, mask):
        rows, index = select_tokens(x, mask)
        return merge_tokens(x, rows.tanh(), index)

    x, mask = torch.randn(10, 4), torch.rand(10) < 0.5
    compiled = torch.compile(skip, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), skip(x, mask))


def test_says_what_does_not_fit():
    x = torch.randn(5, 3)
    with pytest.raises(TypeError, match="bool"):
        select_tokens(x, torch.ones(5))
    with pytest.raises(ValueError, match="leading axes"):
        select_tokens(x, torch.ones(4).bool())
    with pytest.raises(ValueError, match="do not fit"):
        merge_tokens(x, torch.randn(2, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="weights"):
        merge_tokens(x, torch.randn(2, 3), torch.tensor([0, 1]), torch.ones(3))
    with pytest.raises(TypeError, match="float16"):
        merge_tokens(x, torch.randn(2, 3).half(), torch.tensor([0, 1]))
