import json
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.nn import functional as F

from lablib.exercises import mu_scaling as exercises
from lablib.lab.grading import outcome
from lablib.models import GPT, GPTConfig, anatomy, pretrained
from lablib.paths import PACKAGE
from lablib.scaling import mu_scaling as ms
from lablib.studies import mu_scaling as study
from lablib.training import fit

PEER = PACKAGE / "scaling" / "mu_scaling.json"
BASE = 16


def small(dim=32, **options):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "dim": dim, "n_layers": 2, "n_heads": dim // 8, "ffn_dim": 3 * dim}
    return GPT(GPTConfig(**sizes | {"init_std": dim**-0.5, "max_length": 32} | options))


def tokens(rows=4, length=13):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(3))


def ours(make, dim, rate=1e-2):
    model = ms.mup_(make(dim), BASE)
    options = {"lr": rate, "eps": 1e-12, "weight_decay": 0.0}
    return model, torch.optim.AdamW(model.parameters(), **options)


def theirs(make, dim, rate=1e-2):
    """The same model and optimizer by package mup."""
    mup = pytest.importorskip("mup")

    def build(width):
        model = make(width)
        if model.config.tied:
            model.head = mup.MuSharedReadout(model.embedding.weight, bias=False)
            return model
        readout = mup.MuReadout(width, model.config.vocab_size, bias=False)
        readout.weight = model.head.weight
        model.head = readout
        # the package leaves to its user that an embedding begins as the base's
        model.embedding.weight.data *= math.sqrt(width / BASE)
        return model

    model = build(dim)
    mup.set_base_shapes(model, build(BASE), delta=build(2 * BASE))
    options = {"lr": rate, "eps": 1e-12, "weight_decay": 0.0}
    return model, mup.MuAdamW(model.parameters(), **options)


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_five_steps_equal_package_mups(times, tied):
    def make(dim):
        return small(dim, tied=tied).double()

    rows = [study.after_five_steps(*way(make, BASE * times)) for way in (ours, theirs)]
    np.testing.assert_allclose(*rows, atol=1e-6)
    assert np.ptp(rows[0]) > 1


def test_the_standard_parametrization_differs_from_package_mups_wherever_the_width_does():
    def standard(dim):
        model = small(dim).double()
        return model, torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-12, weight_decay=0.0)

    for dim, same in ((BASE, True), (2 * BASE, False)):
        plain = study.after_five_steps(*standard(dim))
        peer = study.after_five_steps(*theirs(lambda width: small(width).double(), dim))
        assert np.allclose(plain, peer, atol=1e-3) == same


@pytest.mark.parametrize("times", [2, 4])
def test_the_recorded_values_are_package_mups(times):
    recorded = json.loads(PEER.read_text("utf-8"))[f"{times} times as wide"]
    again = study.after_five_steps(*theirs(study.fixed_model, BASE * times))
    np.testing.assert_allclose(again, recorded, atol=1e-6)


@pytest.mark.parametrize("times", [2, 4])
def test_five_steps_equal_the_recorded_values(times):
    recorded = json.loads(PEER.read_text("utf-8"))[f"{times} times as wide"]
    now = study.after_five_steps(*ours(study.fixed_model, BASE * times))
    np.testing.assert_allclose(now, recorded, atol=1e-5)


def test_hidden_layers_begin_as_drawn_and_the_readout_smaller():
    plain, wide = small(64), ms.mup_(small(64), BASE)
    x = torch.randn(5, 64)
    for name, layer in anatomy.projections(plain).items():
        if layer.in_features == 64:
            torch.testing.assert_close(wide.get_submodule(name)(x), layer(x))
    torch.testing.assert_close(wide.head(x), plain.head(x) / 2)  # sqrt(4) / 4
    assert wide.embedding.weight.std().item() == pytest.approx(BASE**-0.5, rel=0.05)


def test_at_the_base_width_nothing_changes():
    plain, same = small(BASE), ms.mup_(small(BASE), BASE)
    assert torch.equal(plain(tokens()), same(tokens()))


def test_a_step_of_adam_moves_hidden_weights_by_a_share_of_the_rate():
    model = ms.mup_(small(64), BASE)
    layer = model.blocks[0].mlp.up
    before = layer.times * layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-15, weight_decay=0.0)
    F.cross_entropy(model(tokens()).flatten(0, 1), tokens().flatten()).backward()
    optimizer.step()
    step = (layer.times * layer.weight.detach() - before).abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-2 / 4), rtol=1e-3, atol=0)


def test_scores_are_divided_by_the_width_of_wider_heads():
    make = {"dim": 64, "n_heads": 2, "tied": False}  # heads of 32, of 8 in the base
    plain, wide = small(**make), ms.mup_(small(**make), BASE, base_head_dim=8)
    x = torch.randn(3, 64)
    name = "blocks.1.attention.query"
    queries = plain.get_submodule(name)(x) / 2  # sqrt(8 / 32)
    torch.testing.assert_close(wide.get_submodule(name)(x), queries)
    key = "blocks.1.attention.key"
    torch.testing.assert_close(wide.get_submodule(key)(x), plain.get_submodule(key)(x))
    scores = 32**-0.5 * queries
    torch.testing.assert_close(scores, plain.get_submodule(name)(x) * 8**0.5 / 32)


def test_trained_weights_are_refused_with_one_sentence():
    model = small()
    fit(model, [tokens()], steps=2, lr=1e-2, progress=False)
    with pytest.raises(ValueError, match="has been trained"):
        ms.mup_(model, BASE)
    with pytest.raises(ValueError, match="has been trained"):
        ms.mup_(pretrained("tiny-1m")[0], BASE)


def test_transformers_llamas_are_reparametrized_too():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    states = model.model(tokens()).last_hidden_state
    ms.mup_(model, 16, base_head_dim=16)
    assert isinstance(model.lm_head, ms.Multiplied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = model.model(tokens()).last_hidden_state @ model.lm_head.weight.T / 2
    torch.testing.assert_close(model(tokens()).logits, wanted)
    assert not torch.allclose(states, model.model(tokens()).last_hidden_state)
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
    )
    with pytest.raises(TypeError, match="nn.Linear alone"):
        ms.mup_(gpt2, 16)


def test_the_coordinate_check_sees_what_training_moved():
    def train(model):
        with torch.no_grad():
            model.head.weight.add_(0.5 * model.config.dim / 16)

    checked = ms.coordinate_check(lambda dim: small(dim, tied=False), train, [16, 32], tokens())
    for dim, row in checked.items():
        hidden = small(dim, tied=False).hidden_states(tokens())
        wanted = (hidden.sum(-1) * 0.5 * dim / 16).square().mean().sqrt().item()
        assert row["logits"] == pytest.approx(wanted, rel=1e-4)
        assert row["embedding"] == row["block 1"] == row["block 2"] == 0


def test_growth_is_the_slope_of_logarithms():
    checked = {w: {"logits": 0.3 * w**0.7, "block 1": 0.2} for w in (16, 48, 128)}
    assert ms.growth(checked, "logits") == pytest.approx(0.7)
    assert ms.growth(checked, "block 1") == pytest.approx(0.0, abs=1e-12)


def test_mup_moves_activations_less_than_the_standard_one_as_width_grows():
    grown = {}
    for kind in study.BOTH:
        checked = ms.coordinate_check(
            lambda dim, kind=kind: study.build(0, kind, dim),
            lambda model: fit(
                model, [tokens(8, 33)], steps=4, progress=False, clip=None,
                optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.01),
            ),
            [32, 64, 128],
            tokens(),
        )  # fmt: skip
        grown[kind] = ms.growth(checked, "block 2")
    assert grown["mup"] < 0.3 < grown["standard"]


def test_fits_are_scipys_least_squares():
    n = np.array([3e4, 1e5, 3e5, 8e5, 2e6])
    loss = 40 * n**-0.4 + 1.9 + np.array([0.004, -0.006, 0.003, 0.002, -0.003])
    mine = ms.fit_power(n, loss)
    (a, b, c), _ = scipy.optimize.curve_fit(
        lambda x, a, b, c: a * x**b + c, n / 1e6, loss, p0=[0.1, -0.5, 2], maxfev=10000
    )
    assert mine(2e7) == pytest.approx(a * 20**b + c, abs=5e-4)
    assert (mine.b, mine.c) == pytest.approx((b, c), rel=5e-3)


def test_a_law_finds_its_own_numbers_rising_ones_too():
    n = np.array([1e4, 4e4, 2e5, 1e6])
    for law in (ms.PowerPlus(20.0, -0.3, 1.5), ms.PowerPlus(-30.0, -0.5, 2.5)):
        small_ones = dict(zip(n, law(n)))
        assert ms.predict_loss(small_ones, 8e6) == pytest.approx(law(8e6), abs=1e-3)
    with pytest.raises(ValueError, match="three sizes"):
        ms.fit_power(n[:2], n[:2])


def run(kind, dim, lr, loss, **more):
    point = {"seed": 0, "parametrization": kind, "dim": dim, "lr": lr, "N": dim**2}
    return point | {"loss": loss} | more


def test_the_best_rate_is_a_vertex_and_never_beyond_the_rates_tried():
    valley = [run("mup", 64, lr, 2 + math.log2(lr / 0.01) ** 2) for lr in (0.004, 0.008, 0.016)]
    assert study.best_rate(valley, 64) == pytest.approx(0.01)
    falling = [run("mup", 64, lr, 2 - lr) for lr in (0.004, 0.008, 0.016)]
    assert study.best_rate(falling, 64) == 0.016
    few = run("mup", 64, 0.002, 0.0, steps=4)
    assert study.best_rate([*valley, few], 64) == pytest.approx(0.01)


def test_drift_is_the_exponent_of_the_best_rate_without_its_sign():
    runs = [
        run("standard", dim, lr, math.log2(lr * dim / 0.256) ** 2)
        for dim in study.SEARCHED
        for lr in study.TRIED["standard"][dim]
    ]
    assert study.drift(runs) == pytest.approx(1.0)


def made_up(seeds, points):
    """Runs whose best rate falls with the width in the standard parametrization, hardly in muP."""
    return [
        point | {"N": 1, "loss": math.log2(point["lr"] * (point["dim"] / 32) ** slope / 0.008) ** 2}
        for seed in seeds
        for point in points(seed)
        for slope in [1.0 if point["parametrization"] == "standard" else 0.1]
    ]


def test_drift_is_judged_on_five_widths_of_seeds_of_its_own():
    last = made_up(study.LAST, study.planned)
    before = made_up(study.LATER, lambda seed: study.valleys(seed, study.FIVE))
    judged = study.drifts([*last, *before], study.LAST, study.PLANNED)
    for seeds, pairs in ((study.LAST, judged), (study.LATER, study.judged_third(before))):
        assert [pair.seed for pair in pairs] == list(seeds)
        for pair in pairs:
            assert (pair.method, pair.baseline) == pytest.approx((0.1, 1.0), abs=0.03)
    assert (*study.WIDTHS, study.WIDEST) == study.PLANNED
    assert study.LADDER[-1] == study.WIDEST and len(study.LADDER) == 5
    assert study.judged_first(before) == study.judged_second(before) == []


def test_the_planned_runs_have_three_rates_and_the_standard_ones_the_bases_too():
    points = study.planned(15)
    for kind in study.BOTH:
        for dim in study.PLANNED:
            either = kind if dim != study.BASE else "standard"
            lr = [p["lr"] for p in points if (p["parametrization"], p["dim"]) == (either, dim)]
            np.testing.assert_allclose(np.diff(np.log2(study.PLAN[kind][dim])), 1.0, atol=0.1)
            assert set(lr) == {*study.PLAN[kind][dim], study.RATE}
    assert {p["steps"] for p in points} == {study.LONG}
    assert study.LONG * study.BATCH == 2**18
    assert len({tuple(sorted(p.items())) for p in points}) == len(points) == 30


def test_losses_are_those_of_whole_trainings_of_either_length():
    whole = run("mup", 64, 0.008, 2.0, steps=study.LONG)
    four = run("mup", 64, 0.008, 3.0, steps=study.FEW)
    assert study.losses([whole, four], 64) == {0.008: 2.0}


def test_a_law_is_told_the_narrower_models_at_the_bases_rate_alone():
    runs = [run("mup", dim, study.RATE, 2 + 5 * dim**-0.8) for dim in study.WIDTHS]
    widest = run("mup", study.WIDEST, study.RATE, 2.2)
    elsewhere = run("mup", 64, 0.016, 9.0)
    wanted = 100 * abs((2 + 5 * study.WIDEST**-0.8) / 2.2 - 1)
    assert study.error([*runs, widest, elsewhere]) == pytest.approx(wanted, abs=0.01)


def test_a_searched_law_is_told_each_width_at_the_best_of_its_rates():
    runs = [run("standard", dim, 0.002, 2 + 5 * dim**-0.8) for dim in study.PLANNED]
    runs += [run("standard", dim, study.RATE, 3.0) for dim in study.PLANNED]
    assert study.error_searched(runs) == pytest.approx(0.0, abs=0.01)


def test_method_and_baseline_are_given_as_many_rates_and_the_same_ones_at_the_base():
    for dim in study.SEARCHED:
        assert len(study.TRIED["mup"][dim]) == len(study.TRIED["standard"][dim])
        assert all(study.RATE in study.TRIED[kind][dim] for kind in study.BOTH)
    assert study.TRIED["mup"][study.BASE] == study.TRIED["standard"][study.BASE]


@pytest.mark.parametrize(
    ("seeds", "rates", "count"),
    [(study.FRESH, study.WIDER, 25), (study.LATER, study.FIVE, 45)],
    ids=["three widths", "five widths"],
)
def test_seeds_of_the_drift_have_five_rates_about_a_factor_2_apart(seeds, rates, count):
    for kind, of in rates.items():
        for dim, lr in of.items():
            assert len(lr) == 5
            np.testing.assert_allclose(np.diff(np.log2(lr)), 1.0, atol=0.1)
            if dim in study.SEARCHED:
                assert lr[1:-1] == study.TRIED[kind][dim]
    points = [p for p in study.POINTS if p["seed"] in seeds]
    assert len(points) == count * len(seeds)


def test_each_design_of_the_drift_has_seeds_of_its_own():
    seeds = [*study.SEEDS, *study.FRESH, *study.LATER, *study.LAST]
    assert len(set(seeds)) == len(seeds)


def test_searched_is_compared_with_untuned_at_any_width():
    runs = [run("mup", 256, lr, loss) for lr, loss in ((0.004, 2.5), (study.RATE, 2.6))]
    assert (study.untuned(runs, 256), study.tuned(runs, 256)) == (2.6, 2.5)


def as_drawn(ins, outs, base_ins, base_outs):
    return 1.0, base_ins / ins


def roots(ins, outs, base_ins, base_outs):
    m = max(ins / base_ins, outs / base_outs)
    return m**0.5, m**-0.5


def all_hidden(ins, outs, base_ins, base_outs):
    m = max(ins / base_ins, outs / base_outs)
    return m, 1 / m


def of_sizes(widths, before, after):
    return float(np.polyfit(np.log(widths), np.log([np.sqrt(np.mean(a**2)) for a in after]), 1)[0])


def of_norms(widths, before, after):
    moves = [np.linalg.norm(b - a) for a, b in zip(before, after)]
    return float(np.polyfit(np.log(widths), np.log(moves), 1)[0])


def of_means(widths, before, after):
    moves = [abs(np.mean(b - a)) for a, b in zip(before, after)]
    return float(np.polyfit(np.log(widths), np.log(moves), 1)[0])


def no_floor(n, loss, b, large):
    return float((n**b @ loss) / (n**b @ n**b) * large**b)


def straight(n, loss, b, large):
    return float(np.exp(np.polyval(np.polyfit(np.log(n), np.log(loss), 1), np.log(large))))


def in_n(n, loss, b, large):
    return float(np.polyval(np.polyfit(n, loss, 1), large))


def widths_alone(blocks, base_blocks):
    return base_blocks / blocks, 1.0


def no_rate(blocks, base_blocks):
    return math.sqrt(base_blocks / blocks), 1.0


def twice_smaller(blocks, base_blocks):
    return math.sqrt(base_blocks / blocks), base_blocks / blocks


WRONG = {
    "stored": [as_drawn, roots, all_hidden],
    "exponent": [of_sizes, of_norms, of_means],
    "foretell": [no_floor, straight, in_n],
    "deeper": [widths_alone, no_rate, twice_smaller],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_check_of_depth_says_what_is_wrong():
    said = {widths_alone: "begins too small", no_rate: "start is right", twice_smaller: "already"}
    for answer, text in said.items():
        assert text in outcome(exercises.deeper, answer)[1]


def test_a_deeper_models_sums_begin_and_move_as_the_bases_by_what_the_exercise_says():
    """Residual streams of random blocks, and of blocks that one step has moved the same way."""
    random = np.random.default_rng(0)
    sizes = {}
    for blocks in (2, 8, 32):
        times, rate = exercises.deeper.reference(blocks, 2)
        start = times * random.normal(size=(blocks, 20_000)).sum(0)
        sizes[blocks] = start.std(), blocks * times * rate
    for start, move in sizes.values():
        assert (start, move) == (pytest.approx(sizes[2][0], rel=0.03), pytest.approx(2.0))
