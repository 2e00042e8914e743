import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lablib.compression import quantize as q
from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.experts.routing import TokenChoice
from lablib.models import GPT, GPTConfig, anatomy

HERE = Path(__file__).parent
PEERS = runpy.run_path(str(HERE / "record_quantize.py"))  # the weights, and what agrees


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, max_length=16))


def weights(rows=6, size=70):
    torch.manual_seed(1)
    return torch.randn(rows, size)


@pytest.mark.parametrize("scheme", q.SCHEMES)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", ["tensor", "row", 32, 16, 100])
def test_no_weight_moves_by_more_than_half_a_step(scheme, bits, group):
    weight = weights()
    small = q.quantize(weight, bits, group=group, scheme=scheme, scale_dtype=torch.float32)
    step = small.scale.repeat_interleave(small.group, 1)[:, : weight.shape[1]]
    off = (small.dequantize() - weight).abs()
    # The largest weight of a clipped group lies half a step outside of the levels.
    assert (off <= step * (1.0 if scheme == "clipped" else 0.5) + 1e-5).all()


def test_symmetric_by_hand():
    small = q.quantize(torch.tensor([[-1.4, 0.1, 0.3, 0.7]]), 3, scale_dtype=torch.float32)
    assert torch.allclose(small.scale, torch.tensor([[1.4 / 3]]))
    assert small.codes.tolist() == [[0, 3, 4, 4]]  # 0.7 is 1.5 steps; rounding is to even
    assert q.quantize(torch.zeros(1, 4), 3).dequantize().tolist() == [[0.0] * 4]


def test_half_step_has_no_zero_and_as_many_levels_on_either_side():
    small = q.quantize(torch.linspace(-1, 1, 64)[None], 2, scheme="half-step")
    assert sorted(set(small.dequantize().flatten().tolist())) == pytest.approx(
        [-1, -1 / 3, 1 / 3, 1], abs=1e-3
    )


def test_a_zero_stays_zero_where_a_scheme_says_so():
    weight = weights().abs() + 0.5
    weight[:, ::3] = 0
    for scheme in ("symmetric", "clipped", "integer-zero"):
        small = q.quantize(weight, 4, group=16, scheme=scheme)
        assert (small.dequantize()[:, ::3] == 0).all()


@pytest.mark.parametrize(
    ("scheme", "mapping"), [("clipped", "SYMMETRIC"), ("integer-zero", "ASYMMETRIC")]
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_and_scales_are_torchaos(scheme, mapping, bits, group):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = weights(8, 256)
    ours = q.quantize(weight, bits, group=group, scheme=scheme, scale_dtype=torch.float32)
    low, high = (
        (0, 2**bits - 1) if scheme == "integer-zero" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    )
    dtype = torch.uint8 if scheme == "integer-zero" else torch.int8
    block = (1, group)
    scale, zero = primitives.choose_qparams_affine(
        weight, getattr(primitives.MappingType, mapping), block, dtype, low, high
    )
    codes = primitives.quantize_affine(weight, block, scale, zero, dtype, low, high)
    back = primitives.dequantize_affine(codes, block, scale, zero, dtype, low, high)
    torch.testing.assert_close(ours.scale, scale.view_as(ours.scale))
    steps = weight / ours.scale.repeat_interleave(group, 1)
    clear = (steps.abs() % 1 - 0.5).abs() > 1e-4  # else rounding decides between two codes
    assert clear.float().mean() > 0.9
    assert torch.equal((ours.codes.int() + low)[clear], codes.int()[clear])
    torch.testing.assert_close(ours.dequantize()[clear], back[clear])


def test_given_scales_are_used_as_they_are():
    weight = weights()
    whole = q.quantize(weight, 4, group=16)
    again = q.quantize(weight * 3, 4, group=16, scale=whole.scale, zero=whole.zero)
    assert torch.equal(again.scale, whole.scale)
    assert again.dequantize().abs().max() <= whole.dequantize().abs().max()


def test_ignored_weights_leave_the_range_to_the_others():
    weight = weights()
    weight[0, 3] = 50.0
    far = weight.abs() > 10
    with_it, without = (q.quantize(weight, 4, group=16, ignore=i) for i in (None, far))
    others = ~far[0, :16]
    error = [(s.dequantize() - weight)[0, :16][others].abs().max() for s in (with_it, without)]
    assert error[1] < error[0] / 5
    all_ignored = q.quantize(weight, 4, group=16, ignore=torch.ones_like(weight, dtype=torch.bool))
    assert torch.isfinite(all_ignored.dequantize()).all()


def test_bits_per_weight_count_scales_and_zeros():
    weight = weights(64, 128)
    assert q.quantize(weight, 4, group=64).bits_per_weight() == 4 + 16 / 64
    assert q.quantize(weight, 3, group=32, scheme="asymmetric").bits_per_weight() == 3 + 32 / 32
    assert q.quantize(weight, 8).bits_per_weight() == 8 + 16 / 128


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.sampled_from(["row", "tensor", 8, 24]), st.sampled_from([*q.SCHEMES]))
def test_a_product_is_that_of_the_dequantized_weight(bits, group, scheme):
    small = q.quantize(weights(), bits, group=group, scheme=scheme)
    x = torch.randn(2, 3, 70)
    torch.testing.assert_close(small.matmul(x), x @ small.dequantize().t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 1}, "2 to 8"),
        ({"scheme": "odd"}, "none of"),
        ({"group": 0}, "number above 0"),
        ({"group": "column"}, "neither"),
        ({"weight": torch.zeros(3)}, "two axes"),
        ({"weight": torch.tensor([[float("nan")]])}, "not finite"),
    ],
)
def test_what_cannot_be_quantized_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        q.quantize(**{"weight": weights(), "bits": 4} | change)


def test_quantized_models_survive_saving(tmp_path):
    from safetensors.torch import load_file, save_file

    model = small_model()
    names = q.quantize_(model, 4, group=16)
    assert names == list(anatomy.projections(model))
    tokens = torch.randint(50, (2, 9))
    expected = model(tokens)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items() if k != "head.weight"},
        tmp_path / "model.safetensors",
    )
    other = small_model()
    q.quantize_(other, 4, group=16)
    for part in other.parameters():
        nn.init.zeros_(part.data)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(other(tokens), expected)
    with pytest.raises(ValueError, match="QuantizedLinear, not nn.Linear"):
        q.quantize_(model, 4)


def test_a_quantized_model_computes_what_a_rounded_one_does_in_fewer_bytes():
    model, tokens = small_model(), torch.randint(50, (2, 9))
    before = q.stored_bytes(model)
    with q.rounded(model, lambda _, w: q.quantize(w, 3, group=16).dequantize()):
        expected = model(tokens)
    linear = sum(layer.weight.numel() for layer in anatomy.projections(model).values())
    q.quantize_(model, 3, group=16)
    torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-4)
    assert q.stored_bytes(model) == pytest.approx(before - 4 * linear + linear * 4 / 8, abs=1000)


def test_a_layer_that_reads_one_token_follows_its_weight():
    weight, x = weights(32, 64), torch.randn(1, 64)
    layer = q.QuantizedLinear(q.quantize(weight, 4, group=16))
    state, size = set(layer.state_dict()), q.stored_bytes(layer)
    torch.testing.assert_close(layer(x), layer(x.repeat(2, 1))[:1], atol=1e-5, rtol=1e-4)
    assert set(layer.state_dict()) == state and q.stored_bytes(layer) == size
    other = q.QuantizedLinear(q.quantize(-2 * weight, 4, group=16))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x.repeat(2, 1))[:1], atol=1e-5, rtol=1e-4)
    layer.double()  # scales alone have another dtype
    torch.testing.assert_close(layer(x), other(x), atol=1e-5, rtol=1e-4)


def test_gradients_pass_through_to_what_is_before():
    model, tokens = small_model(), torch.randint(50, (2, 9))
    q.quantize_(model, 4, group=16)
    model(tokens).sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_rounded_restores_to_the_bit_also_after_an_error():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    with q.rounded(model, lambda _, w: w * 0, "up"):
        assert (anatomy.projection(model, 1, "up").weight == 0).all()
        assert (anatomy.projection(model, 1, "down").weight != 0).any()
    with pytest.raises(IndexError), q.rounded(model, lambda _, w: w * 0):
        model(torch.tensor([[1000]]))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_experts_are_rounded_one_by_one():
    model = small_model()
    moe = MoE(TokenChoice(32, 4), SwiGLUExperts(4, 32, 16))
    anatomy.replace_part(model, 0, "mlp", moe)
    experts = [name for name, weight in q.matrices(model).items() if weight.ndim == 3]
    assert experts and not any(w.ndim == 3 for w in q.matrices(model, "query").values())
    seen = []
    with q.rounded(model, lambda name, w: seen.append((name, w.ndim)) or w * 2):
        pass
    assert [n for n, _ in seen].count(experts[0]) == 4 and {d for _, d in seen} == {2}


def drawn(package, bits, group):
    """Our rounding of the weights that a package's recorded rounding is of."""
    scheme = PEERS["CASES"][package, bits, group]
    weight = torch.from_numpy(PEERS["weights"]())
    return q.quantize(weight, bits, group=group, scheme=scheme, scale_dtype=torch.float32)


@pytest.mark.parametrize("case", PEERS["CASES"], ids=str)
def test_codes_and_weights_are_those_of_hqq_and_optimum_quanto(case):
    recorded = json.loads((HERE / "quantize.json").read_text("utf-8"))[" ".join(map(str, case))]
    small = drawn(*case)
    assert small.codes.tolist() == recorded["codes"]
    assert torch.allclose(small.dequantize(), torch.tensor(recorded["back"]), atol=1e-5)


def test_another_convention_is_not_theirs():
    recorded = json.loads((HERE / "quantize.json").read_text("utf-8"))["hqq 4 32"]
    weight = torch.from_numpy(PEERS["weights"]())
    for scheme in set(q.SCHEMES) - {"asymmetric"}:
        back = q.quantize(weight, 4, group=32, scheme=scheme).dequantize()
        assert (back - torch.tensor(recorded["back"])).abs().max() > 0.01
