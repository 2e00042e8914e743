"""The survey's gates: each as defined, as its router computes it, and who looks ahead."""

import pkgutil

import pytest
import torch
from torch import nn

from lablib.exercises import moe_survey as exercises
from lablib.experts import moe_survey as ms
from lablib.experts.accounting import parameters
from lablib.experts.moe import ExpertList, MoE, recorded
from lablib.experts.routing import ExpertChoice, HashChoice, SoftSlots, TokenChoice
from lablib.models import GPT, GPTConfig
from lablib.studies import moe_survey as study


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def experts(n=4, dim=6):
    return [nn.Linear(dim, dim) for _ in range(n)]


def by_router(router, x, parts):
    layer = MoE(router, ExpertList(parts)).eval()
    return layer(x[None])[0]


def test_dense_and_token_choice_are_what_their_routers_compute():
    x, parts = torch.randn(9, 6), experts()
    router = TokenChoice(6, 4, 4)
    router.weight.data.normal_()
    scores = router.logits(x)
    torch.testing.assert_close(by_router(router, x, parts), ms.mixture(x, ms.dense(scores), parts))
    router.top_k, router.softmax = 2, "after"
    gates = ms.token_choice(scores, 2)
    torch.testing.assert_close(by_router(router, x, parts), ms.mixture(x, gates, parts))
    assert (gates > 0).sum(1).tolist() == [2] * 9


def test_expert_choice_is_what_its_router_computes():
    x, parts = torch.randn(8, 6), experts()
    router = ExpertChoice(6, 4, 1.0, capacity_of="sequence")
    router.weight.data.normal_()
    gates = ms.expert_choice(router.logits(x), 2)
    torch.testing.assert_close(by_router(router, x, parts), ms.mixture(x, gates, parts))
    assert (gates > 0).sum(0).tolist() == [2] * 4


def test_hashed_is_what_its_router_computes():
    x, parts, ids = torch.randn(8, 6), experts(), torch.randint(0, 20, (8,))
    table = torch.randint(0, 4, (20,))
    router = HashChoice(table, 4)
    router.ids = ids[None]
    gates = ms.hashed(ids, table, 4)
    torch.testing.assert_close(by_router(router, x, parts), ms.mixture(x, gates, parts))


def test_token_merging_is_what_its_router_computes():
    x, parts = torch.randn(8, 6), experts()
    router = SoftSlots(6, 4, 1)
    router.weight.data.normal_()
    found = by_router(router, x, parts)
    torch.testing.assert_close(found, ms.token_merging(x, router.logits(x), parts))


def small():
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "max_length": 16}
    return GPT(GPTConfig(ffn_dim=48, **sizes))


@pytest.mark.parametrize("name", study.GATES)
def test_every_row_of_the_table_has_equal_work_and_equal_storage(name):
    parts = study.GATES[name]
    model = study.build(0, **parts)
    one = 2 * 3 * 32 * 96  # both layers of a dense model
    layers = one if parts["router"] == "none" else 8 * one
    weights = dict(model.named_parameters())
    routers = sum(weight.numel() for key, weight in weights.items() if ".router." in key)
    inside = sum(weight.numel() for key, weight in weights.items() if ".mlp." in key)
    assert inside - routers == layers
    dense = parameters(study.build(0, "none")).total
    assert model.n_parameters() == dense - one + layers + routers
    if parts["router"] != "soft":  # whose experts meet means, not tokens
        assert parameters(model) == (model.n_parameters(), dense + routers)


def test_drops_are_the_tokens_that_no_expert_computes():
    windows = torch.randint(0, 1024, (4, 65))
    assert study.traffic(study.build(0, "none"), [windows]) == ([], 0.0)
    load, drops = study.traffic(study.build(0, "token", n_experts=8), [windows])
    assert sum(load) == pytest.approx(1, abs=1e-3) and drops == 0
    model = study.build(0, "expert", n_experts=8)
    load, drops = study.traffic(model, [windows])
    with recorded(model) as records, torch.no_grad():
        model.eval()(windows[:, :-1])
    taken = {int(token) for token in [*records.values()][-1][0].token}
    assert load == [1 / 8] * 8 and drops == pytest.approx(1 - len(taken) / 256) and drops > 0


def test_what_can_not_be_divided_is_refused():
    with pytest.raises(ValueError, match="96 hidden units can't be divided among 7 experts"):
        ms.survey_layer(32, 96, "token", 14, 7)
    with pytest.raises(ValueError, match="router 'tokens' is none of none, dense"):
        ms.survey_layer(32, 96, "tokens")


def spread(model):
    """The study's models start so near zero that a leak would drown in rounding."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("router", ms.ROUTERS)
def test_only_gates_that_see_the_sequence_look_ahead(router):
    top_k = 2 if router == "sigmoid" else 1
    model = spread(ms.survey_(small(), router, n_experts=4, top_k=top_k))
    moved = ms.influence(model, torch.randint(0, 40, (16,)), 10, 3)
    assert moved[10:].max() > 1e-3
    assert (moved[:10].max() > 1e-4) == (router in ("expert", "soft"))


@pytest.mark.parametrize("router", ["token", "hash", "expert"])
def test_a_blindfold_changes_nothing_for_a_model_that_looks_back(router):
    model = spread(ms.survey_(small(), router, n_experts=4))
    seeing, blind = ms.blindfold(model, torch.randint(0, 40, (6, 17)), (4, 8, 12))
    assert (abs(seeing - blind) < 1e-4) == (router != "expert")


def test_the_blindfold_takes_the_loss_of_the_next_token():
    model = spread(small())
    windows = torch.randint(0, 40, (3, 17))
    log_probs = model(windows[:, :-1]).log_softmax(-1)
    expected = -log_probs[:, 4].gather(1, windows[:, 5:6]).mean()
    seeing, blind = ms.blindfold(model, windows, (5,))
    assert seeing == pytest.approx(expected.item(), rel=1e-5)
    assert blind == pytest.approx(expected.item(), rel=1e-5)


def test_the_importance_loss_is_the_squared_coefficient_of_variation():
    gates = torch.rand(20, 5).softmax(-1)
    sums = gates.sum(0)
    expected = ((sums - sums.mean()) ** 2).mean() / sums.mean() ** 2
    torch.testing.assert_close(ms.importance_loss(gates), expected)


def test_an_even_load_is_balanced_and_one_expert_is_not():
    assert ms.balanced_share([0.25] * 4) == pytest.approx(1)
    assert ms.balanced_share([1, 0, 0, 0]) == 0


def test_every_leaf_of_the_taxonomy_is_where_it_says():
    rows = ms.leaves()
    assert len(rows) > 20 and any(not place for _, place in rows)
    for path, place in rows:
        assert 2 <= len(path) <= 3
        if not place:
            continue
        assert pkgutil.resolve_name(f"lablib.{place}") is not None


def with_the_sample(gates):
    importance = gates.sum(0)
    return importance.var() / importance.mean() ** 2


def not_squared(gates):
    return exercises._importance_loss(gates).sqrt()


def where_it_changed(logits, tokens, at, instead):
    return at


def last_moved(logits, tokens, at, instead):
    other = tokens.clone()
    other[at] = instead
    moved = ((logits(tokens) - logits(other)).abs().amax(-1) > 1e-6).nonzero()
    return int(moved[-1]) if len(moved) else -1


def no_overlap(probs, places):
    return max(0, len(probs) - places * probs.shape[1])


def of_rows(probs, places):
    return len(probs) - len(probs.topk(1).indices.unique())


WRONG = {
    "importance_loss": [with_the_sample, not_squared],
    "first_moved": [where_it_changed, last_moved],
    "left_out": [no_overlap, of_rows],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
