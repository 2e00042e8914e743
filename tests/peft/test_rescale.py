import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, loads_again, merges, moved, same_under_a_cache

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    freeze_base_,
    merge_,
    n_trainable,
    remove_,
)
from lablib.peft.rescale import Rescaled, ia3_


def test_it_starts_as_the_base_merges_and_goes_without_a_trace(model):
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    ia3_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    changed = anatomy.logits(moved(model, 1.0), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    merges(model, before, changed)
    merge_(model)
    remove_(model)
    assert not adapters(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_saved_and_loaded_is_the_same(model, tmp_path):
    plain = copy.deepcopy(model)
    ia3_(model)
    changed = anatomy.logits(moved(model, 1.0), TOKENS)
    loads_again(model, plain, changed, tmp_path)


def test_a_bias_is_scaled_too_and_merges():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 6), torch.randn(3, 4)
    plain = layer(x)
    scaled = Rescaled(layer, "output", first=2)
    torch.nn.init.constant_(scaled.scale, 3.0)
    expected = torch.cat([plain[:, :2], 3 * plain[:, 2:]], 1)
    torch.testing.assert_close(scaled(x), expected)
    scaled.merge()
    torch.testing.assert_close(scaled(x), expected)
    torch.testing.assert_close(layer(x), expected)
    scaled.unmerge()
    assert torch.equal(layer(x), plain)


def test_one_over_another_merges_with_its_bias():
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    one = Rescaled(torch.nn.Linear(4, 6))
    two = Rescaled(one)
    for layer in (one, two):
        torch.nn.init.normal_(layer.scale)
    expected = two(x)
    one.merge()
    two.merge()
    torch.testing.assert_close(two(x), expected)
    two.unmerge()
    one.unmerge()
    assert torch.equal(two(x), expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_outputs_and_gradients_are_those_of_peft(family):
    peft = pytest.importorskip("peft")
    names, inner = {
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        "bert": (["key", "value", r"layer.\d.output.dense"], [r"layer.\d.output.dense"]),
    }[family]
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    if family == "bert":
        inner = list(anatomy.projections(model, "down"))
        names = [*anatomy.projections(model, "key", "value"), *inner]
    config = peft.IA3Config(target_modules=names, feedforward_modules=inner)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    ia3_(model)
    freeze_base_(model)
    vectors = {
        n.split("base_model.model.")[1]: m
        for n, m in theirs.named_modules()
        if hasattr(m, "ia3_l") and "base_model.model." in n
    }
    pairs = []
    for name, ours in adapters(model).items():
        other = vectors[name].ia3_l["default"]
        other.data.copy_(torch.randn_like(ours.scale).view_as(other))
        ours.scale.data.copy_(other.data.flatten())
        pairs.append((ours.scale, other))
    expected, mine = theirs(TOKENS).logits, anatomy.logits(model, TOKENS)
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad.flatten(), atol=1e-6, rtol=1e-5)
    assert n_trainable(model) == theirs.get_nb_trainable_parameters()[0]


def test_bfloat16_and_a_cache_go_with_it():
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    ia3_(model)
    moved(model)
    same_under_a_cache(model)


def test_another_side_is_refused():
    with pytest.raises(ValueError, match="'both' is none of output, input"):
        Rescaled(torch.nn.Linear(2, 2), "both")
