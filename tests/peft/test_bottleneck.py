import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, learns_alone, loads_again, moved
from torch import nn

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import (
    adapters,
    disabled,
    merge_,
    n_trainable,
    remove_,
)
from lablib.peft.bottleneck import (
    Bottleneck,
    HeadsBottleneck,
    bottleneck_,
    heads_,
    houlsby_,
    parallel_,
    pfeiffer_,
)
from lablib.peft.lora import lora_

VERBS = {
    "houlsby": lambda model: houlsby_(model, 3, start="lora"),
    "pfeiffer": lambda model: pfeiffer_(model, 3, start="lora"),
    "parallel": lambda model: parallel_(model, 3),
    "attention": lambda model: bottleneck_(model, 3, ("attention",), "parallel", 2.0),
    "heads": lambda model: heads_(model, 3, 2.0),
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_starts_as_the_base_and_leaves_nothing(model, verb, tmp_path):
    plain = copy.deepcopy(model)
    before = anatomy.logits(model, TOKENS)
    VERBS[verb](model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)
    learns_alone(model)
    changed = anatomy.logits(moved(model, 0.3), TOKENS)
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


def test_the_bert_start_is_near_the_base_and_not_on_it(model):
    before = anatomy.logits(model, TOKENS)
    houlsby_(model, 3)
    difference = (anatomy.logits(model, TOKENS) - before).abs().max()
    assert 0 < difference < 0.1 * before.abs().max()
    for adapter in adapters(model).values():
        for layer in (adapter.down, adapter.up):
            assert 0.01 < layer.weight.std() < 0.03 and not layer.bias.any()


class Seen(nn.Module):
    """What a sublayer reads and writes."""

    def forward(self, x, h):
        self.x, self.h = x, h
        return h


@pytest.mark.parametrize("place", sublayers.SUBLAYERS)
@pytest.mark.parametrize("insertion", ["serial", "parallel"])
def test_outputs_are_those_of_the_equation(model, insertion, place):
    before, after = Seen(), Seen()
    sublayers.change_(model, 1, place, before, "before")
    bottleneck_(model, 3, (place,), insertion, 2.5)
    sublayers.change_(model, 1, place, after, "after")
    anatomy.logits(moved(model, 0.3), TOKENS)
    adapter = list(adapters(model).values())[-1]
    read = before.h if insertion == "serial" else before.x
    down = read @ adapter.down.weight.T + adapter.down.bias
    change = down.clamp(min=0) @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(after.h, before.h + 2.5 * change)


def test_heads_are_changed_ahead_of_the_output_projection(model):
    """By hand: each head's part of what W_o reads, with its own adapter."""
    before, after = Seen(), Seen()
    sublayers.change_(model, 1, "attention", before, "before")
    heads_(model, 3, 2.5)
    sublayers.change_(model, 1, "attention", after, "after")
    output = anatomy.projection(model, 1, "output")
    read = {}
    output.register_forward_hook(lambda m, args, out: read.update(heads=args[0]))
    anatomy.logits(moved(model, 0.3), TOKENS)
    adapter = list(adapters(model).values())[-1]
    first = "query_key_value" if hasattr(model, "transformer") else "query"
    queries = anatomy.projection(model, 1, first)(before.x)[..., :32]
    new = []
    for i, head in enumerate(read["heads"].unflatten(-1, (4, 8)).unbind(2)):
        q = queries[..., 8 * i : 8 * i + 8]
        new.append(head + 2.5 * (q @ adapter.down[i].T).clamp(min=0) @ adapter.up[i].T)
    torch.testing.assert_close(after.h, output(torch.cat(new, -1)), atol=1e-5, rtol=1e-5)


def test_counts(model):
    dim, r, blocks = 32, 3, 2
    one = 2 * dim * r + r + dim
    for verb, count in {
        "houlsby": 2 * blocks * one,
        "pfeiffer": blocks * one,
        "parallel": blocks * one,
        "heads": blocks * 2 * dim * r,
    }.items():
        VERBS[verb](model)
        assert n_trainable(model) == count
        remove_(model)


def test_serial_and_parallel_differ_in_what_they_read_and_in_nothing_else():
    torch.manual_seed(1)
    serial, parallel = Bottleneck(8, 2), Bottleneck(8, 2, insertion="parallel")
    parallel.load_state_dict(moved_layer(serial).state_dict())
    x, h = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(serial(h, x) - x, parallel(x, h) - h)


def moved_layer(layer):
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


@pytest.mark.parametrize(("form", "by_hand"), [
    ("relu", lambda z: z.clamp(min=0)),
    ("gelu", lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2),
    ("softmax", lambda z: z.exp() / z.exp().sum(-1, keepdim=True)),
    ("linear", lambda z: z),
])  # fmt: skip
def test_forms(form, by_hand):
    torch.manual_seed(1)
    adapter = moved_layer(Bottleneck(8, 3, form=form, bias=False))
    x, h = torch.randn(2, 8), torch.randn(2, 8)
    by_hand = h + by_hand(h @ adapter.down.weight.T) @ adapter.up.weight.T
    torch.testing.assert_close(adapter(x, h), by_hand)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * 8 * 3


def test_several_go_together_also_with_lora_in_bfloat16():
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    before = model(TOKENS)
    lora_(model, ["output", "down"], rank=2)
    houlsby_(model, 3, start="lora")
    parallel_(model, 4)
    heads_(model, 4)
    whole, cache = model(TOKENS), model.new_cache(16)
    assert torch.equal(whole, before) and whole.dtype == torch.bfloat16
    whole = moved(model, 0.3)(TOKENS)
    parts = torch.cat([model(TOKENS[:, :4], cache), model(TOKENS[:, 4:], cache)], 1)
    torch.testing.assert_close(parts, whole, atol=0.3, rtol=0.1)
    remove_(model)
    assert torch.equal(model(TOKENS), before)


def test_wrong_names_and_sizes_are_said():
    model = MODELS["gpt"]()
    with pytest.raises(ValueError, match="'sideways' is none of serial, parallel"):
        bottleneck_(model, 2, insertion="sideways")
    with pytest.raises(ValueError, match="'tanh' is none of"):
        bottleneck_(model, 2, form="tanh")
    with pytest.raises(ValueError, match="'zero' is none of lora, bert"):
        bottleneck_(model, 2, start="zero")
    with pytest.raises(ValueError, match="5 heads do not divide the output projection's 32"):
        HeadsBottleneck(nn.Linear(32, 32), nn.Linear(32, 32), 5, 2)
