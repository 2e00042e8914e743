import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lablib.compression import cherry as ch
from lablib.compression.quantize import quantize
from lablib.exercises import cherry as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.paths import PACKAGE
from lablib.studies import cherry as study
from lablib.training import fit

PEER = PACKAGE / "compression" / "cherry.json"


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, max_length=16))


def weights(rows=6, size=70):
    torch.manual_seed(1)
    return torch.randn(rows, size)


def none(weight):
    return torch.zeros_like(weight, dtype=torch.bool)


def drawn(rows=6, size=70, k=3):
    return ch.cherries(torch.rand(rows, size), k / size)


# Impact.


class Losses(nn.Module):
    """The mean loss of each row, for curvlinops: (rows, 1)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        logits = self.model(rows[:, :-1]).transpose(1, 2)
        return F.cross_entropy(logits, rows[:, 1:], reduction="none").mean(1, keepdim=True)


def by_curvlinops():
    """Name -> E[g^2]: half of the diagonal of a Gauss-Newton matrix under a squared error.

    curvlinops comes with no extra: what it gave is stored (cherry.json), and compared with below.
    `pip install curvlinops-for-pytorch==3.0.1`, and it is asked again.
    """
    curvlinops = pytest.importorskip("curvlinops")
    losses, rows = Losses(study.fixed_model()), study.fixed_rows()
    layers = anatomy.projections(losses.model)
    given = [layer.weight for layer in layers.values()]
    data = [(rows, torch.zeros(len(rows), 1))]
    options = {"check_deterministic": False}
    matrix = curvlinops.GGNLinearOperator(losses, nn.MSELoss(), given, data, **options)
    sizes = [weight.numel() for weight in given]
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        diagonal = (matrix @ torch.eye(sum(sizes))).diagonal() / 2
    return {
        name: part.view_as(layers[name].weight)
        for name, part in zip(layers, diagonal.split(sizes), strict=True)
    }


def test_impacts_are_the_fisher_diagonal_of_curvlinops():
    ours = ch.impact(study.fixed_model(), study.fixed_rows())
    for name, theirs in by_curvlinops().items():
        torch.testing.assert_close(ours[name], theirs.detach(), atol=1e-5, rtol=1e-4)


def test_recorded_values_are_those_of_curvlinops():
    recorded = json.loads(PEER.read_text("utf-8"))
    for name, theirs in by_curvlinops().items():
        torch.testing.assert_close(
            torch.tensor(recorded[name]), theirs.detach().flatten(), atol=1e-5, rtol=1e-4
        )


def test_impacts_equal_the_recorded_values():
    recorded = json.loads(PEER.read_text("utf-8"))
    ours = ch.impact(study.fixed_model(), study.fixed_rows())
    assert set(recorded) == {"made with", *ours}
    for name, score in ours.items():
        torch.testing.assert_close(
            score.flatten(), torch.tensor(recorded[name]), atol=1e-5, rtol=1e-4
        )
        assert score.max() > 0.01


def test_a_moved_weight_changes_the_loss_as_brute_force_says():
    weight = torch.tensor([[1.0, 2.0]])
    found = study.mean_change(lambda: 3 * weight[0, 1].item() ** 2, weight, (0, 1), 0.5)
    assert found == pytest.approx(3 * 0.5**2)  # the slope cancels out, the curvature is left
    assert weight.tolist() == [[1.0, 2.0]]


def test_brute_force_is_in_double_precision():
    model, rows = small_model().double(), torch.randint(50, (3, 9))
    weight = anatomy.projection(model, 1, "up").weight.detach()
    changes = [
        study.mean_change(lambda: study.loss_of(model, rows), weight, (2, 3), size) / size**2
        for size in (1e-2, 1e-3)
    ]
    assert changes[0] == pytest.approx(changes[1], rel=1e-2) and changes[0] != 0


# What is kept.


def test_cherries_are_the_largest_of_each_row():
    scores = torch.tensor([[1.0, 9.0, 3.0, 4.0], [8.0, 1.0, 2.0, 7.0]])
    assert ch.cherries(scores, 0.5).tolist() == [
        [False, True, False, True],
        [True, False, False, True],
    ]
    assert not ch.cherries(scores, 0).any() and ch.cherries(scores, 1).all()


@pytest.mark.parametrize(
    ("size", "fraction", "multiple", "expected"),
    [
        (4096, 1 / 256, 8, 16),
        (11008, 1 / 256, 8, 40),  # 43 in multiples of 8
        (576, 1 / 256, 8, 1),  # 3 would be rounded down to none
        (256, 1 / 64, 1, 4),
        (688, 1 / 256, 1, 3),
        (688, 0, 1, 0),
    ],
)
def test_how_many_are_kept(size, fraction, multiple, expected):
    assert ch.count(size, fraction, multiple) == expected
    assert (ch.cherries(torch.rand(3, size), fraction, multiple).sum(1) == expected).all()


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_a_fraction_is_a_share(fraction):
    with pytest.raises(ValueError, match="not from 0 to 1"):
        ch.cherries(torch.rand(2, 8), fraction)


def test_heterogeneity_by_hand():
    scores = torch.arange(1.0, 101.0)  # the top 1 % is 100 alone, the rest's largest 99
    assert ch.heterogeneity(scores.view(10, 10)) == pytest.approx(100 / 99)
    assert ch.heterogeneity(scores, over="mean") == pytest.approx(100 / 50)
    assert ch.heterogeneity(scores, top=0.1) == pytest.approx(95.5 / 90)
    assert ch.heterogeneity(scores**2) > ch.heterogeneity(scores)


def test_the_share_that_carries_half():
    assert ch.share_that_carries(torch.ones(100)) == 0.5
    assert ch.share_that_carries(torch.tensor([1.0, 1.0, 1.0, 97.0])) == 0.25
    assert ch.share_that_carries(torch.tensor([5.0, 3.0, 2.0]), 0.7) == pytest.approx(2 / 3)


# Rounding.


def test_levels_by_hand():
    weight = torch.tensor([[2.0, 0.1, -0.1, -1.6]])  # a step of 1 in 2 bits: -1.5, -0.5, 0.5, 1.5
    assert ch.round_rest(weight, none(weight), 2, 4).tolist() == [[1.5, 0.5, -0.5, -1.5]]
    kept = torch.tensor([[True, False, False, False]])
    fitted = ch.round_rest(weight, kept, 2, 4)
    torch.testing.assert_close(fitted, torch.tensor([[2.0, 0.4, -0.4, -1.2]]))
    assert ch.round_rest(weight, kept, 2, 4, frozen=True).tolist() == [[2.0, 0.5, -0.5, -1.5]]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.sampled_from([8, 16, 70, 100]), st.integers(0, 5))
def test_kept_weights_stay_and_others_move_by_half_a_step_at_most(bits, group, k):
    weight = weights()
    kept = ch.cherries(weight.abs(), k / 70)
    rounded = ch.round_rest(weight, kept, bits, group)
    assert torch.equal(rounded[kept], weight[kept])
    half = ch.step(weight, kept, bits, group) / 2
    assert ((rounded - weight).abs()[~kept] <= half[~kept] * 1.001).all()


def test_a_step_ignores_what_is_kept_unless_frozen():
    weight = weights()
    weight[0, 3] = 50.0
    kept = weight > 40
    error = [
        (ch.round_rest(weight, kept, 3, 16, frozen) - weight)[0, :16].square().sum().item()
        for frozen in (False, True)
    ]
    assert error[0] < error[1] / 50
    elsewhere = [ch.round_rest(weight, kept, 3, 16, frozen)[1:] for frozen in (False, True)]
    assert torch.equal(*elsewhere)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nothing_kept_are_the_codes_of_the_shared_quantizer_at_the_same_step(bits):
    weight = weights()
    ours = ch.round_rest(weight, none(weight), bits, 16)
    step = ch.step_of_groups(weight, none(weight), bits, 16)
    zero = torch.full((1, 1), (2**bits - 1) / 2)
    options = {"scheme": "half-step", "group": 16, "scale_dtype": torch.float32}
    options |= {"scale": step, "zero": zero}
    torch.testing.assert_close(ours, quantize(weight, bits, **options).dequantize())


def test_above_four_bits_levels_are_whole_steps_and_zero_is_one():
    weight = weights()
    weight[:, ::2] = 0
    rounded = ch.round_rest(weight, none(weight), 8, 16)
    assert (rounded[:, ::2] == 0).all()
    symmetric = quantize(weight, 8, group=16, scale_dtype=torch.float32).dequantize()
    torch.testing.assert_close(rounded, symmetric)


# Training.


def test_gradients_pass_straight_through_to_kept_and_rounded_weights():
    layer = nn.Linear(70, 6, bias=False)
    kept = drawn()
    mixed = ch.CherryLinear(layer, kept, 3, 16)
    x, upstream = torch.randn(5, 70), torch.randn(5, 6)
    out = mixed(x)
    torch.testing.assert_close(out, x @ ch.round_rest(layer.weight, kept, 3, 16).t())
    out.backward(upstream)
    torch.testing.assert_close(mixed.weight.grad, upstream.t() @ x)


def test_training_lowers_the_loss_of_rounded_weights():
    model, rows = small_model(), torch.randint(50, (8, 13))
    kept = {n: ch.cherries(m.weight.abs(), 1 / 16) for n, m in anatomy.projections(model).items()}
    ch.cherry_(model, kept, 3, 16)
    history = fit(model, [rows], steps=40, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert "bits=3" in repr(model)


def test_only_plain_layers_are_replaced():
    model = small_model()
    name, layer = next(iter(anatomy.projections(model).items()))
    mask = {name: none(layer.weight)}
    ch.cherry_(model, mask, 3, 16)
    assert type(anatomy.projections(model)[name]) is ch.CherryLinear
    with pytest.raises(ValueError, match="CherryLinear, not nn.Linear"):
        ch.cherry_(model, mask, 3, 16)


# Storage.


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("k", [0, 1, 5])
def test_what_is_stored_is_what_is_computed_with(bits, k):
    weight = weights()
    kept = ch.cherries(weight.abs(), k / 70)
    stored = ch.store(weight, kept, bits, 16)
    rounded = ch.round_rest(weight, kept, bits, 16)
    step = ch.step(weight, kept, bits, 16)
    off = (stored.dequantize() - rounded).abs()  # a step in float16 may turn a code over
    assert (off > 0.1 * step).float().mean() < 0.02 and (off <= 1.01 * step).all()
    torch.testing.assert_close(stored.dequantize()[kept], weight[kept], atol=2e-3, rtol=1e-3)


def test_bits_a_weight_of_the_papers_matrix():
    assert study.stored_bits() == 8 * (1530 + 2 * 16 + 2 * 32) / 4096  # the authors' kernel test
    weight = torch.randn(4, 4096)
    stored = ch.store(weight, ch.cherries(weight.abs(), 1 / 256, 8), 3, 128)
    assert stored.packed.shape == (4, 1530)
    assert stored.bits_per_weight() - stored.bits_per_weight(places=False) == 16 / 256
    # 4,080 of 4,096 weights have codes, and the exercise counts the same
    assert stored.bits_per_weight() == exercises.bits.reference(4096, 16, 3, 128)


def test_rows_keep_equally_many():
    weight = weights()
    with pytest.raises(ValueError, match="as many weights"):
        ch.store(weight, weight > 1.5, 3, 16)


def test_published_perplexities():
    found = ch.published()
    assert found["CherryQ"] == min(v for k, v in found.items() if k != "FP16") == 5.92
    assert found["QAT"] == 6.90 and found["FP16"] == 5.47
    assert ch.published("c4", "64")["CherryQ"] == 7.34


# The study.


def test_every_way_to_keep_is_planned_for_each_seed():
    whole = [p for p in study.POINTS if p["kind"] == "loss" and p["steps"] == 0]
    ways = len(study.REASONS) * len(study.FRACTIONS) * 2 + 1  # nothing kept has no fraction
    assert len(whole) == len(study.BITS) * ways * len(study.SEEDS)
    assert len({str(sorted(p.items())) for p in whole}) == len(whole)


def test_reasons_to_keep_a_weight():
    source = ("tiny-1m", 200, 2)
    scores = {by: study.scores_by(by, source, 3) for by in study.REASONS}
    whole = study.weights_of(study.whole("tiny-1m"))
    name = next(iter(whole))
    assert torch.equal(scores["magnitude"][name], whole[name].abs())
    off = study.rounding(whole[name], 3)
    torch.testing.assert_close(scores["error"][name], scores["impact"][name] * off**2)
    for one, other in itertools.combinations(scores.values(), 2):
        assert not torch.equal(ch.cherries(one[name], 1 / 64), ch.cherries(other[name], 1 / 64))
    with pytest.raises(ValueError, match="no reason"):
        study.scores_by("beauty", source, 3)


def test_a_point_without_training_leaves_the_checkpoint_alone():
    before = {n: w.clone() for n, w in study.weights_of(study.whole("tiny-1m")).items()}
    options = {"model": "tiny-1m", "rows": 2, "calibration": 2}
    coarse, fine = (study.run("loss", 200, bits, **options) for bits in (2, 8))
    assert coarse["over"] > 20 * abs(fine["over"]) and coarse["expected"] > 100 * fine["expected"]
    assert coarse["step"] <= 1
    after = study.weights_of(study.whole("tiny-1m"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_seeds_share_no_held_out_text():
    slices = [
        study.slice_of("tiny-4m", seed, 16) for seed in (*study.SEEDS, study.TUNING[0]["seed"])
    ]
    rows = {tuple(row.tolist()) for part in slices for row in part}
    assert len(rows) == 16 * len(slices)


# Exercises.


def squared_mean(gradients):
    return gradients.mean(0).square()


def batches_of_four(gradients):
    whole = len(gradients) // 4 * 4
    if not whole:
        return gradients.mean(0).square()
    return gradients[:whole].unflatten(0, (-1, 4)).mean(1).square().mean(0)


def summed(gradients):
    return gradients.square().sum(0)


def codes_for_all(size, kept, bits, group):
    return (bits * size + 32 * kept + 16 * math.ceil(size / group)) / size


def no_places(size, kept, bits, group):
    return (bits * (size - kept) + 16 * kept + 16 * math.ceil(size / group)) / size


def no_steps(size, kept, bits, group):
    return (bits * (size - kept) + 32 * kept) / size


def kept_alone(x, upstream, kept):
    return (upstream.t() @ x) * kept


def true_slope(x, upstream, kept):
    return torch.zeros_like(upstream.t() @ x)


def turned(x, upstream, kept):
    return x.t() @ upstream


WRONG = {
    "impacts": [squared_mean, batches_of_four, summed],
    "bits": [codes_for_all, no_places, no_steps],
    "weight_gradient": [kept_alone, true_slope, turned],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
