from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lablib.kernels import dequant_matmul
from lablib.kernels.dequant_matmul import naive, one_token

module = import_module("lablib.kernels.dequant_matmul")

# tokens, in, out, group
SHAPES = [(1, 64, 48, 32), (5, 70, 33, 16), (17, 128, 65, 128), (3, 7, 2, 7), (0, 16, 4, 8)]


def _inputs(bits, tokens, size, rows, group, device="cpu", zeros="each"):
    torch.manual_seed(bits + size)
    groups = -(-size // group)
    x = torch.randn(tokens, size, device=device)
    packed = naive.pack(torch.randint(2**bits, (rows, size), device=device), bits)
    scale = torch.rand(rows, groups, device=device) / 2**bits
    shape = {"each": (rows, groups), "row": (rows, 1), "one": (1, 1)}[zeros]
    return x, packed, scale, torch.rand(shape, device=device) * 2**bits


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(naive.PLANES)), st.integers(1, 4), st.integers(0, 70))
def test_unpacking_gives_back_what_was_packed(bits, rows, size):
    codes = torch.randint(2**bits, (rows, size))
    packed = naive.pack(codes, bits)
    assert packed.shape == (rows, naive.packed_size(size, bits))
    assert torch.equal(naive.unpack(packed, bits, size), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", naive.PLANES)
def test_codes_are_packed_without_gaps(bits):
    assert naive.packed_size(64, bits) == 8 * bits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", naive.PLANES)
@pytest.mark.parametrize("zeros", ["each", "row", "one"])
def test_outputs_and_gradients_equal_naive(bits, shape, zeros, device, gradients):
    x, *weight = _inputs(bits, *shape, device, zeros)
    ours = gradients(lambda x: dequant_matmul(x, *weight, bits, shape[-1]), x)
    expected = gradients(lambda x: naive.dequant_matmul(x, *weight, bits, shape[-1]), x)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["each", "row", "one"])
def test_triton_multiplies_as_naive_does(bits, shape, zeros, device, dtype, close):
    from lablib.kernels.dequant_matmul import triton

    x, *weight = _inputs(bits, *shape, device, zeros)
    x = x.to(dtype)
    expected = naive.dequant_matmul(x, *weight, bits, shape[-1])
    close(triton.product(x, *weight, bits, shape[-1]), expected)


@pytest.mark.parametrize("bits", [3, 4])
def test_any_layout(bits, layout, device, dtype, close):
    from lablib.kernels.dequant_matmul import triton

    x, *weight = _inputs(bits, 6, 32, 8, 16, device)
    x, weight = layout(x.to(dtype)), [layout(part) for part in weight]
    expected = naive.dequant_matmul(x, *weight, bits, 16)
    close(dequant_matmul(x, *weight, bits, 16), expected)
    if bits == 4:
        close(triton.product(x, *weight, bits, 16), expected)


def test_leading_axes_and_half_precision(dtype, close):
    x, *weight = _inputs(4, 12, 64, 24, 32)
    expected = naive.dequant_matmul(x, *weight, 4, 32)
    out = dequant_matmul(x.view(3, 4, 64).to(dtype), *weight, 4, 32)
    assert out.shape == (3, 4, 24) and out.dtype == dtype
    close(out.view(12, 24), expected)


def test_autocast_and_compile():
    x, *weight = _inputs(4, 4, 64, 24, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert dequant_matmul(x, *weight, 4, 32).dtype == torch.bfloat16
    torch.library.opcheck(module._product, (x.requires_grad_(), *weight, 4, 32))


@pytest.mark.filterwarnings("ignore:Input")  # float32 is what the CPU path computes in
def test_second_derivatives_and_forward_mode():
    x, *weight = _inputs(4, 3, 32, 8, 16)
    assert torch.autograd.gradgradcheck(
        lambda x: dequant_matmul(x, *weight, 4, 16).square(),
        x.requires_grad_(),
        eps=1e-2,
        atol=1e-2,
        rtol=1e-2,
    )
    _, tangent = torch.func.jvp(
        lambda x: dequant_matmul(x, *weight, 4, 16), (x.detach(),), (torch.ones(3, 32),)
    )
    expected = naive.dequant_matmul(torch.ones(3, 32), *weight, 4, 16)
    torch.testing.assert_close(tangent, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 9}, "2 to 8 bits"),
        ({"x": torch.zeros(2, 30)}, "uint8"),
        ({"group": 0}, "do not fit"),
        ({"scale": torch.zeros(8, 3)}, "do not fit"),
        ({"zero": torch.zeros(3, 2)}, "do not fit"),
        ({"scale": torch.zeros(8, 2, requires_grad=True)}, "detach"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    x, packed, scale, zero = _inputs(4, 2, 32, 8, 16)
    given = {"x": x, "packed": packed, "scale": scale, "zero": zero, "bits": 4, "group": 16}
    with pytest.raises(ValueError, match=said):
        dequant_matmul(**given | change)


def test_the_whole_weight_is_never_there(monkeypatch):
    monkeypatch.setattr(module, "TILE", 256)
    x, *weight = _inputs(4, 2, 64, 40, 32)
    seen = []
    tiles = module._tiles
    monkeypatch.setattr(
        module, "_tiles", lambda *a: (seen.append(w.numel()) or (p, w) for p, w in tiles(*a))
    )
    torch.testing.assert_close(
        dequant_matmul(x, *weight, 4, 32), naive.dequant_matmul(x, *weight, 4, 32)
    )
    assert max(seen) == 256 and len(seen) == 10


@pytest.mark.parametrize(
    ("bits", "group"), [(8, 32), (4, 32), (2, 64), (8, 1024), (4, 24), (4, 1024)]
)
@pytest.mark.parametrize("tokens", [1, 70])
def test_triton_splits_the_inputs_of_few_tokens(bits, group, tokens, device, dtype, close):
    from lablib.kernels.dequant_matmul import triton

    x, *weight = _inputs(bits, tokens, 1024, 40, group, device)
    x = x.to(dtype) / 32
    whole = x.float(), *weight
    parts = triton._parts(x, 1, weight[0].shape[1], 16)[1]
    assert parts > 1
    close(triton.product(x, *weight, bits, group), naive.dequant_matmul(*whole, bits, group))


# in, out, group: whole groups; a short last one, and outputs that fill no whole byte; one a row
ONE_TOKEN = [(64, 48, 32), (70, 33, 16), (128, 65, 128), (7, 1, 7)]


@pytest.mark.skipif(not one_token.fits(torch.ones(1, 2)), reason="PyTorch without FBGEMM")
@pytest.mark.parametrize("shape", ONE_TOKEN)
@pytest.mark.parametrize("bits", naive.PLANES)
@pytest.mark.parametrize("zeros", ["each", "row", "one"])
def test_one_token_has_a_way_of_its_own(bits, shape, zeros, dtype, close, monkeypatch):
    x, *weight = _inputs(bits, 1, *shape, zeros=zeros)
    turned = one_token.turn(*weight, bits, shape[0], shape[-1], dtype)
    monkeypatch.setattr(module, "_product", None)  # the tiles are not asked
    out = dequant_matmul(x.to(dtype), *weight, bits, shape[-1], turned)
    assert out.dtype == dtype
    close(out, naive.dequant_matmul(x.to(dtype), *weight, bits, shape[-1]))


@pytest.mark.skipif(not one_token.BUILT, reason="PyTorch without FBGEMM")
def test_one_token_in_bfloat16_takes_torchs_own_product_with_4_bits():
    x, *weight = _inputs(4, 1, 64, 48, 32)
    kinds = {
        dtype: one_token.turn(*weight, 4, 64, 32, dtype) for dtype in (torch.bfloat16, x.dtype)
    }
    assert [type(kind) for kind in kinds.values()] == [one_token.Int4, one_token.Turned]
    assert kinds[torch.bfloat16].codes.nbytes == 48 * 64 / 2
    x, *odd = _inputs(4, 1, 64, 33, 32)  # 33 outputs: torch's product takes sixteens
    assert isinstance(one_token.turn(*odd, 4, 64, 32, torch.bfloat16), one_token.Turned)


@pytest.mark.skipif(not one_token.BUILT, reason="PyTorch without FBGEMM")
def test_one_token_in_bfloat16_takes_torchs_own_product_with_8_bits_and_a_scale_a_row():
    for group, kind in ((64, one_token.Int8), (32, one_token.Turned)):
        _, *weight = _inputs(8, 1, 64, 33, group)
        turned = one_token.turn(*weight, 8, 64, group, torch.bfloat16)
        assert type(turned) is kind
    _, *weight = _inputs(8, 1, 64, 33, 64)
    assert type(one_token.turn(*weight, 8, 64, 64)) is one_token.Turned


@pytest.mark.skipif(not one_token.BUILT, reason="PyTorch without FBGEMM")
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64)])
def test_a_layout_for_bfloat16_is_not_read_in_another_dtype(bits, group, close):
    x, *weight = _inputs(bits, 1, 64, 48, group)
    turned = one_token.turn(*weight, bits, 64, group, torch.bfloat16)
    expected = naive.dequant_matmul(x, *weight, bits, group)
    close(dequant_matmul(x, *weight, bits, group, turned), expected)


def test_codes_that_are_laid_out_again_take_as_many_bytes():
    for bits, width in one_token.WIDTHS.items():
        _, *weight = _inputs(bits, 1, 256, 512, 64)
        turned = one_token.turn(*weight, bits, 256, 64)
        ends = 256 * (8 if width == 8 else 4)
        assert turned.codes.nbytes == 256 * 512 * width / 8 + ends


def test_several_tokens_and_those_that_learn_go_by_tiles(gradients):
    x, *weight = _inputs(4, 2, 64, 48, 32)
    turned = one_token.turn(*weight, 4, 64, 32)
    wrong = turned._replace(scale=turned.scale * 0)  # were it read, all outputs would be near 0
    expected = naive.dequant_matmul(x, *weight, 4, 32)
    torch.testing.assert_close(dequant_matmul(x, *weight, 4, 32, wrong), expected)
    ours = gradients(lambda x: dequant_matmul(x, *weight, 4, 32, wrong), x[:1])
    theirs = gradients(lambda x: naive.dequant_matmul(x, *weight, 4, 32), x[:1])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_without_fbgemm_one_token_goes_by_tiles(monkeypatch):
    x, *weight = _inputs(4, 1, 64, 48, 32)
    turned = one_token.turn(*weight, 4, 64, 32)
    monkeypatch.setattr(one_token, "BUILT", False)
    wrong = turned._replace(scale=turned.scale * 0)
    expected = naive.dequant_matmul(x, *weight, 4, 32)
    torch.testing.assert_close(dequant_matmul(x, *weight, 4, 32, wrong), expected)
