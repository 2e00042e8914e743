import copy

import pytest
import torch
from families_for_tests import MODELS, TOKENS, moved
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import freeze_base_, trainable
from lablib.peft.blob import blob_
from lablib.peft.lora import lora_
from lablib.peft.mixed import adapters_to_float32_, in_precision_of_base
from lablib.peft.qlora import nf4_, qlora_


def quantized_(model):
    nf4_(model)
    qlora_(model, rank=4)


@pytest.fixture(params=["gpt", "llama"])
def half(request):
    torch.manual_seed(0)
    return MODELS[request.param]().bfloat16().eval()


@pytest.mark.parametrize("put", [lora_, blob_, quantized_])
def test_adapters_learn_in_float32_over_a_base_that_stays(half, put):
    put(half)
    adapters_to_float32_(moved(half))
    freeze_base_(half)
    own = trainable(half)
    assert own and all(p.dtype == torch.float32 for p in own.values())
    base = {n: p for n, p in half.named_parameters() if n not in own}
    assert base and all(p.dtype == torch.bfloat16 for p in base.values())
    with in_precision_of_base(half):
        logits = anatomy.logits(half.train(), TOKENS)
    assert logits.dtype == torch.bfloat16
    F.cross_entropy(logits.float().flatten(0, 1), TOKENS.flatten()).backward()
    asked = {n: p.grad for n, p in own.items() if p.grad is not None}
    assert asked.keys() == own.keys()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in asked.values())
    assert all(p.grad is None for p in base.values())


def test_a_step_too_small_for_bfloat16_is_kept_and_seen(half):
    lora_(half)
    adapters_to_float32_(moved(half, 1.0))
    rounded = copy.deepcopy(half).bfloat16()
    for model in (half, rounded):
        with in_precision_of_base(model), torch.no_grad():
            before = anatomy.logits(model, TOKENS)
        for _ in range(100):
            for parameter in trainable(model).values():
                parameter.data *= 1.001  # bfloat16 knows steps of 1 / 128 and of 1 / 256
        with in_precision_of_base(model), torch.no_grad():
            after = anatomy.logits(model, TOKENS)
        assert torch.equal(after, before) == (model is rounded)


def test_in_float32_nothing_changes():
    torch.manual_seed(0)
    model = MODELS["gpt"]().eval()
    before = anatomy.logits(model, TOKENS)
    with in_precision_of_base(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
