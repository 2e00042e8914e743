import copy

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, TOKENS, merges, moved, same_under_a_cache

from lablib.models import anatomy, to_hf
from lablib.peft.adapter import (
    adapters,
    base_hash,
    disabled,
    fold_,
    freeze_base_,
    load_adapter,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
    unmerge_,
)
from lablib.peft.lora import LoRALinear, lora_


def test_it_starts_as_the_base_and_only_it_trains(model):
    before = anatomy.logits(model, TOKENS)
    n_matrices = len(anatomy.projections(model))
    lora_(model, rank=2)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)
    freeze_base_(model)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking == set(trainable(model)) and len(asking) == 2 * n_matrices
    assert n_trainable(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_merged_is_the_same_and_unmerged_and_removed_are_exact(model):
    before = anatomy.logits(model, TOKENS)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    lora_(model, rank=2, alpha=8)
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    merges(model, before, changed)
    merge_(model)
    remove_(model)
    assert not adapters(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_disabled_is_the_base_bit_for_bit(model):
    before = anatomy.logits(model, TOKENS)
    lora_(model, ["output"], rank=2)
    changed = anatomy.logits(moved(model), TOKENS)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)


def test_one_over_another_merges_and_folds(model):
    lora_(model, ["output"], rank=2)
    lora_(model, ["output", "up"], rank=3, alpha=9)
    changed = anatomy.logits(moved(model), TOKENS)
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)
    fold_(model)
    assert not adapters(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_is_the_same_and_another_base_is_refused(model, tmp_path):
    plain = copy.deepcopy(model)
    lora_(model, ["output", "down"], rank=2, alpha=4)
    changed = anatomy.logits(moved(model), TOKENS)
    save_adapter(model, tmp_path / "a.safetensors")
    other = copy.deepcopy(plain)
    load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(anatomy.logits(other, TOKENS), changed)
    with torch.no_grad():
        next(iter(plain.parameters())).view(-1)[0] += 1
    with pytest.raises(ValueError, match=r"a.safetensors belongs to a base"):
        load_adapter(plain, tmp_path / "a.safetensors")
    merge_(model)
    with pytest.raises(ValueError, match="unmerge_"):
        save_adapter(model, tmp_path / "b.safetensors")


def test_the_hash_is_of_the_base_alone(model):
    before = base_hash(model)
    lora_(model, ["output"], rank=2)
    lora_(model, ["output"], rank=2)
    assert base_hash(moved(model)) == before


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("family", ["ours", "llama", "bert", "gpt2"])
def test_outputs_and_gradients_are_those_of_peft(family, stabilized, tmp_path):
    peft = pytest.importorskip("peft")
    names, roles = _peft_names(family)
    torch.manual_seed(0)
    model = MODELS["gpt" if family == "ours" else family]().eval()
    if family == "ours":
        to_hf(model, tmp_path)
        theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        theirs = copy.deepcopy(model)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, use_rslora=stabilized)
    theirs = peft.get_peft_model(theirs, config).eval()
    lora_(model, roles, rank=3, alpha=6, stabilized=stabilized)
    freeze_base_(model)
    pairs = _same_parameters(model, theirs)
    expected, mine = theirs(TOKENS).logits, anatomy.logits(model, TOKENS)
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)
    assert n_trainable(model) == theirs.get_nb_trainable_parameters()[0]


def _peft_names(family):
    if family == "gpt2":
        return ["c_attn", "c_fc"], ["query_key_value", "up"]
    if family == "bert":
        return ["query", "intermediate.dense"], ["query", "up"]
    return ["q_proj", "down_proj"], ["query", "down"]


def _same_parameters(model, theirs):
    torch.manual_seed(1)
    found = [m for m in model.modules() if isinstance(m, LoRALinear)]
    others = [m for m in theirs.modules() if hasattr(m, "lora_A")]
    pairs = []
    for ours, their in zip(found, others, strict=True):
        for mine, other in ((ours.down, their.lora_A), (ours.up, their.lora_B)):
            values = torch.randn(mine.shape)
            mine.data.copy_(values)
            other["default"].weight.data.copy_(values)
            pairs.append((mine, other["default"].weight))
    return pairs


def test_bfloat16_and_a_cache_go_with_it():
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    lora_(model, rank=2)
    moved(model)
    same_under_a_cache(model)


def test_dropout_is_of_the_change_alone_and_only_in_training():
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(16, 8), 2, dropout=0.5)
    layer.up.data.normal_()
    x = torch.randn(4, 16)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    layer.up.data.zero_()
    assert torch.equal(layer(x), layer.base(x))


def test_a_rank_that_is_too_large_is_said():
    with pytest.raises(ValueError, match="rank 17 is not 1 to 16"):
        LoRALinear(torch.nn.Linear(16, 32), 17)
