import copy

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, TOKENS, beside_peft, learns_alone
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    load_adapter,
    merge_,
    n_trainable,
    remove_,
    save_adapter,
    trainable,
)
from lablib.peft.bottleneck import houlsby_
from lablib.peft.lora import lora_
from lablib.peft.prefix import drop_mlp_, prefix_, prompt_

VERBS = {
    "prefix": lambda model: prefix_(model, 3, std=0.5),
    "mlp": lambda model: prefix_(model, 3, mlp=5),
    "prompt": lambda model: prompt_(model, 3),
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_changes_the_base_and_leaves_nothing(model, verb, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    VERBS[verb](model)
    learns_alone(model)
    changed = anatomy.logits(model, TOKENS)
    assert changed.shape == before.shape and (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(1.0)
    moved = anatomy.logits(model, TOKENS)
    assert torch.equal(anatomy.logits(copied, TOKENS), changed) and not moved.equal(changed)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(plain, tmp_path / "a.safetensors")
    assert torch.equal(anatomy.logits(plain, TOKENS), moved)
    with pytest.raises(ValueError, match="can't be merged"):
        merge_(model)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize("verb", VERBS)
def test_a_second_one_is_refused(model, verb):
    VERBS[verb](model)
    with pytest.raises(ValueError, match="already"):
        VERBS[verb](model)


@pytest.mark.parametrize("verb", VERBS)
def test_t5_is_refused(verb):
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    model = hf.T5EncoderModel(hf.T5Config(num_layers=2, **sizes))
    with pytest.raises(ValueError, match="T5"):
        VERBS[verb](model)
    assert not adapters(model)


@pytest.mark.parametrize("verb", VERBS)
def test_our_cache_holds_them_once(verb):
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    VERBS[verb](model)
    whole, cache = model(TOKENS), model.new_cache(16)
    parts = [model(TOKENS[:, a:b], cache) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert cache[0].length == 7 + (3 if verb == "prompt" else 0)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_generates_with_them(family, verb):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    VERBS[verb](model)
    made = model.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    tokens = TOKENS
    for _ in range(4):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    assert torch.equal(made, tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("verb", VERBS)
def test_padding_changes_nothing(verb, attention):
    for family in ("llama", "bert"):
        torch.manual_seed(0)
        model = MODELS[family]().eval()
        model.set_attn_implementation(attention)
        VERBS[verb](model)
        mask = torch.ones_like(TOKENS)
        mask[:, 5:] = 0
        padded = model(TOKENS, attention_mask=mask).logits[:, :5]
        torch.testing.assert_close(padded, model(TOKENS[:, :5]).logits, atol=1e-5, rtol=1e-5)


def test_bert_attends_to_the_rows_as_if_concatenated():
    torch.manual_seed(0)
    model = MODELS["bert"]().eval()
    prefix_(model, 3, std=0.5)
    name, prefix = next((n, a) for n, a in adapters(model).items())
    attention = model.get_submodule(name.rpartition(".")[0])
    seen = {}
    attention.register_forward_hook(_keep(seen), with_kwargs=True)
    anatomy.logits(model, TOKENS)
    x, (keys, values) = seen["x"], prefix.rows()
    with torch.no_grad():
        q, k, v = (_heads(getattr(attention, n)(x)) for n in ("query", "key", "value"))
        k = torch.cat([_heads(keys.expand(2, -1, -1)), k], 2)
        v = torch.cat([_heads(values.expand(2, -1, -1)), v], 2)
        weight = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
        by_hand = (weight @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["output"], by_hand, atol=1e-5, rtol=1e-5)


def _heads(x):
    return x.unflatten(2, (4, 8)).transpose(1, 2)


def _keep(seen):
    def hook(module, args, kwargs, output):
        seen["x"] = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        seen["output"] = output[0] if isinstance(output, tuple) else output

    return hook


@pytest.mark.parametrize("mlp", [None, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_prefix_is_that_of_peft(family, mlp):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    bert = hf.BertModel(hf.BertConfig(**SIZES))
    model = (bert if family == "bert" else MODELS[family]()).eval()
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION" if family == "bert" else "CAUSAL_LM", num_virtual_tokens=3,
        prefix_projection=mlp is not None, encoder_hidden_size=mlp,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    prefix_(model, 3, mlp=mlp, std=0.5)
    freeze_base_(model)
    pairs = _copied(model, theirs, mlp)
    # peft moves the text behind its rows, and takes positions of a decoder; ours starts at 0
    places = torch.arange(7).expand(2, -1)
    if family == "bert":
        expected, mine = theirs(input_ids=TOKENS)[0], model(TOKENS, position_ids=places + 3)[0]
    else:
        expected, mine = theirs(TOKENS, position_ids=places - 3).logits, model(TOKENS).logits
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for one, other in pairs:
        torch.testing.assert_close(one(), other(), atol=1e-6, rtol=1e-5)
    assert n_trainable(model) == theirs.get_nb_trainable_parameters()[0]


def _copied(model, theirs, mlp):
    """Give ours peft's values; pairs of functions that return ours and their gradient."""
    encoder = theirs.prompt_encoder["default"]
    if mlp is None:
        names = list(trainable(model))  # keys and values a block, in peft's order
        width = encoder.embedding.weight.shape[1] // len(names)
        parts = [slice(i * width, (i + 1) * width) for i in range(len(names))]
        for name, part in zip(names, parts, strict=True):
            trainable(model)[name].data.copy_(encoder.embedding.weight[:, part])
        return [
            (
                lambda name=name: trainable(model)[name].grad,
                lambda part=part: encoder.embedding.weight.grad[:, part],
            )
            for name, part in zip(names, parts, strict=True)
        ]
    source = model.prefix_mlp
    same = [
        (source.table, encoder.embedding.weight),
        (source.inner.weight, encoder.transform[0].weight),
        (source.inner.bias, encoder.transform[0].bias),
        (source.outer.weight, encoder.transform[2].weight),
        (source.outer.bias, encoder.transform[2].bias),
    ]
    for one, other in same:
        one.data.copy_(other.data)
    return [(lambda o=one: o.grad, lambda o=other: o.grad) for one, other in same]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_prompts_are_those_of_peft(family):
    peft = pytest.importorskip("peft")
    model, task = beside_peft(family)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    prompt_(model, 3)
    freeze_base_(model)
    rows = next(iter(trainable(model).values()))
    rows.data.normal_()
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(rows.data)
    expected, mine = theirs(TOKENS).logits[:, 3:], model(TOKENS).logits
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    mine.square().mean().backward()
    expected.square().mean().backward()
    theirs_grad = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(rows.grad, theirs_grad, atol=1e-6, rtol=1e-5)
    assert n_trainable(model) == 3 * 32


def test_dropping_the_mlp_keeps_the_outputs_and_saves_less(model, tmp_path):
    plain = copy.deepcopy(model)
    prefix_(model, 3, mlp=500)
    with_mlp, size = anatomy.logits(model, TOKENS), n_trainable(model)
    drop_mlp_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), with_mlp, atol=1e-6, rtol=1e-6)
    assert n_trainable(model) < size / 50
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(plain, tmp_path / "a.safetensors")
    torch.testing.assert_close(anatomy.logits(plain, TOKENS), with_mlp, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="no prefix with an MLP"):
        drop_mlp_(model)


def test_it_goes_with_lora_and_bfloat16():
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    prefix_(model, 3, std=0.5)
    lora_(model, ["query", "value"], rank=2)
    assert model(TOKENS).dtype == torch.bfloat16
    assert {type(a).__name__ for a in adapters(model).values()} == {"LoRALinear", "Prefix"}
    freeze_base_(model)
    F.cross_entropy(model(TOKENS).flatten(0, 1).float(), TOKENS.flatten()).backward()
    assert all(p.grad is not None for p in trainable(model).values())
    remove_(model)
    assert not adapters(model)


@pytest.mark.parametrize("verb", VERBS)
def test_it_goes_with_adapters_of_sublayers_in_either_order(model, verb):
    before, changed = anatomy.logits(model, TOKENS), []
    adapters_ = [VERBS[verb], lambda model: houlsby_(model, 3)]
    for order in (adapters_, adapters_[::-1]):
        for put_ in order:
            put_(model)
        freeze_base_(model)
        anatomy.logits(model, TOKENS).square().mean().backward()
        changed.append([p.grad is not None for p in trainable(model).values()])
        remove_(model)
    assert all(map(all, changed)) and torch.equal(anatomy.logits(model, TOKENS), before)


def test_all_blocks_share_one_mlp_and_its_gradient():
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    prefix_(model, 3, mlp=5)
    model(TOKENS).square().mean().backward()
    halves = model.prefix_mlp.outer.weight.grad.abs().sum(1).view(2, -1)
    assert (halves.sum(1) > 0).all()
