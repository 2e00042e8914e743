import csv
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from lablib.compression import finequant as fq
from lablib.compression import quantize as q
from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.experts.routing import TokenChoice
from lablib.kernels import dequant_matmul
from lablib.kernels.dequant_matmul import naive
from lablib.models import GPT, GPTConfig, anatomy
from lablib.paths import PACKAGE, data_dir
from lablib.studies import finequant as study

PEER = PACKAGE / "compression" / "finequant.json"


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, max_length=16))


def plain(rows=48, size=256):
    torch.manual_seed(1)
    return torch.randn(rows, size)


def with_outliers(rows=48, size=256):
    weight = plain(rows, size)
    weight[:, 5] *= 40
    return weight


def test_absmax_by_hand():
    weight = torch.tensor([[0.3, -0.6, 0.1, 0.2, 6.0, 1.0, -1.0, 3.1]])
    # Three bits: seven levels, -3 to 3 times s. Groups of four: s = 0.2 and s = 2.
    expected = torch.tensor([[0.4, -0.6, 0.0, 0.2, 6.0, 0.0, 0.0, 4.0]])
    torch.testing.assert_close(fq.absmax(weight, 3, 4), expected)
    one = fq.absmax(weight, 3, 8)  # one scale for all: s = 2
    torch.testing.assert_close(one, torch.tensor([[0.0, 0, 0, 0, 6, 0, 0, 4]]))
    with pytest.raises(ValueError, match="no multiple"):
        fq.absmax(weight, 3, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.sampled_from([16, 32, 64, 256]))
def test_absmax_is_what_quantize_stores(bits, group):
    weight = with_outliers(8)
    stored = q.quantize(weight, bits, group=group, scale_dtype=torch.float32)
    torch.testing.assert_close(fq.absmax(weight, bits, group), stored.dequantize())
    assert (fq.absmax(torch.zeros(2, 256), bits, group) == 0).all()


def test_ranges_are_those_of_groups():
    weight = with_outliers()
    rms = weight.square().mean().sqrt()
    trail = fq.ranges(weight, (128, 100, 16))
    assert [size for size, _ in trail] == [256, 128, 100, 16]
    for size, wide in trail:
        peaks = torch.stack([part.abs().amax(1) for part in weight.split(size, 1)])
        assert wide == pytest.approx((peaks.square().mean().sqrt() / rms).item(), rel=1e-5)
    assert all(a[1] >= b[1] for a, b in pairwise(trail))
    assert fq.ranges(3 * weight)[2][1] == pytest.approx(fq.ranges(weight)[2][1])


def test_a_matrix_with_outliers_chooses_finer_groups():
    for gain in (fq.per_bit, fq.shrinking):
        calm, wild = (fq.ranges(w) for w in (plain(), with_outliers()))
        between = (gain(*calm[0], *calm[1]) + gain(*wild[0], *wild[1])) / 2
        assert fq.adaptive_groups(calm, between, gain) == 256
        assert fq.adaptive_groups(wild, between, gain) < 256


@pytest.mark.parametrize("gain", [fq.per_bit, fq.shrinking])
def test_alpha_goes_from_the_finest_groups_to_rows(gain):
    trail = fq.ranges(with_outliers())
    sizes = [fq.adaptive_groups(trail, a, gain) for a in (-math.inf, 0.05, 0.2, 5, math.inf)]
    assert sizes[0] == 16 and sizes[-1] == 256 and sizes == sorted(sizes)


def test_gains_by_hand():
    # From groups of 64 to 32: the squared range falls by 9 - 4, scales take 16/32 - 16/64 more bits
    assert fq.per_bit(64, 3.0, 32, 2.0) == pytest.approx(5 / 0.25)
    assert fq.shrinking(64, 3.0, 32, 2.0) == pytest.approx(1 / 3)
    assert fq.shrinking(64, 4.0, 16, 1.0) == pytest.approx(1 / 2)  # two halvings


def test_bits_of_scales_are_what_is_stored():
    weights = [plain(40, 256), plain(24, 700)]
    groups = [64, 128]
    stored = [q.quantize(w, 4, group=g) for w, g in zip(weights, groups)]
    in_all = 8 * sum(s.stored_bytes() for s in stored) / sum(w.numel() for w in weights)
    shapes = [tuple(w.shape) for w in weights]
    assert 4 + fq.scale_bits(shapes, groups) == pytest.approx(in_all)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.03, 3), st.integers(50, 900), st.integers(50, 900))
def test_the_rival_gets_the_budget_and_no_coarser_one_would(budget, first, second):
    shapes = [(10, first), (30, second)]
    every = range(1, max(first, second) + 1)
    bits = [fq.scale_bits(shapes, [fq.even_group(size, g) for _, size in shapes]) for g in every]
    rival = fq.matched_groups(shapes, budget)
    assert fq.scale_bits(shapes, rival) == min(b for b in bits if b >= budget)


def test_rows_are_cut_evenly():
    assert fq.even_group(256, 255) == 128  # two groups either way
    assert fq.even_group(688, 255) == 230
    assert fq.even_group(688, 688) == 688


def test_a_budget_beyond_all_groups_is_refused():
    with pytest.raises(ValueError, match="no groups"):
        fq.matched_groups([(4, 8)], 17.0)


def test_a_model_takes_the_groups_that_its_matrices_choose():
    model, tokens = small_model(), torch.randint(50, (2, 9))
    with torch.no_grad():
        anatomy.projection(model, 1, "down").weight[:, 3] *= 50
    trails = {n: fq.ranges(m.weight) for n, m in anatomy.projections(model).items()}
    gains = {n: fq.per_bit(*t[0], *t[1]) for n, t in trails.items()}
    wild = max(gains, key=gains.get)
    alpha = sorted(gains.values())[-2]
    with q.rounded(model, lambda _, w: fq.adaptive(w, 4, alpha).dequantize()):
        expected = model(tokens)
    groups = fq.quantize_adaptively_(model, 4, alpha=alpha)
    assert [name for name in groups if groups[name] < trails[name][0][0]] == [wild]
    torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="not nn.Linear"):
        fq.quantize_adaptively_(model, 4, alpha=alpha)


def test_experts_choose_groups_of_their_own():
    model = small_model()
    anatomy.replace_part(model, 0, "mlp", MoE(TokenChoice(32, 4), SwiGLUExperts(4, 32, 64)))
    name = next(n for n, w in q.matrices(model).items() if w.ndim == 3 and n.endswith("down"))
    with torch.no_grad():
        model.get_parameter(name)[2, :, 7] *= 50
    chosen, before = [], model(torch.arange(9)[None])

    def round_weight(which, weight):
        group = fq.adaptive_groups(fq.ranges(weight), 8.0)
        chosen.extend([group] if which == name else [])
        return q.quantize(weight, 3, group=group).dequantize()

    with q.rounded(model, round_weight):
        assert (model(torch.arange(9)[None]) - before).abs().max() > 1e-3
    assert len(chosen) == 4 and chosen[2] < min(chosen[:2] + chosen[3:])
    assert torch.equal(model(torch.arange(9)[None]), before)


def test_finer_groups_err_less():
    for bits in (2, 3, 4, 8):
        errors = fq.errors(with_outliers(), bits, ["row", 128, 64, 32, 16])
        assert list(errors.values()) == sorted(errors.values(), reverse=True)
    small = q.quantize(plain(), 4, group=32)
    off = (small.dequantize() - plain()).norm() / plain().norm()
    assert fq.relative_error(plain(), small) == pytest.approx(off.item() ** 2, rel=1e-4)


def test_column_peaks_find_the_outlier():
    peaks = fq.column_peaks(with_outliers())
    assert peaks.shape == (256,) and peaks.argmax() == 5
    assert peaks[5] == pytest.approx(
        (with_outliers()[:, 5].abs().max() / with_outliers().square().mean().sqrt()).item()
    )


def test_linear_weights_are_those_of_any_model():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 2)))
    weights = fq.linear_weights(model)
    assert list(weights) == ["0.weight", "2.0.weight"]
    assert weights["0.weight"] is model[0].weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_product_takes_half_precision_activations(dtype):
    small, x = q.quantize(plain(), 4, group=64), plain(5).to(dtype)
    out = dequant_matmul(x, small.packed, small.scale, small.zero, 4, small.group)
    exact = x.double() @ small.dequantize().double().t()
    assert out.dtype == dtype
    allowed = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[dtype]
    assert (out.double() - exact).abs().max() <= allowed * exact.abs().max()


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_loses_nothing(bits):
    codes = torch.randint(2**bits, (7, 61), dtype=torch.uint8)
    assert torch.equal(naive.unpack(naive.pack(codes, bits), bits, 61), codes)


def torchaos(kind, bits, group):
    """What torchao computes of a case; "given" are our scales."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, block = study.peer_weight(), (1, group)
    low = 0 if kind == "integer-zero" else -(2 ** (bits - 1))
    span = torch.int8 if low else torch.uint8, low, low + 2**bits - 1
    if kind == "given":
        scale = study.peer_small(kind, bits, group).scale
        zero = torch.zeros_like(scale, dtype=torch.int32)
    else:
        mapping = "SYMMETRIC" if kind == "clipped" else "ASYMMETRIC"
        mapping = getattr(primitives.MappingType, mapping)
        scale, zero = primitives.choose_qparams_affine(weight, mapping, block, *span)
    codes = primitives.quantize_affine(weight, block, scale, zero, *span)
    back = primitives.dequantize_affine(codes, block, scale, zero, *span)
    parts = {"scale": scale, "codes": codes, "back": back}
    return {key: part.flatten().tolist() for key, part in parts.items()}


@pytest.mark.parametrize("case", study.PEER_CASES)
def test_the_recorded_values_are_torchaos(case):
    recorded = json.loads(PEER.read_text("utf-8"))[" ".join(map(str, case))]
    for key, values in torchaos(*case).items():
        assert recorded[key] == pytest.approx(values, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("case", study.PEER_CASES)
def test_scales_codes_and_weights_are_the_recorded_ones(case):
    recorded = json.loads(PEER.read_text("utf-8"))[" ".join(map(str, case))]
    for key, values in study.peer_values(*case).items():
        assert recorded[key] == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_the_published_figures_have_a_source():
    with open(data_dir() / "published" / "finequant.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {"value", "unit", "source"} <= set(rows[0])
    assert all(float(row["value"]) > 0 and row["source"] for row in rows)


@pytest.mark.parametrize("tokens", [1, 3])
def test_torchs_own_int4_product_is_the_same_product(tokens):
    made = study.ways(128, tokens)
    exact, ours = made["float32_seconds"](), made["int4_seconds"]()
    fused = made["fused_int4_seconds"]().float()
    assert (fused - ours).abs().max() < 0.02 * ours.abs().max()
    eight, fused8 = made["int8_seconds"](), made["fused_int8_seconds"]().float()
    assert (fused8 - eight).abs().max() < 0.02 * eight.abs().max()
    assert 0 < (ours - exact).abs().max() < 0.5 * exact.abs().max()


def test_scales_as_they_are_are_those_of_a_run():
    as_it_is = study.with_other_scales(3, 32, 1.0, seed=30, rows=1)
    assert as_it_is == pytest.approx(study.run(seed=30, bits=3, group=32, rows=1)["over"])
    assert study.with_other_scales(3, 32, 0.5, seed=30, rows=1) > 2 * as_it_is, "all is clipped"


def test_a_packed_model_is_smaller_and_loses_a_little():
    text = "The quick brown fox jumps over the lazy dog. " * 20
    whole, size, speed = study.at_work("tiny-1m", text)
    loss, fewer, _ = study.at_work("tiny-1m", text, 4, 32)
    assert fewer < 0.6 * size and speed > 0
    assert 0 < abs(loss - whole) < 0.5


def test_every_way_is_planned_for_both_models():
    ways = len(study.BITS) * len(study.SIZES) * len(study.SCHEMES)
    whole = [p for p in study.POINTS if p.get("rule") == "fixed"]
    assert len(whole) == 2 * ways * len(study.SEEDS) and len({str(p) for p in whole}) == len(whole)


# What an encoder is good for.


def test_no_pair_belongs_to_two_seeds():
    for seeds, split in (((0, 1, 4), 0), ((100, 101), 0)):
        drawn = [set(zip(*study.pairs_of(seed, 100)[split], strict=True)) for seed in seeds]
        assert all(len(rows) > 190 for rows in drawn)  # a few pairs of the test are there twice
        assert not any(a & b for a, b in pairwise(drawn))
    judged, tuned = (set(study.pairs_of(seed, 50)[1][0]) for seed in (0, 100))
    assert not judged & tuned


def test_tasks_leave_the_encoder_as_it_was_and_see_how_it_is_rounded():
    weights = fq.linear_weights(study.encoder("minilm-l6-v2")[0])
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    found = study.run(model="tasks", seed=100, rows=8)
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert set(found) == {f"{task}_{way}" for task in ("people", "search") for way in study.ROUNDED}
    (a, b, said), _ = study.pairs_of(100, 8)
    near = (study.embed("minilm-l6-v2", a) * study.embed("minilm-l6-v2", b)).sum(1)
    assert found["people_whole"] == pytest.approx(spearmanr(near, said).statistic, abs=1e-4)
    assert found["people_3_row"] != found["people_whole"]
