import copy
import functools
import gc
import math

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, TOKENS, learns_alone, loads_again, moved

from lablib.models import GPT, GPTConfig, anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    matrix,
    merge_,
    n_trainable,
    remove_,
    trainable,
)
from lablib.peft.lora import lora_
from lablib.peft.measure import account
from lablib.peft.side import side_


@pytest.mark.parametrize("added", [False, True])
def test_it_trains_saves_and_leaves_nothing(model, added, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    side_(model, 2, added=added)
    learns_alone(model)
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(copy.deepcopy(model), TOKENS), changed)
    loads_again(model, plain, changed, tmp_path)
    with pytest.raises(ValueError, match="can't be merged"):
        merge_(model)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not hasattr(model, "side")


def test_added_starts_as_the_base_and_the_papers_form_does_not(model):
    before = anatomy.logits(model, TOKENS)
    side_(model, 2, added=True)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    remove_(model)
    side_(model, 2)
    assert (anatomy.logits(model, TOKENS) - before).abs().max() > 1e-3


def _last(model):
    names = anatomy.family(model)
    return anatomy.final_norm(model) if names.final_norm else anatomy.blocks(model)[-1]


@pytest.mark.parametrize("added", [False, True])
def test_outputs_are_those_of_the_equations(model, added):
    """Block by block, from what the base's blocks read and give."""
    calls, read = [], {}
    for block in anatomy.blocks(model):
        block.register_forward_hook(
            lambda m, args, kwargs, h: calls.append((args, kwargs, h)), with_kwargs=True
        )
    _last(model).register_forward_hook(lambda m, args, z: read.update(base=z))
    side_(model, 2, added=added)
    _last(model).register_forward_hook(lambda m, args, z: read.update(side=z))
    anatomy.logits(moved(model, 0.3), TOKENS)
    side = model.side
    s = calls[0][0][0] @ side.first.weight.T + side.first.bias
    for rung, ((_, *args), kwargs, h) in zip(side.rungs, calls, strict=True):
        mu = 1 / (1 + math.exp(-rung.alpha.item() / 0.1))
        mixed = mu * s + (1 - mu) * (h @ rung.down.weight.T + rung.down.bias)
        args = [a if isinstance(a, (tuple, torch.Tensor)) else None for a in args]  # no caches
        kwargs = {k: v for k, v in kwargs.items() if k != "past_key_values"}
        s = rung.block(mixed, *args, **kwargs)
    normed = side.norm.weight * s / (s.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    result = normed @ side.up.weight.T + side.up.bias
    wanted = read["base"] + result if added else result
    torch.testing.assert_close(read["side"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("family", ["gpt", "gpt2", "bert"])  # Llama's norms know float32 alone
def test_gradients_are_those_of_finite_differences(family, added):
    torch.manual_seed(0)
    model = MODELS[family]().eval().double()
    side_(model, 2, added=added)
    freeze_base_(moved(model, 0.3))

    def loss():
        return anatomy.logits(model, TOKENS).square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainable(model).items():
        flat, slope = parameter.data.view(-1), parameter.grad.view(-1)
        for place in torch.randint(len(flat), (2,), generator=generator).tolist():
            above, below = (_moved_by(flat, place, by, loss) for by in (1e-5, -1e-5))
            expected = (above - below) / 2e-5
            torch.testing.assert_close(slope[place], expected, atol=1e-8, rtol=1e-4, msg=name)


@torch.no_grad()
def _moved_by(flat, place, by, loss):
    """The loss with one number moved."""
    before = flat[place].clone()
    flat[place] += by
    moved_loss = loss()
    flat[place] = before
    return moved_loss


def test_no_gradient_enters_the_base_even_where_it_asks_for_one(model):
    side_(model, 2)
    anatomy.logits(moved(model), TOKENS).square().mean().backward()
    names = anatomy.family(model)
    below = [n for n, _ in model.named_parameters() if n.startswith(f"{names.blocks}.")]
    assert below and all(model.get_parameter(n).grad is None for n in below)
    assert all(p.grad.abs().sum() > 0 for n, p in trainable(model).items() if "key.bias" not in n)


@pytest.mark.parametrize("added", [False, True])
def test_nothing_of_the_base_is_saved_for_the_backward_pass(model, added):
    """As many bytes as where the base's blocks compute nothing and give what they once gave."""
    inside, given = [], {}
    for i, block in enumerate(anatomy.blocks(model)):
        for module in block.modules():
            module.register_forward_hook(lambda m, args, out: inside.append(out))
        block.register_forward_hook(lambda m, args, h, i=i: given.update({i: h}))
    side_(model, 2, added=added)
    freeze_base_(moved(model))

    def loss(model):
        return anatomy.logits(model, TOKENS).square().mean()

    kept = account(model, loss)["saved"]
    tensors = [t for out in inside for t in (out if isinstance(out, tuple) else (out,))]
    assert tensors and not any(t.requires_grad for t in tensors if torch.is_tensor(t))
    for i, block in enumerate(anatomy.blocks(model)):
        block.forward = functools.wraps(block.forward)(lambda *_, h=given[i], **__: h)
    assert kept == account(model, loss)["saved"]


def test_its_account_is_below_loras():
    torch.manual_seed(0)
    model = GPT(GPTConfig(60, 64, 4, 4))
    tokens = torch.randint(60, (4, 32), generator=torch.Generator().manual_seed(0))

    def loss(model):
        return model(tokens).square().mean()

    rows = {}
    for name, method in {"lora": lambda m: lora_(m, rank=4), "side": lambda m: side_(m, 4)}.items():
        method(model)
        freeze_base_(model)
        rows[name] = account(model, loss)
        remove_(model)
    assert rows["side"]["saved"] < rows["lora"]["saved"] / 2
    assert rows["side"]["total"] < rows["lora"]["total"]


def test_with_the_full_width_the_side_blocks_are_the_bases(model):
    side_(model, 1)
    for rung, block in zip(model.side.rungs, anatomy.blocks(model), strict=True):
        own, theirs = dict(rung.block.named_parameters()), dict(block.named_parameters())
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) for name in own)


def _top(sizes, n):
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    return sorted(order[:n])


def _l1(weight):
    return [sum(abs(v) for v in row) for row in weight.tolist()]


def test_the_side_blocks_are_the_largest_rows_of_the_base(model):
    """By hand, for the feed-forward layer and the heads of attention."""
    side_(model, 2)
    names = anatomy.family(model)
    written = [
        _l1(matrix(layer)) for layer in anatomy.projections(model, "output", "down").values()
    ]
    stream = _top([sum(column) for column in zip(*written, strict=True)], 16)
    block, own = anatomy.blocks(model)[1], model.side.rungs[1].block

    def of(layers, role):
        return matrix(layers.get_submodule(names.projections[role]))

    inner = _top(_l1(of(block, "up")), len(of(block, "up")) // 2)
    assert torch.equal(of(own, "up"), of(block, "up")[inner][:, stream])
    assert torch.equal(of(own, "down"), of(block, "down")[stream][:, inner])
    fused = "query_key_value" in names.projections
    query = of(block, "query_key_value" if fused else "query")[:32]
    sizes = [sum(_l1(query)[8 * i : 8 * i + 8]) for i in range(4)]
    if "key" in names.projections and len(of(block, "key")) == 16:  # two heads share one of keys
        group = _top([sizes[0] + sizes[1], sizes[2] + sizes[3]], 1)[0]
        heads, kv_heads = [2 * group, 2 * group + 1], [group]
    else:
        heads = kv_heads = _top(sizes, 2)
    q = [8 * i + j for i in heads for j in range(8)]
    k = [8 * i + j for i in kv_heads for j in range(8)]
    assert torch.equal(of(own, "output"), of(block, "output")[stream][:, q])
    if fused:
        rows = [r + 32 * part for part in range(3) for r in q]
        assert torch.equal(
            of(own, "query_key_value"), of(block, "query_key_value")[rows][:, stream]
        )
    else:
        assert torch.equal(of(own, "query"), of(block, "query")[q][:, stream])
        assert torch.equal(of(own, "value"), of(block, "value")[k][:, stream])
    for place in (names.attention_norm, names.mlp_norm):
        gain = block.get_submodule(place).weight[stream]
        assert torch.equal(own.get_submodule(place).weight, gain)


def test_counts(model):
    side_(model, 2)
    blocks = sum(p.numel() for rung in model.side.rungs for p in rung.block.parameters())
    ladders = 3 * (32 * 16 + 16) + 2 + 16 + 16 * 32 + 32  # D, alpha, the norm, U
    assert n_trainable(model) == blocks + ladders
    whole = sum(p.numel() for block in anatomy.blocks(model) for p in block.parameters())
    assert whole / 4 <= blocks < whole / 3


def test_a_gate_starts_in_the_middle_and_its_temperature_sharpens_it(model):
    side_(model, 2)
    rung = model.side.rungs[0]
    s, h = torch.randn(1, 2, 16), torch.randn(1, 2, 32)
    torch.testing.assert_close(rung.mixture(s, h), (s + rung.down(h)) / 2)
    rung.alpha.data.fill_(2.0)
    torch.testing.assert_close(rung.mixture(s, h), s, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("added", [False, True])
def test_our_cache_changes_nothing_and_its_companion_goes_with_it(added):
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    side_(model, 2, added=added)
    whole = moved(model, 0.3)(TOKENS)
    cache = model.new_cache(16)
    parts = [model(TOKENS[:, a:b], cache) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert len(model.side.caches) == len(cache) == 2
    assert torch.equal(copy.deepcopy(model)(TOKENS), whole)
    del cache
    gc.collect()
    assert len(model.side.caches) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_generates_with_it(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    side_(model, 2)
    moved(model, 0.3)
    made = model.generate(
        TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=4, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    tokens = TOKENS
    for _ in range(4):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    assert torch.equal(made, tokens)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_changes_nothing(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    side_(model, 2)
    mask = torch.ones_like(TOKENS)
    mask[:, 5:] = 0
    padded = moved(model, 0.3)(TOKENS, attention_mask=mask).logits[:, :5]
    torch.testing.assert_close(padded, model(TOKENS[:, :5]).logits, atol=1e-5, rtol=1e-5)


def test_beside_the_upper_block_alone_it_starts_there(model):
    seen = {}
    block = anatomy.blocks(model)[1]
    block.register_forward_hook(lambda m, args, h: seen.update(x=args[0], h=h))
    side_(model, 2, blocks=[1])
    (rung,) = model.side.rungs
    forward = rung.block.forward

    def watched(**given):
        seen["mixture"] = next(iter(given.values()))
        return forward(**given)

    rung.block.forward = watched
    anatomy.logits(model, TOKENS)
    mixture = (model.side.first(seen["x"]) + rung.down(seen["h"])) / 2
    torch.testing.assert_close(seen["mixture"], mixture)


def test_hidden_states_of_a_backbone_are_its_own():
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SIZES)).eval()
    side_(model, 2)
    states = model(TOKENS, output_hidden_states=True).hidden_states
    assert [s.shape[-1] for s in states] == [32, 32, 32]


def test_it_goes_with_bfloat16_and_lora():
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    before = model(TOKENS)
    lora_(model, ["output", "down"], rank=2)
    side_(model, 2, added=True)
    assert torch.equal(model(TOKENS), before)
    whole, cache = moved(model)(TOKENS), model.new_cache(16)
    parts = torch.cat([model(TOKENS[:, :4], cache), model(TOKENS[:, 4:], cache)], 1)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(parts, whole, atol=0.3, rtol=0.1)
    remove_(model)
    assert torch.equal(model(TOKENS), before)


def test_qwen3_norms_its_heads_in_the_side_network_too():
    torch.manual_seed(0)
    config = hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
    model = hf.Qwen3ForCausalLM(config).eval()
    for block in anatomy.blocks(model):
        block.self_attn.q_norm.weight.data.uniform_()
    side_(model, 2)
    own = model.side.rungs[0].block.self_attn.q_norm.weight
    assert torch.equal(own, anatomy.blocks(model)[0].self_attn.q_norm.weight)
    assert anatomy.logits(model, TOKENS).isfinite().all()


def test_what_is_wrong_is_said():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="by 8 leaves 4 features and 0.5 heads of 32 and 4"):
        side_(model, 8)
    side_(model, 2)
    with pytest.raises(ValueError, match="GPT has a side network already"):
        side_(model, 2)
    with pytest.raises(ValueError, match="the block of the first rung did not run"):
        anatomy.blocks(model)[1](torch.randn(1, 3, 32), (torch.ones(3, 8), torch.zeros(3, 8)))
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    with pytest.raises(ValueError, match="T5's blocks share their position bias"):
        side_(hf.T5EncoderModel(hf.T5Config(num_layers=2, **sizes)))
