import copy

import torch
from families_for_tests import (
    MODELS,
    TOKENS,
    learns_alone,
    leaves_nothing,
    moved,
    same_under_a_cache,
)
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import n_trainable
from lablib.peft.residual import ResidualAdapter, residual_


def test_it_starts_as_the_base_is_saved_and_leaves_nothing(model, tmp_path):
    plain, before = copy.deepcopy(model), anatomy.logits(model, TOKENS)
    residual_(model, 3)
    learns_alone(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)
    assert n_trainable(model) == 2 * (2 * 3 * 32 + 3 + 32 + 2 * 32)
    leaves_nothing(model, plain, before, tmp_path)


def test_it_reads_what_the_sublayer_wrote_through_its_norm():
    torch.manual_seed(0)
    adapter, h = ResidualAdapter(6, 3, "bert"), torch.randn(2, 5, 6)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, correction=0)
        read = (h - mean) / (variance + 1e-5).sqrt() * adapter.norm.weight + adapter.norm.bias
        inner = F.linear(read, adapter.down.weight, adapter.down.bias).relu()
        wanted = h + inner @ adapter.up.weight.T + adapter.up.bias
        torch.testing.assert_close(adapter(torch.zeros_like(h), h), wanted)


def test_bfloat16_and_a_cache_go_with_it():
    model = MODELS["gpt"]().eval()
    residual_(model, 3)
    moved(model.to(torch.bfloat16))
    same_under_a_cache(model)
