import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from lablib.exercises import trainable_parameters as exercises
from lablib.lab.grading import outcome
from lablib.models import GPT, GPTConfig
from lablib.scaling import trainable_parameters as tp
from lablib.studies import trainable_parameters as study
from lablib.training import fit

# Outputs and gradients of torch-structured 1.3.0, recorded once.
RECORDED = json.loads(Path(__file__).with_name("torch_structured.json").read_text("utf-8"))


def small(**options):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 32}
    return GPT(GPTConfig(**sizes | {"init_std": 0.25, "max_length": 32} | options))


def tokens(rows=4, length=13):
    return torch.randint(50, (rows, length))


def recorded(kind, name, *shape):
    return torch.tensor(RECORDED[kind][name]).reshape(shape)


def test_hadamard_transforms_are_scipys():
    for n in (1, 2, 8, 64):
        x = torch.randn(3, n, dtype=torch.float64)
        wanted = x @ torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float64) / n**0.5
        torch.testing.assert_close(tp.hadamard(x), wanted)
    with pytest.raises(ValueError, match="power of 2"):
        tp.hadamard(torch.randn(3, 12))


@pytest.mark.parametrize(("ins", "outs"), [(8, 8), (8, 24), (6, 10), (16, 5)])
def test_hdhd_is_its_product_of_matrices(ins, outs):
    layer = tp.HDHD(ins, outs).double()
    n = layer.diagonals.shape[-1]
    h = scipy.linalg.hadamard(n) / n**0.5
    products = [h @ np.diag(a) @ h @ np.diag(b) for a, b in layer.diagonals.detach().numpy()]
    wanted = torch.tensor(np.concatenate(products)[:outs, :ins])
    torch.testing.assert_close(tp.dense(layer), wanted)
    x = torch.randn(4, 3, ins, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ wanted.T)


@pytest.mark.parametrize(("ins", "outs"), [(8, 8), (6, 18), (8, 11)])
def test_circulant_layers_are_scipys_matrices(ins, outs):
    layer = tp.Circulant(ins, outs).double()
    rows = [scipy.linalg.circulant(column) for column in layer.column.detach().numpy()]
    wanted = torch.tensor(np.concatenate(rows)[:outs])
    torch.testing.assert_close(tp.dense(layer), wanted)


@pytest.mark.parametrize(("ins", "outs", "blocks"), [(16, 16, 4), (32, 12, 4), (36, 9, 3)])
def test_monarch_layers_are_blocks_and_permutations(ins, outs, blocks):
    layer = tp.Monarch(ins, outs, blocks=blocks).double()
    first, second = (torch.block_diag(*part.detach()) for part in (layer.first, layer.second))
    width = ins // blocks
    across = torch.arange(ins).view(width, blocks).T.flatten()
    back = torch.arange(outs).view(blocks, outs // blocks).T.flatten()
    wanted = (second @ first[across])[back]
    torch.testing.assert_close(tp.dense(layer), wanted)


def test_monarch_layers_equal_torch_structureds_with_gradients():
    layer = tp.Monarch(16, 24, blocks=4)
    layer.first.data = recorded("monarch", "first", 4, 4, 4)
    layer.second.data = recorded("monarch", "second", 4, 6, 4)
    x = recorded("monarch", "x", 3, 16).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, recorded("monarch", "y", 3, 24), atol=1e-5, rtol=0)
    (y * recorded("monarch", "upstream", 3, 24)).sum().backward()
    for name, part in (("x", x), ("first", layer.first), ("second", layer.second)):
        wanted = recorded("monarch", f"{name}_gradient", *part.shape)
        torch.testing.assert_close(part.grad, wanted, atol=1e-5, rtol=0)


def test_circulant_and_hadamard_equal_torch_structureds_with_gradients():
    layer = tp.Circulant(8, 8)
    layer.column.data = recorded("circulant", "column", 1, 8)
    x = recorded("circulant", "x", 3, 8).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, recorded("circulant", "y", 3, 8), atol=1e-5, rtol=0)
    (y * recorded("circulant", "upstream", 3, 8)).sum().backward()
    for name, part in (("x", x), ("column", layer.column)):
        wanted = recorded("circulant", f"{name}_gradient", *part.shape)
        torch.testing.assert_close(part.grad, wanted, atol=1e-5, rtol=0)
    x = recorded("hadamard", "x", 3, 16).requires_grad_()
    y = tp.hadamard(x)
    torch.testing.assert_close(y, recorded("hadamard", "y", 3, 16), atol=1e-5, rtol=0)
    (y * recorded("hadamard", "upstream", 3, 16)).sum().backward()
    wanted = recorded("hadamard", "x_gradient", 3, 16)
    torch.testing.assert_close(x.grad, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", tp.KINDS)
@pytest.mark.parametrize(("ins", "outs"), [(32, 96), (96, 32), (48, 128)])
def test_structured_layers_begin_with_outputs_as_large_as_dense_ones(kind, ins, outs):
    torch.manual_seed(0)
    x = torch.randn(400, ins)
    sizes = [tp.KINDS[kind](ins, outs, 0.2)(x).square().mean() for _ in range(20)]
    padded = 2 ** np.ceil(np.log2(ins)) / ins if kind == "hadamard" else 1
    assert torch.stack(sizes).mean().item() * padded == pytest.approx(ins * 0.2**2, rel=0.25)


def test_the_nearest_monarch_matrix_is_a_monarch_matrix_and_the_nearest():
    torch.manual_seed(0)
    weight = torch.randn(24, 16)
    nearest = tp.dense(tp.nearest_monarch(weight, 4))
    again = tp.dense(tp.nearest_monarch(nearest.detach(), 4))
    torch.testing.assert_close(again, nearest, atol=1e-5, rtol=1e-4)
    found = (nearest - weight).norm().item()
    layer = tp.Monarch(16, 24, std=1.0, blocks=4)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (tp.dense(layer) - weight).square().sum()
        loss.backward()
        return loss

    by_search = optimizer.step(closure) and (tp.dense(layer) - weight).norm().item()
    assert found <= by_search + 1e-3 and found == pytest.approx(by_search, rel=0.02)


def test_impossible_layers_are_refused():
    with pytest.raises(ValueError, match="no Monarch form"):
        tp.Monarch(20, 20, blocks=4)
    with pytest.raises(ValueError, match="none of hadamard"):
        tp.structured_(small(), "toeplitz")
    with pytest.raises(ValueError, match="frozen asks for"):
        tp.dope_(small(), 0.4)
    with pytest.raises(ValueError, match="neither"):
        tp.dope_(small(), 0.5, "heads")


DOPED = {
    "blocks": lambda model: tp.dope_(model, 0.5),
    "units": lambda model: tp.dope_(model, 0.75, "units"),
    "half": lambda model: tp.freeze_(model, [1]),
}


@pytest.mark.parametrize("kind", DOPED)
def test_frozen_weights_are_the_same_bits_after_training_and_the_others_are_not(kind):
    model = DOPED[kind](small())
    before = {name: p.clone() for name, p in model.named_parameters()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    fit(model, [tokens()], steps=3, lr=1e-2, progress=False)
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert frozen == same and frozen


def test_counts_of_doped_models():
    block = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert tp.counts(small()) == (2 * block, 2 * block)
    assert tp.counts(tp.dope_(small(), 0.5)) == (2 * block, 4 * block)
    units = 3 * 16 * 32
    assert tp.counts(tp.dope_(small(), 0.75, "units")) == (2 * block, 2 * block + 6 * units)
    assert tp.counts(tp.freeze_(small(), [0])) == (block, 2 * block)


def test_structured_layers_count_what_they_train_and_what_they_stand_for():
    dense = tp.counts(small())
    trained = {"hadamard": 2 * (2 * 16 * 2) + 2 * 32, "circulant": 2 * 2 * 16 + 32}
    trained["monarch"] = 2 * (4 * 4 * 4 + 4 * 8 * 4) + (4 * 8 * 8 + 4 * 4 * 8)
    for kind, expected in trained.items():
        count = tp.counts(tp.structured_(small(), kind))
        assert count.total == dense.total
        assert count.trainable == dense.total - 2 * 3 * 16 * 32 + 2 * expected


def test_frozen_blocks_stand_between_the_trained_ones_and_count():
    model = tp.dope_(small(), 0.5)
    frozen = [not next(b.parameters()).requires_grad for b in model.blocks]
    assert frozen == [False, True, False, True]
    text = tokens()
    whole = model(text)
    model.blocks = model.blocks[::2]
    assert not torch.allclose(whole, model(text))


def test_doped_units_add_up_with_the_trained_ones():
    model = tp.dope_(small(), 0.5, "units")
    layer, x = model.blocks[0].mlp, torch.randn(5, 16)
    torch.testing.assert_close(layer(x), layer.trained(x) + layer.frozen(x))
    assert layer.frozen.gate.out_features == 32


def test_training_flops_are_six_a_weight_when_all_are_trained():
    assert tp.training_flops(tp.Counts(10, 10), 7) == 6 * 10 * 7
    assert tp.training_flops(tp.Counts(10, 20), 1) == exercises._flops(10, 10, 1)


def test_forward_flops_by_hand():
    assert tp.forward_flops(torch.nn.Linear(3, 5, bias=False)) == 2 * 15
    assert tp.forward_flops(tp.Monarch(16, 8, blocks=2)) == 2 * (2 * 8 * 8 + 2 * 4 * 8)
    # two products of 8: 8 log2 8 additions twice, 8 products twice
    assert tp.forward_flops(tp.HDHD(7, 16)) == 2 * (2 * 24 + 2 * 8)
    # a transform of what comes in, one back for each of two products, 5 complex products each
    assert tp.forward_flops(tp.Circulant(8, 16)) == 2.5 * 24 * 3 + 2 * 6 * 5


def test_flops_of_a_token_are_those_of_the_counts_where_layers_are_dense():
    for change in (lambda m: m, lambda m: tp.dope_(m, 0.5), lambda m: tp.dope_(m, 0.5, "units")):
        model = change(study.build(0, 2, 32, None))
        assert tp.flops_of_a_token(model) == tp.training_flops(tp.counts(model), 1)
    monarch = tp.structured_(study.build(0, 2, 32, None), "monarch")
    count = tp.counts(monarch)
    assert tp.flops_of_a_token(monarch) == 6 * count.trainable < tp.training_flops(count, 1)


def test_the_study_matches_flops():
    doped = tp.training_flops(tp.Counts(1, 2), study.TOKENS)
    assert tp.training_flops(tp.Counts(1, 1), study.LONGER) == pytest.approx(doped, rel=0.005)
    model = study.build(0, *study.BASE[1:3], None)
    trained, head = tp.counts(model).trainable, model.embedding.weight.numel()
    both = tp.Counts(trained + head, 2 * trained + head)  # DOUBLED has as many frozen ones again
    once = tp.Counts(trained + head, trained + head)
    spent = tp.training_flops(both, study.TOKENS)
    assert tp.training_flops(once, study.EQUAL) == pytest.approx(spent, rel=0.002)


def test_the_study_has_six_doped_and_four_structured_models_each_tuned_on_two_seeds():
    assert (len(study.LADDER), len(study.DOPED), len(study.STRUCTURED)) == (6, 6, 4)
    assert len(set(study.KINDS)) == 16 and {kind[2] for kind in study.DOPED} == {32, 48}
    for kind in (*study.DOPED, *study.STRUCTURED, study.BASE, study.LADDER[3]):
        tried = [(p["seed"], p["lr"]) for p in study.TUNING if kind in p["kinds"]]
        assert len(tried) == len(set(tried)) == 6 and {seed for seed, _ in tried} == {100, 101}
        assert study.RATES[kind[2]] == sorted({lr for _, lr in tried})[1], "the middle one"


def test_structured_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = tp.structured_(transformers.LlamaForCausalLM(config), "monarch")
    assert model(tokens()).logits.shape == (4, 13, 50)
    assert tp.counts(model).trainable < tp.counts(model).total


def one_diagonal(ins, outs):
    trained, dense = exercises._count(ins, outs)
    return trained // 2, dense


def no_padding(ins, outs):
    return 2 * ins * -(-outs // ins), ins * outs


def one_product(ins, outs):
    return 2 * 2 ** int(np.ceil(np.log2(max(ins, 2)))), ins * outs


def counted(make, tokens, targets, frozen, rule):
    """The numbers of `freeze_half`, for other blocks frozen or other numbers called updated."""
    model = make()
    for block in frozen(model[1:-1]):
        block.requires_grad_(False)
    torch.nn.functional.cross_entropy(model(tokens), targets).backward()
    every = [*model.parameters()]
    trained = [p for p in every if p.requires_grad]
    return tuple(sum(p.numel() for p in ps) for ps in (every, trained)) + (rule(trained),)


def first_half(*given):
    return counted(*given, lambda blocks: blocks[: len(blocks) // 2], with_gradient)


def linear_alone(*given):
    def linear(blocks):
        return [part for part in blocks[1::2].modules() if isinstance(part, torch.nn.Linear)]

    return counted(*given, linear, with_gradient)


def with_gradient(trained):
    return sum(int((p.grad != 0).sum()) for p in trained)


def all_that_is_trained(*given):
    return counted(*given, lambda blocks: blocks[1::2], lambda ps: sum(p.numel() for p in ps))


def not_below_the_frozen(*given):
    return counted(*given, lambda blocks: blocks[1::2], lambda ps: with_gradient(ps[1:]))


def thawed(make, batches, share, choose, hold=True, again=False):
    """The numbers of `thaw`, with entries chosen otherwise or not held."""
    model = make()
    frozen = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad]
    places = [choose(p, share) for p in frozen]
    before = [p.detach().clone() for p in frozen]
    for p in frozen:
        p.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for tokens, targets in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens), targets).backward()
        for p, free in zip(frozen, places):
            p.grad *= free
        optimizer.step()
        for p, free, old in zip(frozen, places, before):
            if hold:
                p.data = torch.where(free, p.data, old)
        if again:
            places = [choose(p, share) for p in frozen]
            before = [p.detach().clone() for p in frozen]
    count = sum(p.numel() for p in trained) - sum(int((~free).sum()) for free in places)
    return count, model.state_dict()


def at_random(p, share):
    return (torch.randperm(p.numel()) < round(share * p.numel())).view_as(p)


def by_chance(p, share):
    return torch.rand_like(p) < share


def in_a_row(p, share):
    return (torch.arange(p.numel()) < round(share * p.numel())).view_as(p)


def masked_gradients_alone(*given):
    return thawed(*given, at_random, hold=False)


def about_a_tenth(*given):
    return thawed(*given, by_chance)


def the_first_tenth(*given):
    return thawed(*given, in_a_row)


def drawn_anew_each_step(*given):
    return thawed(*given, at_random, again=True)


def counts_the_thawed_alone(make, batches, share):
    count, weights = thawed(make, batches, share, at_random)
    return count - sum(p.numel() for p in make().parameters() if p.requires_grad), weights


def thaws_nothing(make, batches, share):
    return thawed(make, batches, share, lambda p, share: torch.zeros_like(p, dtype=torch.bool))


def all_six(trained, frozen, tokens):
    return 6 * (trained + frozen) * tokens


def not_back(trained, frozen, tokens):
    return (6 * trained + 2 * frozen) * tokens


def trained_only(trained, frozen, tokens):
    return 6 * trained * tokens


WRONG = {
    "count": [one_diagonal, no_padding, one_product],
    "freeze_half": [first_half, linear_alone, all_that_is_trained, not_below_the_frozen],
    "flops": [all_six, not_back, trained_only],
    "thaw": [
        masked_gradients_alone,
        about_a_tenth,
        the_first_tenth,
        drawn_anew_each_step,
        counts_the_thawed_alone,
        thaws_nothing,
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_a_mask_of_gradients_does_when_the_thawed_weights_have_no_decay():
    """Adam leaves alone what never had a gradient; so the check asks for no one way to do it."""

    def without_decay(make, batches, share):
        model = make()
        frozen = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad]
        others = [p for p in model.parameters() if p.requires_grad]
        free = [at_random(p, share) for p in frozen]
        for p, mask in zip(frozen, free):
            p.requires_grad_(True).register_hook(lambda g, mask=mask: g * mask)
        groups = [{"params": others}, {"params": frozen, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        for tokens, targets in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(tokens), targets).backward()
            optimizer.step()
        count = sum(p.numel() for p in others) + sum(int(mask.sum()) for mask in free)
        return count, model.state_dict()

    assert outcome(exercises.thaw, without_decay) == ("correct", "Correct.")


def test_the_checks_of_freezing_say_what_is_wrong():
    said = {
        first_half: "not the first half",
        linear_alone: "a block's norm, too",
        all_that_is_trained: "How many does this batch read?",
        not_below_the_frozen: "let gradients pass",
    }
    for answer, text in said.items():
        assert text in " ".join(outcome(exercises.freeze_half, answer)[1] for _ in range(9))
    said = {
        masked_gradients_alone: "weight decay",
        the_first_tenth: "draw them at random",
        drawn_anew_each_step: "choose once",
        counts_the_thawed_alone: "is trained still",
        thaws_nothing: "not",
    }
    for answer, text in said.items():
        assert text in outcome(exercises.thaw, answer)[1]
