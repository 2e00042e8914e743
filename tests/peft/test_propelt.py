import copy
import math

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, TOKENS, learns_alone, moved, same_under_a_cache
from safetensors.torch import load_file

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    fold_,
    load_adapter,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
    unmerge_,
)
from lablib.peft.bottleneck import pfeiffer_
from lablib.peft.lora import lora_
from lablib.peft.prefix import prefix_
from lablib.peft.propelt import (
    Mask,
    freeze_masks_,
    masks,
    packed,
    propelt_adapter_,
    propelt_lora_,
    propelt_prefix_,
    storage_bits,
    unpacked,
)


def roles(model):
    return ["query_key_value"] if hasattr(model, "transformer") else ["query", "value"]


def lora(model, **options):
    propelt_lora_(model, roles(model), 3, 6, **{"keep": 0.5} | options)


VERBS = {
    "adapter": lambda model, **o: propelt_adapter_(model, 3, **o),
    "lora": lora,
    "prefix": lambda model, **o: propelt_prefix_(model, 4, **{"keep": 0.5, "std": 0.5} | o),
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_trains_saves_and_leaves_nothing(model, verb, tmp_path):
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    VERBS[verb](model)
    learns_alone(model)
    changed = anatomy.logits(moved(model, 0.3), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(copy.deepcopy(model), TOKENS), changed)
    save_adapter(model, tmp_path / "scores.safetensors")
    load_adapter(plain, tmp_path / "scores.safetensors")
    assert torch.equal(anatomy.logits(plain, TOKENS), changed)
    freeze_masks_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)
    save_adapter(model, tmp_path / "bits.safetensors")
    load_adapter(again, tmp_path / "bits.safetensors")
    assert torch.equal(anatomy.logits(again, TOKENS), changed)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_lora_and_a_zero_adapter_start_as_the_base(model):
    before = anatomy.logits(model, TOKENS)
    lora(model)
    propelt_adapter_(model, 3, start="lora")
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)


def test_the_papers_adapter_starts_near_the_base_and_its_prefix_does_not(model):
    before = anatomy.logits(model, TOKENS)
    propelt_adapter_(model, 3)
    difference = (anatomy.logits(model, TOKENS) - before).abs().max()
    assert 0 < difference < 0.1 * before.abs().max()
    remove_(model)
    propelt_prefix_(model, 4)
    assert (anatomy.logits(model, TOKENS) - before).abs().max() > 1e-3


def test_lora_merges_and_folds_and_the_others_do_not(model):
    lora(model)
    changed = anatomy.logits(moved(model, 0.3), TOKENS)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)
    fold_(model)
    assert not adapters(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    for verb in ("adapter", "prefix"):
        VERBS[verb](model)
        with pytest.raises(ValueError, match="can't be merged"):
            merge_(model)
        remove_(model)


def _masked_copies(model):
    """Each place -> the prototype's tensors times this place's masks."""
    pairs = {"down": "down_mask", "up": "up_mask", "keys": "keys_mask", "values": "values_mask"}
    copies = {}
    for place, adapter in adapters(model).items():
        (prototype,) = adapter.shared
        for name, mask in pairs.items():
            if hasattr(adapter, mask):
                part = getattr(prototype, name)
                weight = getattr(part, "weight", part)
                copies[f"{place}.{name}"] = weight * getattr(adapter, mask)()
                if hasattr(part, "bias"):
                    copies[f"{place}.{name}.bias"] = part.bias
    return copies


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_a_method_of_its_own_in_each_block_with_masked_copies(model, verb):
    plain = copy.deepcopy(model)
    VERBS[verb](moved(model))
    moved(model, 0.3)
    unshared = {
        "adapter": lambda model: pfeiffer_(model, 3),
        "lora": lambda model: lora_(model, roles(model), 3, 6),
        "prefix": lambda model: prefix_(model, 4),
    }
    unshared[verb](plain)
    copies = _masked_copies(model)
    with torch.no_grad():
        for name, parameter in trainable(plain).items():
            parameter.copy_(copies[name.removesuffix(".weight")])
    torch.testing.assert_close(anatomy.logits(model, TOKENS), anatomy.logits(plain, TOKENS))
    different = [m().flatten().tolist() for m in masks(model)]
    assert len({tuple(m) for m in different}) == len(different)  # every block has masks of its own


@pytest.mark.parametrize("verb", VERBS)
def test_gradients_are_straight_through(verb):
    """d/d|s| is the gradient of what is masked times the prototype; the prototype's sums blocks."""
    torch.manual_seed(0)
    model = MODELS["bert"]().eval()
    VERBS[verb](model)
    moved(model, 0.3)
    seen = []
    for mask in masks(model):
        mask.register_forward_hook(lambda m, args, out: seen.append((m, out)) or out.retain_grad())
    anatomy.logits(model, TOKENS).square().mean().backward()
    assert len(seen) == len(list(masks(model)))
    for mask, out in seen:
        torch.testing.assert_close(mask.scores.grad, out.grad * mask.scores.sign())
    prototype = next(iter(adapters(model).values())).shared[0]
    assert all(p.grad.abs().max() > 0 for p in prototype.parameters())


def test_a_mask_keeps_the_largest_scores_in_size():
    torch.manual_seed(0)
    for keep, n_ones in ((0.5, 10), (0.1, 2), (0.33, 7), (1.0, 20)):
        mask = Mask((4, 5), keep)
        made = mask()
        assert mask.n_ones == n_ones == made.sum() and set(made.flatten().tolist()) <= {0.0, 1.0}
        size = mask.scores.abs()
        assert size[made > 0.5].min() >= size[made < 0.5].max() if keep < 1 else made.all()
    with pytest.raises(ValueError, match="a share of 0 is not above 0"):
        Mask((4, 5), 0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 7), (2, 3, 4)])
def test_bits_are_packed_and_unpacked(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    bits = packed(mask)
    assert bits.dtype == torch.uint8 and len(bits) == math.ceil(mask.numel() / 8)
    by_hand = sum(2**i * int(v) for i, v in enumerate(mask.flatten().tolist()[:8]))
    assert bits[0] == by_hand
    assert torch.equal(unpacked(bits, shape), mask.float())


@pytest.mark.parametrize("verb", VERBS)
def test_the_file_holds_what_is_counted(verb, tmp_path):
    """One prototype in float32 and a bit for each entry of the masks."""
    torch.manual_seed(0)
    model = MODELS["gpt"]()
    VERBS[verb](model)
    count = storage_bits(model)
    scores = sum(m.scores.numel() for m in masks(model))
    assert count["masks"] == scores and count["prototype"] == 32 * (n_trainable(model) - scores)
    assert storage_bits(model, 16)["prototype"] * 2 == count["prototype"]
    freeze_masks_(model)
    assert storage_bits(model) == count and 32 * n_trainable(model) == count["prototype"]
    save_adapter(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors").values()
    spare = 8 * len(list(masks(model)))  # a mask ends on a whole byte
    held = 8 * sum(t.numel() * t.element_size() for t in tensors)
    assert count["total"] <= held < count["total"] + spare


def test_the_share_of_roberta_base():
    """What must be kept, what trains, and what trains with a head: the last one is 1.5 %."""
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        model = hf.RobertaForSequenceClassification(config)
    total = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.classifier.parameters())
    assert (total, head) == (124_647_170, 592_130)
    propelt_adapter_(model)
    prototype, scores = 2 * 64 * 768 + 64 + 768, 12 * 2 * 64 * 768
    assert storage_bits(model) == {
        "prototype": 32 * prototype,
        "masks": scores,
        "total": 32 * prototype + scores,
    }
    assert round(100 * storage_bits(model)["total"] / (32 * total), 2) == 0.11
    assert n_trainable(model) == prototype + scores
    assert round(100 * n_trainable(model) / total, 2) == 1.03
    assert round(100 * (n_trainable(model) + head) / total, 2) == 1.50


@pytest.mark.parametrize("verb", VERBS)
def test_bfloat16_and_a_cache_go_with_it(verb):
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    VERBS[verb](model)
    moved(model)
    whole = same_under_a_cache(model)
    freeze_masks_(model)
    assert torch.equal(model(TOKENS), whole)


def test_a_second_prefix_and_wrong_names_are_said():
    model = MODELS["gpt"]()
    propelt_prefix_(model, 2)
    with pytest.raises(ValueError, match="has a prefix already"):
        propelt_prefix_(model, 2)
    with pytest.raises(ValueError, match="'zero' is none of lora, bert"):
        propelt_adapter_(model, 2, start="zero")
    with pytest.raises(ValueError, match="no projection 'value'"):
        propelt_lora_(MODELS["gpt2"](), ["value"])
