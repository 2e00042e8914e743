import copy

import pytest
import torch
import transformers as hf
from families_for_tests import (
    MODELS,
    TOKENS,
    beside_peft,
    learns_alone,
    leaves_nothing,
    moved,
)

from lablib.models import anatomy
from lablib.peft.adapter import (
    adapters,
    freeze_base_,
    n_trainable,
    trainable,
)
from lablib.peft.p_tuning import p_tuning_
from lablib.peft.prefix import prompt_


def test_it_changes_the_base_is_saved_and_leaves_nothing(model, tmp_path):
    plain, before = copy.deepcopy(model), anatomy.logits(model, TOKENS)
    p_tuning_(model, 3, hidden=5)
    learns_alone(model)
    anatomy.logits(model, TOKENS).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable(model).values())
    leaves_nothing(model, plain, before, tmp_path, by=0.5)


def test_its_rows_do_what_a_prompts_do(model):
    other = copy.deepcopy(model)
    p_tuning_(model, 3, hidden=5)
    prompt_(other, 3)
    (written,), (prompt,) = adapters(model).values(), adapters(other).values()
    with torch.no_grad():
        prompt.rows.copy_(written.rows)
    mine, theirs = anatomy.logits(model, TOKENS), anatomy.logits(other, TOKENS)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_every_row_depends_on_every_entry_of_the_table():
    model = MODELS["gpt"]()
    p_tuning_(model, 4)
    (written,) = adapters(model).values()
    for row in range(4):
        (gradient,) = torch.autograd.grad(written.rows[row].sum(), written.table)
        assert gradient.any(1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_rows_and_gradients_are_those_of_peft(family):
    peft = pytest.importorskip("peft")
    model, task = beside_peft(family)
    config = peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=3,
        encoder_reparameterization_type="LSTM", encoder_hidden_size=5, encoder_dropout=0.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    p_tuning_(model, 3, hidden=5)
    freeze_base_(model)
    pairs = list(
        zip(trainable(moved(model)).values(), theirs.prompt_encoder["default"].parameters())
    )
    for one, other in pairs:
        other.data.copy_(one.data)
    expected, mine = theirs(TOKENS).logits[:, 3:], model(TOKENS).logits
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)
    mine.square().mean().backward()
    expected.square().mean().backward()
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)
    assert n_trainable(model) == sum(p.numel() for p in theirs.prompt_encoder.parameters())


def test_bfloat16_and_a_cache_go_with_it():
    torch.manual_seed(0)
    model = MODELS["gpt"]().to(torch.bfloat16).eval()
    p_tuning_(model, 3)
    whole, cache = model(TOKENS), model.new_cache(16)
    parts = torch.cat([model(TOKENS[:, :4], cache), model(TOKENS[:, 4:], cache)], 1)
    assert whole.dtype == torch.bfloat16 and cache[0].length == 7 + 3
    torch.testing.assert_close(parts, whole, atol=0.1, rtol=0.1)


def test_what_cannot_be_is_said():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "vocab_size": 60, "num_heads": 4}
    with pytest.raises(ValueError, match="T5 takes no prompt"):
        p_tuning_(hf.T5EncoderModel(hf.T5Config(num_layers=2, **sizes)), 3)
    model = MODELS["gpt"]()
    prompt_(model, 3)
    with pytest.raises(ValueError, match="GPT has a prompt already"):
        p_tuning_(model, 3)
