import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lablib.compression import cherry, dress, flexigpt, layerdrop
from lablib.compression import compression_survey as cs
from lablib.compression.calibration import token_losses
from lablib.compression.quantize import QuantizedLinear
from lablib.compression.recover import recover
from lablib.compression.structures import everything, parameters_of, sliced
from lablib.evidence.studies import Study
from lablib.exercises import compression_survey as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.papers import paper
from lablib.studies import compression_survey as study


def small_model(**options):
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 40}
    return GPT(GPTConfig(vocab_size=50, **sizes, init_std=0.2, max_length=16, **options))


@pytest.fixture
def rows():
    torch.manual_seed(3)
    return torch.randint(50, (24, 13))


def weights(model):
    return {name: m.weight.detach().clone() for name, m in anatomy.projections(model).items()}


# The tree.


def test_a_leaf_is_there_or_honestly_empty():
    for leaf in cs.TAXONOMY:
        assert leaf.needs in ("nothing", "text", "training")
        if leaf.where:
            module, name = leaf.where.split(":")
            assert callable(getattr(importlib.import_module(f"lablib.{module}"), name))
    assert {leaf.path[0] for leaf in cs.TAXONOMY} == {
        "quantization", "pruning", "distillation", "compact design", "dynamic networks",
    }  # fmt: skip
    assert len({leaf.name for leaf in cs.TAXONOMY}) == len(cs.TAXONOMY)
    assert set(cs.LARGE) <= {leaf.name for leaf in cs.TAXONOMY if leaf.needs == "training"}


def test_every_row_of_the_study_but_compositions_has_one_leaf():
    leaves = {leaf.name: leaf for leaf in cs.TAXONOMY}
    rows = [row for leaf in study.ROWS.values() for row in leaf]
    assert set(study.ROWS) <= set(leaves) and all(leaves[name].where for name in study.ROWS)
    judged = {(run["recipe"], run["learn"]) for run in study.judged(study.POINTS)}
    assert len(set(rows)) == len(rows) and set(rows) <= judged
    assert all("then" in recipe for recipe, _ in judged - set(rows))
    assert {learn for _, learn in judged} == set(study.LEARNED)


def test_a_table_has_means_of_seeds():
    runs = [
        {"recipe": "a", "learn": "no", "seed": seed, "blocks": 40, "over": over}
        for seed, over in enumerate((1.0, 3.0))
    ]
    assert study.table(runs, weights=80) == {("a", "no"): (4.0, 2.0)}


def test_what_training_repairs_is_a_share_of_what_was_lost():
    means = {("a", "no"): (4, 2.0), ("a", "tune"): (4, 0.5), ("b", "no"): (4, 0.1)}
    means |= {("b", "tune"): (4, -0.1), ("c", "no"): (4, 0.05), ("c", "tune"): (4, 0.05)}
    assert study.repaired(means, 0.1) == {"a": 0.75, "b": 2.0}
    assert set(study.repaired(means, 0.0)) == {"a", "b", "c"}


def test_gaps_are_those_to_4_bits_with_as_much_training():
    over = {("sparse, quarter", "no"): 2.0, ("sparse, quarter", "tune"): 1.0, ("4 bits", "no"): 0.5}
    over |= {("4 bits", "tune"): 0.25, ("narrow, quarter", "tune"): 4.0}
    runs = [
        {"recipe": recipe, "learn": learn, "seed": seed, "over": value + seed}
        for (recipe, learn), value in over.items()
        for seed in range(2)
    ]
    assert study.behind(runs, "no") == {0: 1.5, 1: 1.5}
    assert study.behind(runs, "tune") == {0: 0.75, 1: 0.75}
    assert study.behind(runs, "tune", "narrow, quarter") == {0: 3.75, 1: 3.75}


def test_every_rate_is_the_best_that_was_tried_and_no_end_of_them():
    tried = {}
    for run in Study(paper("compression-survey")).runs("TUNING"):
        tried.setdefault((run["recipe"], run["learn"]), {})[run["rate"]] = run["over"]
    for (recipe, learn), rate in study.TUNED.items():
        if learn == "imitate":
            assert rate == study.TUNED[recipe, "tune"]
            continue
        losses = tried[recipe, learn]
        assert rate == min(losses, key=losses.get), (recipe, learn)
        assert min(losses) < rate < max(losses), (recipe, learn)


# Constraints.


def test_a_rounded_model_computes_with_its_codes(rows):
    model = cs.compress(small_model(), [("round", {"bits": 4, "group": 16})], rows)
    from lablib.compression.quantize import quantize

    for name, weight in weights(small_model()).items():
        expected = quantize(weight, 4, group=16).dequantize()
        torch.testing.assert_close(anatomy.projections(model)[name].weight.detach(), expected)


def test_composing_is_pruning_the_codes_where_no_scale_changes(rows):
    """The largest of each group stays, so fitting scales to what stays changes nothing."""
    model = small_model()
    one = cs.sparse(cs.compress(model, [], rows), rows, 0.9, by="magnitude")
    one = cs.rounded(one, rows, bits=8, group=8)
    two = cs.compress(model, [("round", {"bits": 8, "group": 8})], rows)
    for name, layer in anatomy.projections(one).items():
        mask = cs.constrained(layer).mask
        other = anatomy.projections(two)[name]
        torch.testing.assert_close(layer.weight.detach(), other.weight.detach() * mask)


def test_what_is_pruned_stays_zero_in_training(rows):
    plan = [("sparse", {"keep": 0.5}), ("tune", {"steps": 3, "rate": 1e-2})]
    model = cs.compress(small_model(), plan, rows)
    before = weights(small_model())
    for name, layer in anatomy.projections(model).items():
        mask = cs.constrained(layer).mask
        assert (layer.weight[~mask] == 0).all()
        assert not torch.equal(layer.weight[mask], before[name][mask])
        assert (mask.sum(1) == round(0.5 * mask.shape[1])).all()


def test_a_rounded_model_trains_on_its_levels(rows):
    one = rows[:1].repeat(24, 1)
    plan = [("round", {"bits": 3, "group": 8})]
    raw = cs.compress(small_model(), plan, one)
    model = cs.compress(small_model(), [*plan, ("tune", {"steps": 20, "rate": 1e-2})], one)
    assert token_losses(model, one).mean() < token_losses(raw, one).mean() / 2
    for layer in anatomy.projections(model).values():
        levels = layer.weight.detach().unflatten(1, (-1, 8))
        assert all(len(group.unique()) <= 7 for group in levels.flatten(0, 1))


def test_two_of_four_keeps_the_best_two(rows):
    model = cs.two_of_four(small_model(), rows, by="magnitude")
    for name, weight in weights(small_model()).items():
        mask = cs.constrained(anatomy.projections(model)[name]).mask.unflatten(1, (-1, 4))
        four = weight.abs().unflatten(1, (-1, 4))
        assert (mask.sum(2) == 2).all()
        kept, gone = four[mask].view(-1, 2).min(1).values, four[~mask].view(-1, 2).max(1).values
        assert (kept >= gone).all()


def test_scales_follow_what_stays_only_if_it_was_pruned_first(rows):
    weight = torch.tensor([[8.0, 1.0, 0.5, 0.25]])
    mask = torch.tensor([[False, True, True, True]])
    first = cs.Constraint(mask, bits=3, group=4)(weight)
    after = cs.Constraint(mask, bits=3, group=4, fitted=False)(weight)
    assert first.tolist()[0] == pytest.approx([0, 1, 2 / 3, 1 / 3], abs=1e-3)
    assert after.tolist() == [[0, 0, 0, 0]]


def test_cherries_stay_and_the_rest_is_on_levels(rows):
    model = cs.with_cherries(small_model(), rows, bits=3, keep=1 / 8, group=8)
    for name, weight in weights(small_model()).items():
        layer = anatomy.projections(model)[name]
        kept = cs.constrained(layer).kept
        assert (kept.sum(1) == -(-weight.shape[1] // 8)).all()
        torch.testing.assert_close(layer.weight[kept].detach(), weight[kept])
        again = cherry.store(weight, kept, 3, 8).dequantize()
        # A file's steps have 16 bits, so what lies between two levels may go to the other one.
        assert torch.isclose(layer.weight, again, atol=2e-3).float().mean() > 0.995


def test_cherries_are_those_with_the_most_impact(rows):
    model = small_model()
    score = cherry.impact(model, rows)
    layers = anatomy.projections(cs.with_cherries(model, rows, bits=3, keep=1 / 8, group=8))
    for name, layer in layers.items():
        kept = cs.constrained(layer).kept
        assert score[name][kept].mean() > score[name][~kept].mean()


def test_cherries_learn_and_so_does_the_rest(rows):
    plan = [("cherries", {"bits": 3, "group": 8}), ("tune", {"steps": 3, "rate": 1e-2})]
    model = cs.compress(small_model(), plan, rows)
    for name, weight in weights(small_model()).items():
        layer = anatomy.projections(model)[name]
        moved = layer.parametrizations.weight.original != weight
        assert moved.all(1).any() and moved[cs.constrained(layer).kept].any()


def test_two_of_four_moved_moves_the_others(rows):
    model = cs.compress(small_model(), [("2:4, moved", {})], rows)
    for name, weight in weights(small_model()).items():
        layer = anatomy.projections(model)[name]
        mask = cs.constrained(layer).mask
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        assert (layer.weight[~mask] == 0).all()
        assert not torch.allclose(layer.weight[mask], weight[mask])


# Structures.


@pytest.mark.parametrize("blocks", [None, 1, 2])
@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_a_narrow_model_has_the_share_it_should(keep, blocks, rows):
    if blocks == 1 and keep == 0.5:
        keep = 0.25
    model = small_model()
    small = cs.compress(model, [("narrow", {"keep": keep, "blocks": blocks})], rows)
    assert len(small.blocks) == (blocks or 3)
    whole = parameters_of(model, everything(model)) - model.embedding.weight.numel()
    assert (small.n_parameters(False)) / whole == pytest.approx(keep, abs=0.03)


def test_what_is_shed_was_missed_in_training(rows):
    plan = {"blocks": 1, "steps": 4, "rate": 1e-2, "batch": 2}
    small = cs.compress(small_model(), [("shed", plan)], rows)
    assert type(small.blocks) is nn.ModuleList and len(small.blocks) == 1
    by_hand = layerdrop.layerdrop_(small_model(), 1 - 1 / 3)
    recover(by_hand, rows, 4, 1e-2, batch=2, seed=None)
    torch.testing.assert_close(weights(small), weights(layerdrop.pruned(by_hand, [0])))


def test_shared_blocks_store_as_much_as_they_may(rows):
    model = small_model()
    small = cs.compress(model, [("shared", {"blocks": 2, "keep": 0.8})], rows)
    assert len(small.blocks) == 3 and len(flexigpt.shared_places(small)) == 1
    bits = cs.bits_a_weight(small, model)
    rank = next(m.b.shape[0] for m in small.modules() if isinstance(m, flexigpt.SharedLinear))
    more = {"blocks": 2, "keep": 0.8 + 0.06}
    wider = cs.bits_a_weight(cs.compress(model, [("shared", more)], rows), model)
    assert rank > 1 and 16 * 0.8 - 0.9 < bits < 16 * 0.8 + 0.5 < wider  # gains are besides


def test_of_shared_blocks_only_their_own_trains(rows):
    plan = [("shared", {"blocks": 2, "keep": 0.8})]
    raw = cs.compress(small_model(), plan, rows)
    small = cs.compress(small_model(), [*plan, ("tune", {"steps": 2, "rate": 1e-2})], rows)
    learns = set(flexigpt.learning(small))
    moved = {
        name
        for (name, p), q in zip(small.named_parameters(), raw.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved and moved <= learns


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_a_searched_model_is_small_enough_and_the_best_looked_at(keep, rows):
    model = small_model()
    plan = {"keep": keep, "steps": 2, "rate": 1e-3, "batch": 2, "tries": 40}
    small = cs.compress(model, [("search", plan)], rows)
    whole = parameters_of(model, everything(model)) - model.embedding.weight.numel()
    share = small.n_parameters(False) / whole
    assert share <= keep + 0.02
    few = cs.compress(model, [("search", plan | {"tries": 13})], rows)
    losses = [token_losses(one, rows[:24]).mean() for one in (small, few)]
    assert losses[0] <= losses[1]


def test_a_search_says_that_nothing_is_small_enough(rows):
    plan = {"keep": 0.05, "steps": 1, "rate": 1e-3}
    with pytest.raises(ValueError, match=r"more than 0.05 of the parameters"):
        cs.compress(small_model(), [("search", plan)], rows)


# Distillation.


def test_what_is_emptied_first_is_cut_where_a_narrow_model_is(rows):
    model = small_model()
    stays = cs.narrower(model, rows[:8], 0.5)
    plan = {"keep": 0.5, "steps": 4, "rate": 1e-2, "batch": 2}
    small = cs.compress(model, [("empty", plan | {"calibration": 8})], rows)
    narrow = cs.compress(model, [("narrow", {"keep": 0.5})], rows, calibration=8)
    assert parameters_of(small, everything(small)) == parameters_of(narrow, everything(narrow))
    # Cut before the first step, it is the narrow model and its training.
    options = plan | {"calibration": 8, "phase": 0.0}
    cut_first = cs.compress(model, [("empty", options)], rows)
    for name, weight in weights(cut_first).items():
        assert weight.shape == weights(narrow)[name].shape
    emptied = copy.deepcopy(model)
    dress.empty(emptied, rows, stays, 4, 1e-2, 0, 1e-2, batch=2, seed=None)
    torch.testing.assert_close(weights(sliced(emptied, stays)), weights(cut_first))
    torch.testing.assert_close(
        token_losses(cut_first, rows), token_losses(emptied, rows), atol=1e-4, rtol=1e-4
    )


def test_white_box_distillation_learns_the_teachers_distribution(rows):
    teacher = small_model()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    plan = [("narrow", {"keep": 0.5})]
    one = rows[:4].repeat(6, 1)
    raw = cs.compress(teacher, plan, one)
    how = {"steps": 40, "rate": 1e-2, "share": 1.0}
    pupil = cs.compress(teacher, [*plan, ("teach", how)], one)

    def apart(model):
        student, target = (m(one[:, :-1]).flatten(0, 1) for m in (model, teacher))
        parts = [F.log_softmax(logits, -1) for logits in (student, target)]
        return F.kl_div(*parts, log_target=True, reduction="batchmean").item()

    assert apart(pupil) < apart(raw) / 2


def test_black_box_distillation_reads_what_the_teacher_wrote(rows):
    teacher = small_model().eval()
    written = cs.writings(teacher, rows, seed=0, prompt=4)
    assert written.shape == rows.shape
    assert torch.equal(written[:, :4], rows[:, :4])
    assert not torch.equal(written[:, 4:], rows[:, 4:])
    assert torch.equal(written, cs.writings(teacher, rows, seed=0, prompt=4))
    likely = token_losses(teacher, written)[:, 3:].mean()
    assert likely < token_losses(teacher, rows)[:, 3:].mean()


def test_an_unknown_step_is_said(rows):
    with pytest.raises(ValueError, match="'freeze' is none of round"):
        cs.compress(small_model(), [("freeze", {})], rows)


def test_a_recipe_beyond_its_budget_is_refused(rows):
    plan = [("round", {"bits": 4, "group": 8})]
    small = cs.compress(small_model(), plan, rows, budget=6.0)  # 4 bits, and 16 for each 8
    assert cs.bits_a_weight(small, small_model()) == 6.0
    with pytest.raises(ValueError, match=r"stores 6.00 bits a weight, more than 5.9"):
        cs.compress(small_model(), plan, rows, budget=5.9)


def test_the_model_itself_is_left_alone(rows):
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = [
        ("narrow", {"keep": 0.5}),
        ("teach", {"steps": 2, "rate": 1e-2}),
        ("round", {"bits": 4}),
    ]
    cs.compress(model, plan, rows)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# Bytes.

PLANS = {
    "whole": [],
    "8 bits": [("round", {"bits": 8})],
    "3 bits": [("round", {"bits": 3, "group": 16})],
    "2 bits, minimum": [("round", {"bits": 2, "scheme": "asymmetric"})],
    "sparse": [("sparse", {"keep": 0.3})],
    "2:4": [("2:4", {})],
    "2:4, moved": [("2:4, moved", {})],
    "cherries": [("cherries", {"bits": 3})],
    "narrow": [("narrow", {"keep": 0.5})],
    "shared": [("shared", {"blocks": 1, "keep": 0.6})],
    "narrow, 4 bits": [("narrow", {"keep": 0.5}), ("round", {"bits": 4})],
    "sparse, 4 bits": [("sparse", {"keep": 0.5}), ("round", {"bits": 4})],
}


@pytest.mark.parametrize("plan", PLANS)
def test_bytes_are_those_of_the_file(plan, rows, tmp_path):
    # Long enough that the file's header, a few kilobytes, is under one per cent.
    torch.manual_seed(0)
    sizes = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    model = GPT(GPTConfig(vocab_size=3000, **sizes, init_std=0.1))
    small = cs.compress(model, PLANS[plan], rows)
    size = cs.save(small, tmp_path / "model.safetensors")
    assert cs.stored_bytes(small) == pytest.approx(size, rel=0.01)
    assert cs.stored_bytes(small) > cs.stored_bytes(small, blocks_alone=True)


def test_bytes_by_hand(rows):
    layer = torch.nn.Linear(128, 2, bias=False)

    def parts(constraint):
        cs.constrain_(layer, constraint)
        return {name: part.nbytes for name, part in cs._parts(layer).items()}

    half = torch.arange(128).repeat(2, 1) % 2 == 0
    assert parts(cs.Constraint(bits=4)) == {"codes": 128, "scale": 8}
    assert parts(cs.Constraint(half)) == {"places": 32, "values": 256}
    assert parts(cs.Constraint(half, pattern="2:4")) == {"places": 32, "values": 256}
    assert parts(cs.Constraint(half, bits=4)) == {"places": 32, "codes": 64, "scale": 8}


def test_a_stored_model_can_be_read_back(rows):
    """What is stored is enough: places and values give the weight again."""
    model = cs.sparse(small_model(), rows, 0.3)
    layer = next(iter(anatomy.projections(model).values()))
    parts = cs._parts(layer)
    bits = (parts["places"][:, None] >> torch.arange(8)) & 1
    mask = bits.flatten()[: layer.weight.numel()].view_as(layer.weight).bool()
    again = torch.zeros_like(layer.weight)
    again[mask] = parts["values"].float()
    torch.testing.assert_close(again, layer.weight.detach(), atol=1e-3, rtol=1e-3)


# Side by side.


def test_a_deployed_model_computes_the_same(rows):
    cherries = [("cherries", {"bits": 3})]
    both = [("sparse", {"keep": 0.5}), ("round", {"bits": 4})]
    shared = [("shared", {"blocks": 2, "keep": 0.8})]
    for plan in ([("round", {"bits": 4})], both, cherries, shared):
        model = cs.compress(small_model(), plan, rows)
        ready = cs.deployed(model)
        expected = model(rows[:, :-1])
        torch.testing.assert_close(ready(rows[:, :-1]), expected, atol=1e-4, rtol=1e-4)
        quantized = any(isinstance(m, QuantizedLinear) for m in ready.modules())
        assert quantized == (plan == [("round", {"bits": 4})])


def test_the_frontier_has_a_row_for_each_recipe(rows):
    recipes = {"whole": [], "2 bits": [("round", {"bits": 2})]}
    recipes["tuned"] = [("narrow", {"keep": 0.5}), ("tune", {"steps": 2, "rate": 1e-3})]
    table = cs.frontier(small_model(), recipes, rows, rows)
    assert [row["name"] for row in table] == list(recipes)
    assert table[0]["over"] == 0 and table[2]["steps"] == 2 and table[0]["steps"] == 0
    assert table[1]["bytes"] < table[0]["bytes"] and all(row["ms"] > 0 for row in table)


# The exercises.


def no_scales(shape, keep, bits, group):
    out, size = shape
    return out * round(keep * size) * bits / 8 + out * size / 8


def no_places(shape, keep, bits, group):
    out, size = shape
    return (out * round(keep * size) * bits + 16 * out * -(-size // group)) / 8


def no_temperature(student, teacher, temperature):
    a, b = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return (b.exp() * (b - a)).sum(-1).mean()


def other_way(student, teacher, temperature):
    return exercises._distillation(teacher, student, temperature)


def luckiest(loss_of, temperatures, seeds):
    runs = {t: [loss_of(t, seed) for seed in seeds] for t in temperatures}
    means = {t: sum(own) / len(own) for t, own in runs.items()}
    return min(runs, key=lambda t: min(runs[t])), means


def of_one_seed(loss_of, temperatures, seeds):
    means = {t: loss_of(t, seeds[0]) for t in temperatures}
    return min(means, key=means.get), means


def largest(loss_of, temperatures, seeds):
    means = exercises._sweep(loss_of, temperatures, seeds)[1]
    return max(means, key=means.get), means


def of_all_tokens(x, bits):
    step = x.abs().max() / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def codes_alone(x, bits):
    return (x / x.abs().amax(-1, keepdim=True) * (2 ** (bits - 1) - 1)).round()


WRONG = {
    "sweep": [luckiest, of_one_seed, largest],
    "round_inputs": [of_all_tokens, codes_alone],
    "recipe_bytes": [no_scales, no_places],
    "distillation": [no_temperature, other_way],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
