import copy
import math

import pytest
import torch
import transformers as hf
from families_for_tests import MODELS, SIZES, TOKENS, learns_alone, loads_again, moved
from torch import nn

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    fold_,
    merge_,
    n_trainable,
    remove_,
    trainable,
)
from lablib.peft.bottleneck import Bottleneck
from lablib.peft.lora import LoRALinear
from lablib.peft.prefix import Prefix, prefix_
from lablib.peft.unipelt import Gate, GatedBottleneck, GatedLoRA, GatedPrefix, unipelt_


def test_it_is_no_base_at_the_start_and_leaves_nothing(model, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    unipelt_(model, 2, 3, 4)
    assert (anatomy.logits(model, TOKENS) - before).abs().max() > 1e-3
    learns_alone(model)
    changed = anatomy.logits(moved(model, 0.3), TOKENS)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert torch.equal(anatomy.logits(copy.deepcopy(model), TOKENS), changed)
    loads_again(model, plain, changed, tmp_path)
    for verb in (merge_, fold_):
        with pytest.raises(ValueError, match="can't be merged"):
            verb(model)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_counts(model):
    unipelt_(model, 2, 3, 4)
    gate, dim = 32 + 1, 32
    kv = 16 if hasattr(model.config, "num_key_value_heads") or hasattr(model, "blocks") else 32
    if hasattr(model, "transformer"):
        lora = 2 * (dim + 3 * dim) + gate  # on the one matrix of all three
    else:
        lora = 2 * (dim + dim) + gate + 2 * (dim + kv) + gate
    prefix, adapter = 2 * 3 * kv + gate, 2 * dim * 4 + 4 + dim + gate
    assert n_trainable(model) == 2 * (lora + prefix + adapter)


def test_a_gate_is_a_mean_of_sigmoids_over_positions_of_one_text():
    torch.manual_seed(0)
    gate, z = Gate(8), torch.randn(2, 5, 8)
    w, c = gate.score.weight[0].tolist(), gate.score.bias.item()
    assert c == 0 and torch.tensor(w).std() < 0.05
    for text in range(2):
        scores = [sum(a * b for a, b in zip(w, z[text, i].tolist(), strict=True)) for i in range(5)]
        by_hand = sum(1 / (1 + math.exp(-s)) for s in scores) / 5
        assert gate(z)[text].shape == (1, 1)
        assert abs(gate(z)[text].item() - by_hand) < 1e-6


class Constant(nn.Module):
    """A gate of one value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z):
        return z.new_full((len(z), 1, 1), self.value)


def test_the_parts_with_an_open_gate_are_the_plain_ones_and_with_a_closed_one_the_base():
    torch.manual_seed(0)
    x, h = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    layer = nn.Linear(16, 8)
    for gated, plain, inputs, base in (
        (GatedLoRA(layer, 2), LoRALinear(layer, 2), (x,), layer(x)),
        (GatedBottleneck(16, 3), Bottleneck(16, 3), (x, h), h),
    ):
        for parameter in (gated.down, gated.up):
            (parameter.weight if isinstance(parameter, nn.Linear) else parameter).data.normal_()
        plain.load_state_dict(gated.state_dict(), strict=False)
        for value in (1.0, 0.0, 0.3):
            gated.gate = Constant(value)
            torch.testing.assert_close(gated(*inputs), base + value * (plain(*inputs) - base))


def test_an_open_gate_leaves_the_prefix_as_it_is(model):
    before, plain = anatomy.logits(model, TOKENS), copy.deepcopy(model)
    unipelt_(model, 2, 3, 4)
    prefix_(plain, 3)
    moved(model, 0.5)
    ours = {n: a for n, a in adapters(model).items() if isinstance(a, GatedPrefix)}
    theirs = {n: a for n, a in adapters(plain).items() if isinstance(a, Prefix)}
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for name, adapter in adapters(model).items():
        adapter.gate = Constant(float(name in ours))
        if name in ours:
            theirs[name].load_state_dict(adapter.state_dict())
    made = anatomy.logits(model, TOKENS)
    torch.testing.assert_close(made, anatomy.logits(plain, TOKENS))
    assert (made - before).abs().max() > 1e-3


def test_a_gated_prefix_is_rows_times_the_gate_of_each_text():
    """BERT's attention by hand: gates on keys and values both, the text's own as they are."""
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SIZES)).eval()
    unipelt_(model, 2, 3, 4)
    moved(model, 0.5)
    attention = model.encoder.layer[0].attention.self
    x, prefix, head = torch.randn(2, 5, 32), attention.prefix, slice(8, 16)
    made = attention(x)[0][..., head]
    for text in range(2):
        gate = prefix.gate(x)[text, 0, 0]
        q = attention.query(x)[text, :, head]
        k = torch.cat([gate * prefix.keys[:, head], attention.key(x)[text, :, head]])
        v = torch.cat([gate * prefix.values[:, head], attention.value(x)[text, :, head]])
        by_hand = (q @ k.T / 8**0.5).softmax(-1) @ v
        torch.testing.assert_close(made[text], by_hand, atol=1e-5, rtol=1e-5)


def test_all_parts_get_gradients(model):
    unipelt_(model, 2, 3, 4)
    moved(model, 0.3)
    anatomy.logits(model, TOKENS).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())


def test_in_a_decoder_the_gates_see_later_tokens_and_a_cache_only_those_of_its_call():
    """What the module says holds, and what does not."""
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    unipelt_(model, 2, 3, 4)
    moved(model, 0.5)
    whole = model(TOKENS)
    assert not torch.allclose(model(TOKENS[:, :4]), whole[:, :4], atol=1e-5)
    cache = model.new_cache(16)
    parts = torch.cat([model(TOKENS[:, :4], cache), model(TOKENS[:, 4:], cache)], 1)
    assert torch.equal(parts[:, :4], model(TOKENS[:, :4]))
    assert parts.shape == whole.shape and not torch.allclose(parts, whole, atol=1e-5)
    for adapter in adapters(model).values():
        adapter.gate = Constant(0.4)
    cache = model.new_cache(16)
    parts = torch.cat([model(TOKENS[:, :4], cache), model(TOKENS[:, 4:], cache)], 1)
    torch.testing.assert_close(parts, model(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_bfloat16(family):
    torch.manual_seed(0)
    model = MODELS[family]().to(torch.bfloat16).eval()
    before = anatomy.logits(model, TOKENS)
    unipelt_(model, 2, 3, 4)
    assert anatomy.logits(moved(model), TOKENS).dtype == torch.bfloat16
    remove_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_a_second_one_and_t5_are_refused():
    model = MODELS["bert"]()
    unipelt_(model, 2, 3, 4)
    count = len(adapters(model))
    with pytest.raises(ValueError, match="has a prefix already"):
        unipelt_(model, 2, 3, 4)
    assert len(adapters(model)) == count
    sizes = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    with pytest.raises(ValueError, match="T5"):
        unipelt_(hf.T5EncoderModel(hf.T5Config(num_layers=2, **sizes)))
