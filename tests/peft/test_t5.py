"""What a method does with T5: it works in the encoder, or it says in a sentence that it doesn't."""

from functools import partial

import pytest
import torch
import transformers as hf
from families_for_tests import TOKENS, moved

from lablib.peft import (
    adapters_library,
    blob,
    bottleneck,
    finegates,
    hypertuning,
    intrinsic,
    invertible,
    lora,
    lorma,
    peft_guide,
    peft_position,
    prefix,
    propelt,
    qlora,
    reconfigure,
    subset,
    unipelt,
)
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    load_adapter,
    remove_,
    save_adapter,
    trainable,
)
from lablib.peft.adapter_drop import without_lowest
from lablib.peft.adapters import COMPOSABLE, active, add_
from lablib.peft.catalogue import BUILT, Probe, put_

SIZES = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SIZES |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
MODELS = {
    "encoder": lambda: hf.T5EncoderModel(hf.T5Config(**SIZES)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SIZES)),
    "t5 1.1": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**SIZES, feed_forward_proj="gated-gelu")
    ),
}


def outputs(model):
    """What the encoder gives, or the logits of the decoder that reads it."""
    more = {"decoder_input_ids": TOKENS} if hasattr(model, "decoder") else {}
    return model(input_ids=TOKENS, **more)[0]


def loss(model, rows=None):
    return outputs(model).square().mean()


def far(model):
    reconfigure.far_(model, 0.1, reconfigure.at_once(model, TOKENS, lambda m, _: loss(m)))


REFUSED = ("prompt", "P-tuning", "prefix", "MAM", "ladder side", "LoReFT", "UniPELT")
WORKING = {n: partial(put_, name=n, probe=Probe([TOKENS], loss)) for n in BUILT if n not in REFUSED}
LIBRARY = adapters_library.METHODS
WORKING |= {f"library's {n}": LIBRARY[n] for n in ("seq_bn", "double_seq_bn", "par_bn", "lora")}
WORKING |= {
    "library's (IA)3": adapters_library.up_ia3_,
    "library's Compacter": partial(LIBRARY["compacter"], reduction=4),
    "BLoB": blob.blob_,
    "heads": lambda m: bottleneck.heads_(m, 2),
    "FineGates": lambda m: finegates.gate_(m, rank=2),
    "LoRMA": lambda m: lorma.lorma_(m, rank=2),
    "LoRMA, added, post": lambda m: lorma.lorma_(m, rank=2, inflation="add", mode="post"),
    "LoRA everywhere": lambda m: lora.lora_(m, rank=2),
    "ranked": lambda m: peft_position.ranked_lora_(m, [1, 2]),
    "dense intrinsic": lambda m: intrinsic.intrinsic_(m, 20, ["value"], "dense"),
    "only": lambda m: subset.only_(m, ["*.0.*"]),
    "attention": subset.attention_,
    "last blocks": subset.last_blocks_,
    "FAR": far,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("name", WORKING)
def test_it_works_and_leaves_nothing(model, name, tmp_path):
    with torch.no_grad():
        before = outputs(model)
    bits = {n: t.clone() for n, t in model.state_dict().items()}
    WORKING[name](model)
    freeze_base_(model)
    loss(moved(model)).backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable(model).values())
    with torch.no_grad():
        changed = outputs(model)
        assert changed.shape == before.shape and (changed - before).abs().max() > 1e-3
        with disabled(model):
            assert torch.equal(outputs(model), before)
        save_adapter(model, tmp_path / "a.safetensors")
        remove_(model)
        assert not adapters(model) and torch.equal(outputs(model), before)
        assert all(torch.equal(t, bits[n]) for n, t in model.state_dict().items())
        load_adapter(model, tmp_path / "a.safetensors")
        assert torch.equal(outputs(model), changed)


@pytest.mark.parametrize("kind", [k for k in COMPOSABLE if k != "compacter"])
def test_named_adapters_work(model, kind):
    with torch.no_grad():
        before = outputs(model)
        add_(model, "one", kind)
        assert torch.equal(outputs(model), before)
        with active(moved(model), "one"):
            assert (outputs(model) - before).abs().max() > 1e-3
        remove_(model)
        assert torch.equal(outputs(model), before)


def test_over_4_bits(model):
    with torch.no_grad():
        qlora.nf4_(model)
        before = outputs(model)
        qlora.qlora_(model, rank=2)
        assert torch.equal(outputs(model), before)
        assert (outputs(moved(model)) - before).abs().max() > 1e-3
        remove_(model)
        assert torch.equal(outputs(model), before)


def test_adapters_can_be_dropped_from_the_lowest_blocks(model):
    with torch.no_grad():
        before = outputs(model)
        bottleneck.houlsby_(model, 4)
        moved(model)
        with without_lowest(model, 2):
            assert torch.equal(outputs(model), before)


SAYING = {name: (partial(put_, name=name), "T5|UniPELT's gates") for name in REFUSED} | {
    "prefix_": (lambda m: prefix.prefix_(m, 3), "T5's attention takes no prefix"),
    "prompt_": (lambda m: prefix.prompt_(m, 3), "T5 takes no prompt"),
    "shared prefix": (lambda m: propelt.propelt_prefix_(m, 3), "T5's attention takes no prefix"),
    "UniPELT itself": (unipelt.unipelt_, "T5's attention takes no prefix"),
    "invertible": (invertible.invertible_, "T5's encoder and decoder embed apart"),
    "slots of a prefix": (lambda m: hypertuning.slots_(m, "prefix"), "T5's attention takes no"),
    "S4": (peft_guide.s4_, "T5's attention takes no prefix, and S4"),
}
SAYING |= {f"library's {n}": (LIBRARY[n], "T5") for n in ("prefix_tuning", "prompt_tuning", "mam")}


@pytest.mark.parametrize("name", SAYING)
def test_the_others_say_so_and_leave_the_model_as_it_was(model, name):
    put, told = SAYING[name]
    with torch.no_grad():
        before = outputs(model)
        with pytest.raises(ValueError, match=told) as caught:
            put(model)
        assert "\n" not in str(caught.value)
        assert torch.equal(outputs(model), before)
    assert not adapters(model)
