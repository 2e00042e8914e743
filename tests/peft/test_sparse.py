import copy

import pytest
import torch
import transformers as hf
from families_for_tests import (
    MODELS,
    TOKENS,
    learns_alone,
    loads_again,
    merges,
    moved,
    same_under_a_cache,
)
from torch.nn import functional as F

from lablib.models import anatomy, to_hf
from lablib.peft.adapter import (
    adapters,
    disabled,
    fold_,
    freeze_base_,
    load_adapter,
    matrix,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
    unmerge_,
)
from lablib.peft.lora import lora_
from lablib.peft.sparse import (
    Child,
    DiffLinear,
    MaskedLinear,
    SparseLinear,
    above,
    child_,
    child_d_,
    diff_fixed_,
    diff_pruning_,
    expected_l0,
    fish_,
    fisher,
    gate,
    largest,
    lt_sft_,
    masked_,
    matrices,
    open_probability,
    sparse_,
    sparse_at_,
)
from lablib.peft.subset import only_


def scores(model, *roles):
    """Some, of every matrix."""
    random = torch.Generator().manual_seed(5)
    return {
        name: torch.rand(matrix(layer).shape, generator=random)
        for name, layer in anatomy.projections(model, *roles).items()
    }


VERBS = {
    "sparse": lambda model: fish_(model, 0.02, scores(model)),
    "diff": diff_pruning_,
    "masked": lambda model: masked_(model, sparsity=0.1),
    "child": lambda model: child_(model, 0.3),
    "child_d": lambda model: child_d_(model, 0.3, scores(model)),
}
ON_WEIGHTS = ("sparse", "diff", "masked")


def loss(model, rows):
    return F.cross_entropy(anatomy.logits(model, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def full_gradients(model, tokens=TOKENS):
    """Name -> (out, in), of full tuning."""
    plain = copy.deepcopy(model)
    plain.requires_grad_(True)
    loss(plain, tokens).backward()
    return {
        name: layer.weight.grad if matrix(layer) is layer.weight else layer.weight.grad.T
        for name, layer in anatomy.projections(plain).items()
    }


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_of_all_methods(model, verb, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    VERBS[verb](model)
    assert torch.equal(anatomy.logits(model, TOKENS), before) is (verb != "masked")
    learns_alone(model)
    assert n_trainable(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(copy.deepcopy(model), TOKENS), changed)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(anatomy.logits(plain.eval(), TOKENS), changed)
    remove_(model)
    assert not adapters(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert torch.equal(anatomy.logits(model, TOKENS), before)


@pytest.mark.parametrize("verb", ON_WEIGHTS)
def test_merged_is_the_same_and_unmerged_is_exact(model, verb):
    before = anatomy.logits(model, TOKENS)
    VERBS[verb](model)
    changed = anatomy.logits(moved(model), TOKENS)
    merges(model, before, changed)
    fold_(model)
    assert not adapters(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)


# Sparse


def test_the_chosen_numbers_alone_change_and_have_full_tunings_gradients(model):
    wanted = full_gradients(model)
    before = matrices(model)
    fish_(model, 0.02, scores(model))
    total = sum(weight.numel() for weight in before.values())
    assert n_trainable(model) == round(0.02 * total)
    loss(model, TOKENS).backward()
    layers = {n: a for n, a in adapters(model).items() if isinstance(a, SparseLinear)}
    for name, layer in layers.items():
        at = layer.indices.long()
        torch.testing.assert_close(layer.values.grad, wanted[name].flatten()[at])
    moved(model)
    for name, layer in layers.items():
        by_hand = before[name].clone()
        for place, value in zip(layer.indices.tolist(), layer.values.tolist(), strict=True):
            by_hand[place // by_hand.shape[1], place % by_hand.shape[1]] += value
        torch.testing.assert_close(layer.weight, by_hand)


def test_the_file_has_the_numbers_and_their_places(tmp_path):
    model = MODELS["gpt"]()
    fish_(model, 0.02, scores(model))
    save_adapter(model, tmp_path / "a.safetensors")
    header = (tmp_path / "a.safetensors").read_bytes()[:8]
    held = (tmp_path / "a.safetensors").stat().st_size - int.from_bytes(header, "little") - 8
    assert held == n_trainable(model) * (4 + 4)  # a float32 and an int32


def test_largest_is_over_all_matrices_together():
    some = {"a": torch.tensor([[1.0, 9.0], [0.5, 7.0]]), "b": torch.zeros(1, 2)}
    some["c"] = torch.tensor([[2.0], [8.0]])
    places = largest(some, 3 / 8)
    assert {name: at.tolist() for name, at in places.items()} == {"a": [1, 3], "c": [1]}
    with pytest.raises(ValueError, match="a share of 0.01 is 0 of 8 numbers"):
        largest(some, 0.01)
    with pytest.raises(ValueError, match="a share of 2 is 16 of 8 numbers"):
        largest(some, 2)


def test_fisher_is_the_mean_square_of_the_gradient(model):
    model.requires_grad_(False)
    found = fisher(model, TOKENS.split(1), loss)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert set(found) == set(anatomy.projections(model))
    for name, wanted in full_gradients(model, TOKENS[:1]).items():
        other = full_gradients(model, TOKENS[1:])[name]
        torch.testing.assert_close(found[name], (wanted.square() + other.square()) / 2)
    up = fisher(model, TOKENS.split(1), loss, "up")
    assert len(up) == 2 and all(torch.equal(score, found[name]) for name, score in up.items())
    with pytest.raises(ValueError, match="a batch at least"):
        fisher(model, [], loss)
    lora_(model, ["up"], rank=2)
    with pytest.raises(ValueError, match=r"0.* has an adapter: choose first"):
        fisher(model, TOKENS.split(1), loss)


def test_lottery_tickets_are_what_full_tuning_moved_most(model):
    before = matrices(model)
    only_(model, [f"{name}.weight" for name in before])
    freeze_base_(model)
    loss(model, TOKENS).backward()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.sub_(0.1 * parameter.grad)
    after = matrices(model)
    with pytest.raises(ValueError, match="is not as it was before: rewind"):
        lt_sft_(model, 0.01, before, after)
    remove_(model)
    lt_sft_(model, 0.01, before, after)
    # One step of gradient descent moves by the gradient.
    wanted = {name: g.abs() for name, g in full_gradients(moved_out(model)).items()}
    smallest = torch.cat([w.flatten() for w in wanted.values()]).sort(descending=True).values
    smallest = smallest[n_trainable(model) - 1]
    for name, layer in adapters(model).items():
        assert (wanted[name].flatten()[layer.indices.long()] > 0.99 * smallest).all()


def moved_out(model):
    """The same without its adapters."""
    plain = copy.deepcopy(model)
    remove_(plain)
    return plain


def shira(family, tmp_path):
    """Ours, with peft's choice of numbers and its values; peft's; pairs of both's values."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = MODELS["gpt" if family == "ours" else family]().eval()
    if family == "ours":
        to_hf(model, tmp_path)
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        theirs = copy.deepcopy(model)
    bert = family == "bert"
    names = ["query", "intermediate.dense"] if bert else ["q_proj", "down_proj"]
    config = peft.ShiraConfig(r=2, target_modules=names, random_seed=1)
    theirs = peft.get_peft_model(theirs, config).eval()
    layers = [m for m in theirs.modules() if hasattr(m, "shira_indices")]
    mine = anatomy.projections(model, *(["query", "up"] if bert else ["query", "down"]))
    places = {}
    for (name, own), layer in zip(mine.items(), layers, strict=True):
        row, column = layer.shira_indices["default"].long()
        places[name] = row * own.weight.shape[1] + column
    sparse_at_(model, places)
    values = [layer.shira_weight["default"] for layer in layers]
    return model, theirs, list(zip(trainable(model).values(), values, strict=True))


@pytest.mark.parametrize("family", ["ours", "llama", "bert"])
def test_outputs_and_gradients_are_those_of_peft(family, tmp_path):
    model, theirs, pairs = shira(family, tmp_path)
    freeze_base_(model)
    assert n_trainable(model) == theirs.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        for mine, other in pairs:
            mine.copy_(0.1 * torch.randn(mine.shape))
            other.copy_(mine)
    mine, expected = anatomy.logits(model, TOKENS), theirs(TOKENS).logits
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


# Diff pruning


def test_gates_open_as_often_as_the_formula_says():
    torch.manual_seed(0)
    for alpha in (-2.0, 0.0, 1.0):
        z = gate(torch.full((200_000,), alpha), torch.rand(200_000))
        assert z.min() == 0 and z.max() == 1
        share = (z > 0).float().mean()
        assert abs(share - open_probability(torch.tensor(alpha))) < 0.005
    # By hand: s = sigmoid(0) = 1/2 stands in the middle of -1.5 to 1.5.
    assert gate(torch.tensor(0.0)) == 0 and gate(torch.tensor(5.0)) == 1
    s = torch.tensor(0.7).sigmoid()
    torch.testing.assert_close(gate(torch.tensor(0.7)), 3 * s - 1.5)
    torch.testing.assert_close(gate(torch.tensor(0.7)), gate(torch.tensor(0.7), torch.tensor(0.5)))


@pytest.mark.parametrize("structured", [True, False])
def test_expected_l0_is_what_draws_show(structured):
    torch.manual_seed(0)
    layer = DiffLinear(torch.nn.Linear(30, 20), structured)
    with torch.no_grad():
        layer.alpha.normal_()
        if structured:
            layer.alpha_group.fill_(0.5)
    drawn = [(layer.gates(draw=True) > 0).sum().item() for _ in range(2000)]
    mean = sum(drawn) / len(drawn)
    assert abs(mean / layer.expected_l0().item() - 1) < 0.05
    assert sum(p.numel() for p in layer.own().values()) == 2 * 20 * 30 + structured


def test_gates_are_drawn_in_training_and_still_in_evaluation():
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    diff_pruning_(model)
    assert not any(a.training for a in adapters(model).values())
    moved(model)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.alpha.sub_(5)
            layer.alpha_group.fill_(0.5)
    still = model(TOKENS)
    assert torch.equal(model(TOKENS), still)
    still.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in trainable(model).values())
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))
    merge_(model)
    torch.testing.assert_close(model(TOKENS), still, atol=1e-5, rtol=1e-5)


def test_the_penalty_sums_over_matrices_and_closes_gates():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="GPT has no gates"):
        expected_l0(model)
    diff_pruning_(model, structured=False)
    total = sum(layer.weight.numel() for layer in anatomy.projections(model).values())
    opened = torch.tensor(5.0).sigmoid().item()  # log(-l / r) is 0 for l = -r
    assert abs(expected_l0(model).item() / (total * opened) - 1) < 1e-5
    expected_l0(model).backward()
    assert all(a.alpha.grad.min() > 0 for a in adapters(model).values())


def test_the_largest_differences_stay_and_train_on(model, tmp_path):
    plain = copy.deepcopy(model)
    diff_pruning_(model)
    moved(model)
    deltas = {name: a.delta().detach() for name, a in adapters(model).items()}
    diff_fixed_(model, 0.05)
    total = sum(d.numel() for d in deltas.values())
    assert n_trainable(model) == round(0.05 * total)
    kept = {name: a.delta().detach() for name, a in adapters(model).items()}
    assert all(torch.equal(k, torch.where(k != 0, deltas[n], 0)) for n, k in kept.items())
    rest = max((deltas[n] * (k == 0)).abs().max() for n, k in kept.items())
    assert min(k[k != 0].abs().min() for k in kept.values()) >= rest
    changed = anatomy.logits(model, TOKENS)
    loads_again(model, plain, changed, tmp_path)
    with pytest.raises(ValueError, match="no other adapter"):
        diff_fixed_(model, 0.05)


# Masking


def test_masks_start_as_sparse_as_asked_and_pass_the_gradient(model):
    wanted, before = full_gradients(model), matrices(model)
    masked_(model, sparsity=0.3)
    layers = adapters(model)
    zeros = torch.cat([(layer.mask() == 0).flatten() for layer in layers.values()])
    assert abs(zeros.float().mean() - 0.3) < 0.02
    for name, layer in layers.items():
        kept = layer.score > layer.threshold
        torch.testing.assert_close(layer.weight, torch.where(kept, before[name], 0.0))
        with torch.no_grad():
            layer.score.fill_(1.0)  # all kept: the base's function, and its gradient
    loss(model, TOKENS).backward()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.score.grad, wanted[name] * before[name])


def test_a_score_on_the_threshold_is_not_above_it():
    score = torch.tensor([0.009, 0.01, 0.011], requires_grad=True)
    mask = above(score, 0.01)
    assert mask.tolist() == [0, 0, 1]
    (mask * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert score.grad.tolist() == [1, 2, 3]


# Child-Tuning


def test_a_driven_child_has_the_gradient_of_its_mask(model):
    wanted, some = full_gradients(model), scores(model)
    child_d_(model, 0.3, some)
    freeze_base_(model)
    loss(model, TOKENS).backward()
    threshold = torch.cat([s.flatten() for s in some.values()]).quantile(0.7)
    for name, layer in anatomy.projections(model).items():
        stored = layer.weight.grad
        gradient = stored if matrix(layer.base) is layer.base.weight else stored.T
        torch.testing.assert_close(gradient, torch.where(some[name] > threshold, wanted[name], 0.0))
        assert layer.base.weight.grad is None


def test_a_matrix_without_a_chosen_number_gets_no_gradient():
    model = MODELS["gpt"]()
    some = {name: score * ("blocks.1" in name) for name, score in scores(model).items()}
    child_d_(model, 0.1, some)
    loss(model, TOKENS).backward()
    for name, gradient in gradients(model).items():
        assert bool(gradient.any()) is ("blocks.1" in name)


def test_a_free_child_draws_at_each_backward_pass_and_is_right_on_average(model):
    wanted = full_gradients(model)
    child_(model, 0.25)
    freeze_base_(model)
    drawn = []
    for _ in range(2):
        model.zero_grad()
        loss(model, TOKENS).backward()
        drawn.append({n: g.clone() for n, g in gradients(model).items()})
    for name, full in wanted.items():
        first, second = drawn[0][name], drawn[1][name]
        assert not torch.equal(first, second)
        torch.testing.assert_close(first[first != 0], full[first != 0] / 0.25)
    kept = torch.cat([(g != 0).flatten() for g in drawn[0].values()])
    there = torch.cat([(g != 0).flatten() for g in wanted.values()])
    assert abs(kept.sum() / there.sum() - 0.25) < 0.02


def gradients(model):
    return {
        name: g if matrix(layer.base) is layer.base.weight else g.T
        for name, layer in anatomy.projections(model).items()
        for g in [layer.weight.grad]
    }


def test_a_child_is_no_change_of_weights_that_could_be_merged():
    model = MODELS["gpt"]()
    child_(model, 0.5)
    assert n_trainable(model) == sum(w.numel() for w in matrices(model).values())
    with pytest.raises(ValueError, match="can't be merged"):
        merge_(model)


# All


@pytest.mark.parametrize("verb", VERBS)
def test_bfloat16_and_a_cache_go_with_it(verb):
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    VERBS[verb](model)
    same_under_a_cache(moved(model, 0.02))
    model.train()(TOKENS).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


def test_sparse_goes_over_lora_and_merges(model):
    lora_(model, ["output", "up"], rank=2)
    fish_(model, 0.05, scores(model))
    changed = anatomy.logits(moved(model), TOKENS)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)


def test_what_can_not_be_is_said():
    layer = torch.nn.Linear(4, 3)
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"{k} numbers of a matrix of 12"):
            SparseLinear(layer, k)
    with pytest.raises(ValueError, match="a sparsity of 0 is not above 0"):
        MaskedLinear(layer, 0)
    with pytest.raises(ValueError, match="a share of 1.5 is not above 0, up to 1"):
        Child(layer, 1.5)
    with pytest.raises(AttributeError):
        sparse_(MODELS["gpt"](), {"blocks.9.mlp.up": 3})
