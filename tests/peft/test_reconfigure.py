import copy

import pytest
import torch
from families_for_tests import (
    MODELS,
    TOKENS,
    learns_alone,
    leaves_nothing,
    moved,
    same_under_a_cache,
)
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    fold_,
    freeze_base_,
    matrix,
    merge_,
    n_trainable,
    remove_,
    unmerge_,
)
from lablib.peft.lora import lora_
from lablib.peft.measure import account
from lablib.peft.reconfigure import (
    LearnerLinear,
    at_once,
    far_,
    feed_forward,
    learned,
    learners,
)
from lablib.peft.sparse import matrices
from lablib.peft.subset import only_


def put(model, retention=0.25):
    """FAR, with amounts as if there had been a priming run."""
    random = torch.Generator().manual_seed(5)
    layers = feed_forward(model)
    amounts = {n: torch.rand(len(matrix(a)), generator=random) for n, a in layers.items()}
    far_(model, retention, amounts)
    return amounts


def test_it_starts_as_the_base_and_leaves_nothing(model, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    put(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    learns_alone(model)
    leaves_nothing(model, plain, before, tmp_path)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_merged_is_the_same_biases_too_and_unmerged_is_exact(model):
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    put(model)
    changed = anatomy.logits(moved(model), TOKENS)
    for _ in range(2):  # merging twice is merging once
        merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)
    folded = copy.deepcopy(model)
    fold_(folded)
    assert not adapters(folded)
    torch.testing.assert_close(anatomy.logits(folded, TOKENS), changed, atol=1e-5, rtol=1e-5)
    merge_(model)
    remove_(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_papers_two_sublayers_put_back_in_order(bias):
    """[W_l x + b_l; W_f x + b_f], then the permutation that restores the order of outputs."""
    torch.manual_seed(0)
    layer = LearnerLinear(torch.nn.Linear(6, 10, bias=bias), 3)
    layer.places.copy_(torch.tensor([1, 4, 8]))
    with torch.no_grad():
        for parameter in layer.own().values():
            parameter.normal_()
    frozen = torch.tensor([0, 2, 3, 5, 6, 7, 9])
    w, b = layer.base.weight.detach(), layer.base.bias
    learning = (w[layer.places] + layer.rows).detach().requires_grad_()
    biases = [None, None] if b is None else [b[layer.places] + layer.shift, b[frozen]]
    x = torch.randn(5, 6, requires_grad=True)
    parts = [F.linear(x, learning, biases[0]), F.linear(x, w[frozen], biases[1])]
    order = torch.cat([layer.places, frozen]).argsort()
    wanted = torch.cat(parts, -1)[:, order]
    torch.testing.assert_close(layer(x), wanted)
    target = torch.randn(5, 10)
    slopes = torch.autograd.grad((wanted - target).square().sum(), [x, learning])
    ours = torch.autograd.grad((layer(x) - target).square().sum(), [x, layer.rows])
    for one, other in zip(ours, slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_have_the_gradients_of_full_tuning_and_frozen_rows_have_none(model):
    plain = copy.deepcopy(model)
    put(model)
    freeze_base_(model)
    anatomy.logits(model, TOKENS).square().mean().backward()
    anatomy.logits(plain, TOKENS).square().mean().backward()
    for name, layer in adapters(model).items():
        full = plain.get_submodule(name)
        slope = full.weight.grad if matrix(full) is full.weight else full.weight.grad.T
        torch.testing.assert_close(layer.rows.grad, slope[layer.places], atol=1e-7, rtol=1e-4)
        if layer.shift is not None:
            wanted = full.bias.grad[layer.places]
            torch.testing.assert_close(layer.shift.grad, wanted, atol=1e-7, rtol=1e-4)
        assert all(p.grad is None for p in layer.base.parameters())


def test_counts_and_gradients_are_a_share_of_full_tunings(model):
    layers = feed_forward(model)
    full = copy.deepcopy(model)
    full.requires_grad_(False)
    for name in layers:
        full.get_submodule(name).requires_grad_(True)
    amounts = put(model)
    wanted = 0
    for name, layer in layers.items():
        k = round(0.25 * len(amounts[name]))
        wanted += k * (matrix(layer).shape[1] + (getattr(layer, "bias", None) is not None))
    assert n_trainable(model) == wanted
    freeze_base_(model)
    ours, theirs = (
        account(one, lambda m: anatomy.logits(m, TOKENS).square().mean()) for one in (model, full)
    )
    assert ours["gradients"] == theirs["gradients"] / 4
    assert ours["optimizer"] == theirs["optimizer"] / 4


def test_learners_are_the_rows_that_priming_moved_most(model):
    before = matrices(model)
    only_(model, [f"{name}.weight" for name in feed_forward(model)])
    freeze_base_(model)
    anatomy.logits(model, TOKENS).square().mean().backward()
    wanted = {}
    with torch.no_grad():
        for name, layer in feed_forward(model).items():
            turned = layer.weight.grad if matrix(layer) is layer.weight else layer.weight.grad.T
            wanted[name] = [sum(abs(g) for g in row) for row in (0.1 * turned).tolist()]
            layer.weight.sub_(0.1 * layer.weight.grad)
    after = matrices(model)
    amounts = learned({name: before[name] for name in wanted}, after)
    for name, amount in amounts.items():
        torch.testing.assert_close(amount, torch.tensor(wanted[name]), atol=1e-5, rtol=1e-3)
    remove_(model)
    far_(model, 0.5, amounts)
    assert {n for n, _ in adapters(model).items()} == set(feed_forward(model))
    for name, layer in adapters(model).items():
        amount = amounts[name]
        others = torch.ones_like(amount, dtype=torch.bool).index_fill(0, layer.places, False)
        assert amount[layer.places].min() >= amount[others].max()


def test_learners_are_a_share_of_each_matrix_in_order():
    amounts = {"a": torch.tensor([3.0, 1.0, 9.0, 5.0]), "b": torch.tensor([2.0, 1.0])}
    places = learners(amounts, 0.5)
    assert {name: at.tolist() for name, at in places.items()} == {"a": [2, 3], "b": [0]}
    assert learners(amounts, 0.01)["b"].tolist() == [0]  # one at least
    with pytest.raises(ValueError, match="a retention of 0 is not above 0"):
        learners(amounts, 0)


def test_it_goes_over_lora_and_merges(model):
    lora_(model, rank=2)
    put(model)
    assert (n_bias := sum(a.shift is not None for a in learners_of(model))) in (0, 4)
    assert (n_bias > 0) == any(n.endswith("bias") for n, _ in model.named_parameters())
    changed = anatomy.logits(moved(model), TOKENS)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)


def learners_of(model):
    return [a for a in adapters(model).values() if isinstance(a, LearnerLinear)]


def test_bfloat16_and_a_cache_go_with_it():
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    put(model)
    same_under_a_cache(moved(model))


def test_what_can_not_be_is_said():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"{k} rows of 3 can't be chosen"):
            LearnerLinear(torch.nn.Linear(4, 3), k)


def test_a_step_that_is_not_made_tells_what_would_have_changed(model):
    def loss(model, rows):
        return F.cross_entropy(anatomy.logits(model, rows).flatten(0, 1), rows.flatten())

    list(model.parameters())[-1].requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    bits = {n: p.clone() for n, p in model.named_parameters()}
    amounts = at_once(model, TOKENS, loss)
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None and torch.equal(p, bits[n]) for n, p in model.named_parameters())
    before = {n: matrix(layer).detach().clone() for n, layer in feed_forward(model).items()}
    model.requires_grad_(True)
    loss(model, TOKENS).backward()
    with torch.no_grad():
        for layer in feed_forward(model).values():
            layer.weight -= layer.weight.grad
    after = {n: matrix(layer) for n, layer in feed_forward(model).items()}
    for name, amount in learned(before, after).items():
        torch.testing.assert_close(amounts[name], amount, atol=1e-5, rtol=1e-4)
