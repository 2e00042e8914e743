"""Lab 801: LayerDrop, the rules that prune, and the study's own small functions."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lablib.compression import layerdrop as ld
from lablib.exercises import layerdrop as exercises
from lablib.models import GPT, GPTConfig, anatomy
from lablib.studies import layerdrop as study
from lablib.training import fit, next_token_loss


def small_model(n_layers=4, **sizes):
    torch.manual_seed(0)
    sizes = {"dim": 16, "n_heads": 2, "ffn_dim": 24, "max_length": 32, "init_std": 0.2} | sizes
    return GPT(GPTConfig(vocab_size=27, n_layers=n_layers, **sizes))


def rows(n=3, length=9):
    return torch.randint(27, (n, length), generator=torch.Generator().manual_seed(1))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=27, num_hidden_layers=4, **sizes))


# Training.


def test_all_blocks_run_in_use_and_weights_keep_their_names():
    model = small_model()
    before, names = model(rows()), list(model.state_dict())
    ld.layerdrop_(model, 0.5).eval()
    torch.testing.assert_close(model(rows()), before, rtol=0, atol=0)
    assert list(model.state_dict()) == names


def test_each_block_stays_with_its_own_chance():
    blocks = ld.LayerDrop([nn.Identity() for _ in range(4)], [0.0, 0.2, 0.5, 1.0])
    share = np.mean([blocks.stays() for _ in range(4000)], 0)
    assert share[0] == 1 and share[3] == 0
    assert share[1:3] == pytest.approx([0.8, 0.5], abs=0.03)
    assert all(blocks.eval().stays())


def test_a_pass_runs_what_was_drawn_and_no_more():
    calls = []
    blocks = [nn.Identity() for _ in range(6)]
    for place, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, place=place: calls.append(place))
    drop, same = (ld.LayerDrop(blocks, 0.5, seed=3) for _ in range(2))
    for _ in range(20):
        calls.clear()
        for block in drop:
            block(torch.zeros(1))
        assert calls == [place for place, stays in enumerate(same.stays()) if stays]


def test_draws_depend_on_the_seed_alone():
    draws = [
        [ld.LayerDrop([nn.Identity()] * 8, 0.5, seed).stays() for _ in range(2)] for seed in (1, 2)
    ]
    assert draws[0][0] == draws[0][1] != draws[1][0]


@pytest.mark.parametrize("rate", [-0.1, 1.5, [0.1, 0.2, 0.3]])
def test_a_rate_is_a_chance_for_each_block(rate):
    with pytest.raises(ValueError, match="need a rate from 0 to 1 each"):
        ld.LayerDrop([nn.Identity(), nn.Identity()], rate)


def test_every_mask_is_the_model_of_the_kept_blocks():
    ours, theirs, touched = study.under_every_mask()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    assert touched == 0
    assert len(set(ours)) > len(ours) / 2


def test_a_mask_of_another_block_is_another_model():
    model = ld.layerdrop_(small_model(), 0.5)
    losses = []
    for mask in itertools.product((False, True), repeat=4):
        model.blocks.fixed = list(mask)
        losses.append(next_token_loss(model, rows()).item())
    assert len(set(losses)) == 16


def test_dropped_blocks_are_not_updated():
    model = ld.layerdrop_(small_model(), [0.0, 1.0, 0.0, 1.0])
    before = copy.deepcopy(model.state_dict())
    fit(model, [rows()], steps=3, lr=1e-2, progress=False)
    moved = {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert {name.split(".")[1] for name in moved if name.startswith("blocks.")} == {"0", "2"}


def test_it_works_on_transformers_models():
    model = llama()
    tokens = rows()
    whole = model(tokens).logits
    ld.layerdrop_(model, 0.9).eval()
    torch.testing.assert_close(model(tokens).logits, whole)
    model.model.layers.fixed = [True, False, True, False]
    some = model(tokens).logits
    model.model.layers.fixed = None
    with ld.only(model, [0, 2]):
        torch.testing.assert_close(model(tokens).logits, some)
    assert not torch.allclose(some, whole)


def test_copies_and_pickles_keep_rates_and_draws():
    blocks = ld.layerdrop_(small_model(), 0.3, seed=5).blocks
    blocks.stays()
    for again in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
        assert again.rates == blocks.rates
        assert again.stays() == copy.deepcopy(blocks).stays()


# Other groups.


def test_one_mask_for_each_group_and_all_tokens():
    torch.manual_seed(0)
    model = ld.structured_dropout_(small_model(n_heads=4), 0.5, "heads")
    seen = []
    layer = anatomy.projection(model, 2, "output")
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    model.train()(rows())
    heads = seen[0].unflatten(-1, (4, 4)).abs().sum((0, 1, 3))
    for _ in range(8):
        model(rows())
    gone = [(x.unflatten(-1, (4, 4)).abs().amax((0, 1, 3)) == 0).tolist() for x in seen]
    assert heads.shape == (4,) and len({tuple(g) for g in gone}) > 2
    for x, none in zip(seen, gone):
        alive = x.unflatten(-1, (4, 4)).abs().sum(-1)[..., ~torch.tensor(none)]
        assert (alive > 0).all()


@pytest.mark.parametrize("unit", ["block", "mlp", "heads"])
def test_nothing_is_dropped_in_use_and_something_in_training(unit):
    model = small_model()
    whole = model.eval()(rows())
    ld.structured_dropout_(model, 0.5, unit, seed=1)
    torch.testing.assert_close(model(rows()), whole, rtol=0, atol=0)
    assert not torch.allclose(model.train()(rows()), whole)


def test_a_dropped_mlp_is_a_block_without_it():
    model = ld.structured_dropout_(small_model(), 1.0, "mlp")
    without = small_model()
    for block in without.blocks:
        nn.init.zeros_(block.mlp.down.weight)
    torch.testing.assert_close(model(rows()), without(rows()))


def test_heads_of_transformers_models():
    model = ld.structured_dropout_(llama(), 1.0, "heads").train()
    without = llama()
    for layer in anatomy.projections(without, "output").values():
        nn.init.zeros_(layer.weight)
    torch.testing.assert_close(model(rows()).logits, without(rows()).logits)


def test_unknown_groups():
    with pytest.raises(ValueError, match="none of block, mlp, heads"):
        ld.structured_dropout_(small_model(), 0.5, "letters")


# Pruning.


def test_only_is_undone_also_after_an_error():
    model = small_model()
    whole = model.blocks
    with ld.only(model, [2, 0]):
        assert [*model.blocks] == [whole[0], whole[2]]
    with pytest.raises(IndexError), ld.only(model, [0]):
        model(torch.tensor([[99]]))
    assert model.blocks is whole
    with pytest.raises(IndexError), ld.only(model, [4]):
        pass


def test_a_pruned_copy_is_smaller_and_its_own():
    model = ld.layerdrop_(small_model(), 0.5)
    small = ld.pruned(model, [0, 3])
    a_block = sum(p.numel() for p in model.blocks[0].parameters())
    assert small.n_parameters() == model.n_parameters() - 2 * a_block
    with ld.only(model, [0, 3]):
        torch.testing.assert_close(model(rows()), small(rows()))
    with torch.no_grad():
        small.blocks[0].mlp.down.weight.zero_()
    assert model.blocks[0].mlp.down.weight.any()


@pytest.mark.parametrize(
    ("n_layers", "rate", "kept"),
    [
        (16, 0.5, [0, 2, 4, 6, 8, 10, 12, 14]),  # the README's flags
        (8, 0.25, [0, 1, 2, 4, 5, 6]),
        (6, 0.4, [0, 2, 4]),
        (3, 0.2, [0, 1, 2]),
        (8, 0.75, []),
    ],
)
def test_every_other(n_layers, rate, kept):
    assert ld.every_other(n_layers, rate) == kept
    assert exercises.stays.reference(n_layers, rate) == kept


@pytest.mark.parametrize("rate", [0, -1, 1.1])
def test_every_other_needs_a_rate(rate):
    with pytest.raises(ValueError, match="not above 0 and at most 1"):
        ld.every_other(8, rate)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data())
def test_evenly_spread(n, data):
    k = data.draw(st.integers(1, n))
    kept = ld.evenly(n, k)
    assert len(set(kept)) == k and kept[0] == 0 and kept[-1] < n
    gaps = np.diff([*kept, n])
    assert gaps.max() - gaps.min() <= 1
    if n % 4 == 0:
        assert ld.evenly(n, n // 2) == ld.every_other(n, 0.5)
        assert ld.evenly(n, 3 * n // 4) == ld.every_other(n, 0.25)


def test_the_optimal_rate_has_the_wanted_depth():
    blocks = ld.LayerDrop([nn.Identity()] * 8, ld.optimal_rate(3, 8))
    assert np.mean([sum(blocks.stays()) for _ in range(4000)]) == pytest.approx(3, abs=0.1)


def test_all_losses_are_those_of_each_subset():
    model = ld.layerdrop_(small_model(), 0.5)
    found = ld.all_losses(model, rows())
    for mask in itertools.product((False, True), repeat=4):
        keep = [place for place in range(4) if mask[place]]
        with ld.only(model, keep):
            expected = next_token_loss(model.eval(), rows()).item()
        assert found[ld.index_of(keep)].item() == pytest.approx(expected, abs=1e-5)
        assert ld.loss_of(model, keep, rows()) == pytest.approx(expected, abs=1e-5)
    model.train()
    torch.testing.assert_close(ld.all_losses(model, rows()), found)
    assert model.training


def test_the_search_finds_the_best_of_all_subsets():
    model = small_model(6)
    losses = ld.all_losses(model, rows())
    keep, loss = ld.search_on_valid(model, 3, rows())
    every = {k: losses[ld.index_of(k)].item() for k in itertools.combinations(range(6), 3)}
    assert tuple(keep) == min(every, key=every.get)
    assert loss == pytest.approx(min(every.values()), abs=1e-5)
    assert study.best_of(losses, 6, 3) == keep


def test_the_beam_goes_on_where_all_subsets_are_too_many():
    model = small_model(6)
    best = ld.search_on_valid(model, 3, rows())
    wide = ld.search_on_valid(model, 3, rows(), most=1, beam=30)
    narrow = ld.search_on_valid(model, 3, rows(), most=1, beam=1)
    assert wide[0] == best[0] and wide[1] == pytest.approx(best[1])
    assert len(narrow[0]) == 3 and narrow[1] >= best[1] - 1e-6


# The paper's figures.


def test_parameters_of_the_papers_model():
    layer = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert layer == 12_596_224
    sizes = {n: sum(p.numel() for p in ld.wikitext103_model(n).parameters()) for n in (8, 16)}
    assert sizes[16] == ld.published("parameters of 16 layers") == 246_933_504
    assert sizes[8] == ld.published("parameters of 8 layers") == sizes[16] - 8 * layer


def test_published_perplexities():
    with_it = ld.published("perplexity of 16 layers with LayerDrop")
    assert with_it < ld.published("perplexity of 16 layers")
    finetuned = ld.published("perplexity pruned to 8 layers and finetuned")
    assert finetuned < ld.published("perplexity pruned to 8 layers")


# The study.


def test_training_text_is_another_part_for_each_seed_and_never_held_out():
    parts = [study.texts(seed, 2000, 16) for seed in (0, 1)]
    assert not torch.equal(parts[0][0], parts[1][0])
    assert torch.equal(parts[0][1], parts[1][1])
    train, held_out = study.plays()
    for part, test, valid in parts:
        assert part.shape == (2000,) and test.shape == (16, 65) and valid.shape == (4, 65)
    assert len(held_out) > 20 * 256 * 4 and len(train) > 8 * len(held_out)


def test_pruned_losses_agree_with_each_other():
    made = study.run(seed=200, steps=2, letters=4000, rows=8)
    assert made["four"] == made["even"][3] and made["two"] == made["even"][1]
    assert made["first_four"] == made["first"][3] and made["found"] == made["found_each"][3]
    assert made["whole"] == made["even"][-1] == made["first"][-1] == made["found_each"][-1]
    assert len(made["cloud"]) == 256 and len(made["found_keep"]) == 4
    shallow = study.run(seed=200, rate=0.0, n_layers=4, steps=2, letters=4000, rows=8)
    assert shallow["four"] == shallow["whole"]


def test_rising_rates():
    model = study.build(0, 8, 0.2, rising=True)
    assert model.blocks.rates == pytest.approx(exercises.rising.reference(8, 0.2))
    assert np.mean(model.blocks.rates) == pytest.approx(0.2)


def test_a_pretrained_model_goes_on_with_layerdrop():
    made = study.run(seed=200, model="tiny-1m", steps=2, lr=1e-3, rows=2)
    assert made["even_before"] > made["whole_before"]
    assert all(made[f"{key}_after"] != made[f"{key}_before"] for key in ("whole", "even", "least"))


# Exercises.


def counted_from_zero(n_layers, rate):
    return [place for place in range(n_layers) if place % math.floor(1 / rate)]


def what_goes(n_layers, rate):
    return [d - 1 for d in range(1, n_layers + 1) if d % math.floor(1 / rate) == 0]


def one_way(k, n_layers, rate, steps):
    return steps * (1 - rate) ** k * rate ** (n_layers - k)


def rate_of_staying(k, n_layers, rate, steps):
    return steps * math.comb(n_layers, k) * rate**k * (1 - rate) ** (n_layers - k)


def half_the_mean(n_layers, rate):
    return [rate * place / (n_layers - 1) for place in range(n_layers)]


def from_the_first(n_layers, rate):
    return [2 * rate * (place + 1) / n_layers for place in range(n_layers)]


WRONG = {
    "stays": [counted_from_zero, what_goes],
    "steps_with": [one_way, rate_of_staying],
    "rising": [half_the_mean, from_the_first],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_how_often_k_blocks_run():
    blocks = ld.LayerDrop([nn.Identity()] * 8, 0.3)
    counts = np.bincount([sum(blocks.stays()) for _ in range(5000)], minlength=9)
    expected = [exercises.steps_with.reference(k, 8, 0.3, 5000) for k in range(9)]
    assert counts == pytest.approx(expected, abs=150) and sum(expected) == pytest.approx(5000)


def test_models_of_a_text_of_the_readers(tmp_path):
    text = tmp_path / "wiki.train.raw"
    text.write_text(" ".join(f"the {n} cats sat on mat {n * n}" for n in range(700)), "utf-8")
    found = study.on_words(text, steps=20, dim=32, n_layers=4, batch=2)
    assert list(found) == ["usual", "LayerDrop"] and all(len(own) == 2 for own in found.values())
    assert all(4 < loss < 20 for own in found.values() for loss in own)
    assert found["usual"] != found["LayerDrop"]


# Rates that are learned.


def test_learned_rates_have_the_mean_that_was_asked_and_the_best_stay():
    torch.manual_seed(0)
    learned, added = ld.DataDrivenRates(5, 6, 0.3), torch.randn(5, 6)
    rates, shares = learned(added), learned.shares(added)
    assert rates.mean().item() == pytest.approx(0.3) and rates.min() >= 0 and rates.max() <= 1
    assert torch.equal(rates.argsort(), shares.argsort(descending=True))
    assert learned.keep(added, 2) == sorted(shares.argsort(descending=True)[:2].tolist())
    blocks = ld.LayerDrop([nn.Identity() for _ in range(5)], rates.tolist())
    assert blocks.rates == pytest.approx(rates.tolist())
    with pytest.raises(ValueError, match="up to 0.8"):
        ld.DataDrivenRates(5, 6, 0.9)


def test_a_block_that_helps_is_left_out_less_often():
    """Of two blocks one adds what is wanted and one the opposite; the first's rate falls."""
    torch.manual_seed(0)
    learned, added = ld.DataDrivenRates(2, 3, 0.4), torch.eye(2, 3)
    optimizer = torch.optim.Adam(learned.parameters(), 0.05)
    before = learned(added)[0].item()
    for _ in range(30):
        x, rates = torch.zeros(3), learned(added)
        for sign, rate in zip((1.0, -1.0), rates):
            x = ld.gated(x, x + sign, rate)
        torch.testing.assert_close(x, torch.zeros(3), atol=1e-6, rtol=0)  # as without rates
        (x - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert learned(added)[0].item() < before - 0.1
