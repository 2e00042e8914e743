import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, loads_again, merges, moved, same_under_a_cache
from torch.utils.flop_counter import FlopCounterMode

from lablib.evidence.claims import NOT_REPRODUCED, REPRODUCED, judge
from lablib.evidence.studies import Study, replaced
from lablib.exercises import lorma as exercises
from lablib.models import anatomy
from lablib.papers import paper
from lablib.peft import lorma as lm
from lablib.peft.adapter import (
    adapters,
    disabled,
    fold_,
    freeze_base_,
    matrix,
    merge_,
    n_trainable,
    remove_,
    trainable,
    unmerge_,
)
from lablib.peft.lora import LoRALinear
from lablib.studies import lorma as study

WAYS = [(inflation, mode) for inflation in ("rotate", "add") for mode in lm.MODES]


def drawn(n=12, rank=3):
    torch.manual_seed(5)
    return torch.randn(n, rank), torch.randn(rank, n)


# The definition.


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_rotated_rows_are_rolled(n):
    m = torch.randn(n, n)
    assert torch.equal(lm.rotate(m), torch.stack([row.roll(i) for i, row in enumerate(m)]))


def test_the_rank_of_one_row_is_rotated_to_full():
    m = torch.ones(5, 1) @ torch.tensor([[1.0, 2, 3, 4, 5]])
    assert lm.numerical_rank(m) == 1 and lm.numerical_rank(lm.rotate(m)) == 5


@pytest.mark.parametrize("n", [2, 7, 64, 128])
def test_one_rank_starts_full_if_it_is_rotated_alone(n):
    assert [lm.rank_at_start(n, 1, way) for way in ("rotate", "none")] == [n, 1]
    judged = [
        judge(paper("lorma").claim("rank"), lm.rank_at_start(n, 1, way) / n).verdict
        for way in ("rotate", "none")
    ]
    assert judged == [REPRODUCED, NOT_REPRODUCED]


@pytest.mark.parametrize("inflation", lm.INFLATIONS)
@pytest.mark.parametrize("n", [12, 130, 131, 257])  # below and above the size for correlations
def test_multiplied_is_a_product_with_the_multiplier(inflation, n):
    up, down = drawn(n, 1)
    up.requires_grad_(), down.requires_grad_()
    y = torch.randn(2, 3, n, requires_grad=True)
    expected = y @ lm.multiplier(up, down, inflation, 0.7).T
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(lm.multiplied(y, up, down, inflation, 0.7), expected, **close)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), (y, up, down))
    ours = lm.multiplied(y, up, down, inflation, 0.7)
    found = torch.autograd.grad((ours * weight).sum(), (y, up, down))
    torch.testing.assert_close(found, wanted, **close)


def test_by_diagonals_is_what_it_is_by_hand():
    up, down = (m.double() for m in drawn(6, 2))
    y, m = torch.randn(6).double(), up @ down
    by_hand = [sum((m[i, k] * y[(i + k) % 6]).item() for k in range(6)) for i in range(6)]
    assert lm.by_diagonals(y, up, down).tolist() == pytest.approx(by_hand, abs=1e-5)


def test_orders_cost_what_torch_counts():
    n, rank, tokens = 24, 3, 11
    up, down, w, x = *drawn(n, rank), torch.randn(n, n), torch.randn(n, tokens)
    orders = {
        "matrix": lambda: ((up @ down) @ w) @ x,
        "weight": lambda: (w + up @ (down @ w)) @ x,
        "input": lambda: up @ (down @ (w @ x)),
    }
    for order, compute in orders.items():
        with FlopCounterMode(display=False) as counter:
            compute()
        assert 2 * lm.products(n, rank, tokens, order) == counter.get_total_flops()


@pytest.mark.parametrize("mode", lm.MODES)
def test_a_token_costs_what_torch_counts(mode):
    tokens, rank = 11, 2
    layer = lm.LoRMALinear(torch.nn.Linear(10, 14, bias=False), rank, inflation="add", mode=mode)
    counted, x = lm.products_a_token(14, 10, rank, mode), torch.randn(tokens, 10)
    by_hand = {"pre": (140 + 14 * 14, 140 + 2 * 2 * 14), "post": (140 + 10 * 10, 140 + 2 * 2 * 10)}
    assert (counted["matrix"], counted["input"]) == by_hand[mode]
    made, weight = layer.multiplier(), layer.base.weight
    orders = {
        "matrix": lambda: made @ (weight @ x.T) if mode == "pre" else weight @ (made @ x.T),
        "input": lambda: layer(x),
    }
    for order, compute in orders.items():
        with FlopCounterMode(display=False) as counter:
            compute()
        assert 2 * tokens * counted[order] == counter.get_total_flops()


# A layer.


@pytest.mark.parametrize("mode", lm.MODES)
@pytest.mark.parametrize("inflation", lm.INFLATIONS)
def test_a_layer_multiplies_its_weight_and_not_its_bias(inflation, mode):
    base = torch.nn.Linear(10, 14)
    layer = lm.LoRMALinear(base, 2, 3.0, inflation, mode)
    moved(layer, 0.06)
    m = layer.multiplier()
    weight = m @ base.weight if mode == "pre" else base.weight @ m
    x = torch.randn(4, 10)
    expected = torch.nn.functional.linear(x, weight, base.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight, weight)
    assert len(m) == (14 if mode == "pre" else 10)


@pytest.mark.parametrize("alpha", [None, 3.0, 32.0])
@pytest.mark.parametrize("inflation", ["rotate", "add"])
def test_the_multiplier_starts_as_the_identity(inflation, alpha):
    layer = lm.LoRMALinear(torch.nn.Linear(9, 9), 4, alpha, inflation)
    torch.testing.assert_close(layer.multiplier(), torch.eye(9), atol=1e-6, rtol=0)


def test_every_rank_can_learn_from_the_start():
    for inflation in ("rotate", "add"):
        layer = lm.LoRMALinear(torch.nn.Linear(9, 9), 4, inflation=inflation)
        layer(torch.randn(5, 9)).square().sum().backward()
        told = layer.up.grad.abs().sum(0) + layer.down.grad.abs().sum(1)
        assert (told > 0).all()


def test_the_plain_form_starts_far_and_can_start_near():
    base = torch.nn.Linear(12, 9, bias=False)
    layer = lm.LoRMALinear(base, 3, 6.0, "none")
    assert lm.numerical_rank(layer.weight) == 1
    for mode in lm.MODES:
        layer = lm.LoRMALinear(base, 3, 6.0, "none", mode)
        layer.start_near()
        u, s, v = torch.linalg.svd(base.weight, full_matrices=False)
        nearest = (u[:, :3] * s[:3]) @ v[:3]
        torch.testing.assert_close(layer.weight, nearest, atol=1e-5, rtol=1e-5)


def test_added_it_is_lora_through_the_weight():
    base = torch.nn.Linear(12, 9)
    layer, lora = lm.LoRMALinear(base, 3, 6.0, "add"), LoRALinear(base, 3, 6.0)
    moved(layer, 0.06)
    with torch.no_grad():
        lora.up.copy_(layer.up)
        lora.down.copy_(layer.down @ base.weight)  # A W0 in the place of A
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), lora(x), atol=1e-5, rtol=1e-5)


def test_wrong_words_and_ranks_are_said():
    base = torch.nn.Linear(16, 32)
    with pytest.raises(ValueError, match="'permute' is none of rotate, add, none"):
        lm.LoRMALinear(base, inflation="permute")
    with pytest.raises(ValueError, match="'left' is none of pre, post"):
        lm.LoRMALinear(base, mode="left")
    with pytest.raises(ValueError, match="rank 17 is not 1 to 16"):
        lm.LoRMALinear(base, 17, mode="post")


# In a model.


@pytest.mark.parametrize(("inflation", "mode"), WAYS)
def test_it_starts_as_the_base_and_only_it_trains(model, inflation, mode):
    before = anatomy.logits(model, TOKENS)
    layers = anatomy.projections(model).values()
    sizes = [matrix(layer).shape[lm.MODES.index(mode)] for layer in layers]
    lm.lorma_(model, rank=2, inflation=inflation, mode=mode)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before, atol=1e-5, rtol=1e-5)
    freeze_base_(model)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == set(trainable(model)) and len(asking) == 2 * len(sizes)
    assert n_trainable(model) == sum(2 * 2 * n for n in sizes)


@pytest.mark.parametrize(("inflation", "mode"), WAYS)
def test_merged_is_the_same_and_unmerged_and_removed_are_exact(model, inflation, mode):
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    lm.lorma_(model, rank=2, alpha=4, inflation=inflation, mode=mode)
    changed = anatomy.logits(moved(model, 0.06), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    merges(model, before, changed)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    merge_(model)
    remove_(model)
    assert not adapters(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_one_over_another_merges_and_folds(model):
    lm.lorma_(model, ["output"], rank=2)
    lm.lorma_(model, ["output", "up"], rank=3, inflation="add")
    changed = anatomy.logits(moved(model, 0.06), TOKENS)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)
    fold_(model)
    assert not adapters(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_is_the_same(model, tmp_path):
    plain = copy.deepcopy(model)
    lm.lorma_(model, ["output", "down"], rank=2, alpha=4, mode="post")
    changed = anatomy.logits(moved(model, 0.06), TOKENS)
    loads_again(model, plain, changed, tmp_path)


@pytest.mark.parametrize(("inflation", "mode"), WAYS)
def test_bfloat16_and_a_cache_go_with_it(inflation, mode):
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    lm.lorma_(model, rank=2, inflation=inflation, mode=mode)
    moved(model, 0.06)
    same_under_a_cache(model)


def test_correlations_keep_bfloat16():
    up, down = (m.bfloat16() for m in drawn(256, 2))
    assert lm.multiplied(torch.randn(3, 256).bfloat16(), up, down, "rotate").dtype == torch.bfloat16


# The study.


@pytest.mark.parametrize("kind", ["lora", "rotate", "add", "plain", "near"])
def test_every_kind_has_as_many_numbers_in_the_upper_blocks_alone(kind):
    model = MODELS["bert"]()
    study.adapt_(model, kind, 3, study.ROLES_OF["movies"], below=1)
    assert n_trainable(model) == 2 * 3 * (32 + 32)
    assert all(".layer.1." in name for name in adapters(model))


def test_no_adapter_is_none():
    model = MODELS["bert"]()
    study.adapt_(model, "head", 3, study.ROLES_OF["movies"])
    assert not adapters(model)


def test_how_many_singular_values_hold_nine_tenths():
    assert study.spread(torch.diag(torch.tensor([3.0, 1.0, 0.5]))) == 2  # 9 of 10.25, then 10
    assert study.spread(torch.eye(10)) == 9


def test_an_adapter_that_does_nothing_is_not_on_a_par():
    stored, claim = Study(paper("lorma")).runs(), paper("lorma").claim("on-par")
    idle = replaced(stored, "movies_rotate_accuracy", "movies_head_accuracy")
    assert judge(claim, study.values(idle)["on-par"]).verdict == NOT_REPRODUCED


def test_trained_ranks_are_judged_on_the_studys_runs():
    stored = Study(paper("lorma")).runs()
    full = [run["movies_rotate_full"] for run in stored if "movies_rotate_full" in run]
    told = study.values(stored)
    assert told["rank-trained"] == full and len(full) >= 5 and "rank" not in told


def test_ranks_are_compared_on_the_same_seeds():
    runs = [
        {"kind": "all", "text": "licences", "seed": seed, "licences_lora_nll": 9.0 + seed}
        for seed in study.SEEDS
    ]
    rate = study.RANK_RATES["licences", "lora"][0]
    for seed in range(study.RANKED):
        one = {"kind": "lora", "text": "licences", "rank": 1, "seed": study.SEEDS[seed]}
        runs += [one | {"rate": rate, "nll": 5.0 + seed}, one | {"rate": 2 * rate, "nll": 0.0}]
    assert study.at_rank(runs, "lora", 1, "licences") == [5.0, 6.0, 7.0, 8.0, 9.0]
    same = [9.0 + seed for seed in study.SEEDS[: study.RANKED]]
    assert study.at_rank(runs, "lora", study.RANK, "licences") == same


def test_a_seeds_runs_are_one():
    runs = [
        {"kind": "all", "seed": 5, "movies_lora_nll": 1.0},
        {"kind": "all", "text": "licences", "seed": 5, "licences_lora_nll": 2.0},
        {"kind": "plain", "seed": 5, "rank": 1, "text": "movies", "nll": 4.0},
    ]
    (told,) = study.of_seeds(runs)
    assert (told["movies_lora_nll"], told["licences_lora_nll"]) == (1.0, 2.0)
    assert "nll" not in told


def test_the_untouched_model_is_judged_on_the_same_rows():
    options = {"text": "licences", "steps": 2, "sentences": 20}
    base = study.run("base", 200, **options)
    at_start = study.run("rotate", 200, rate=0.0, **options)
    assert base["nll"] == pytest.approx(at_start["nll"], abs=1e-4)
    assert base["area"] == pytest.approx(at_start["area"], abs=1e-4) and base["learning"] == 0


WRONG = {
    "rotated": [
        lambda m: torch.stack([row.roll(-i) for i, row in enumerate(m)]),
        lambda m: torch.stack([column.roll(i) for i, column in enumerate(m.T)]).T,
        lambda m: m.clone(),
    ],
    "start": [
        lambda n, rank, factor: torch.stack([torch.zeros(n, rank), torch.randn(n, rank)]),
        lambda n, rank, factor: _dead(n, rank, factor),
        lambda n, rank, factor: exercises._start(n, rank, 1.0),
    ],
    "multiplications": [
        lambda n, rank, tokens: exercises._multiplications(n, rank, tokens)[::-1],
        lambda n, rank, tokens: (n**3 + tokens * n * n, tokens * n * n + 2 * rank * n * tokens),
        lambda n, rank, tokens: (16, 8),
    ],
}


def _dead(n, rank, factor):
    """The identity, but only the first rank can ever learn."""
    up, down = torch.zeros(n, rank), torch.zeros(n, rank)
    up[:, 0], down[0, 0] = 1.0, 1.0 / factor
    return torch.stack([up, down])


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_told(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
