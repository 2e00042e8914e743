"""A tiny model of each family that a method is tested on, and what holds of every method."""

import torch
import transformers as hf

from lablib.models import GPT, GPTConfig, anatomy
from lablib.peft.adapter import (
    adapters,
    disabled,
    freeze_base_,
    load_adapter,
    merge_,
    remove_,
    save_adapter,
    trainable,
    unmerge_,
)

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROBERTA = {"type_vocab_size": 1, "max_position_embeddings": 34, "layer_norm_eps": 1e-5}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(60, 32, 2, 4, 2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **STILL)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, **STILL, **ROBERTA)),
}
TOKENS = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def moved(model, by=0.1):
    """Every adapter's parameters, as if they had trained; tied ones once."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in {id(p): p for p in trainable(model).values()}.values():
            parameter.add_(by * torch.randn_like(parameter))
    return model


def learns_alone(model):
    """What the methods brought asks for gradients, and nothing else."""
    freeze_base_(model)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asking and asking == set(trainable(model))


def merges(model, before, changed):
    """Merged, the logits stay; disabled then, and unmerged, they are the old ones to the bit."""
    merge_(model)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), changed, atol=1e-5, rtol=1e-5)
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    unmerge_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), changed)


def loads_again(model, plain, changed, folder):
    """What is saved of the model makes the same of a plain one."""
    save_adapter(model, folder / "a.safetensors")
    load_adapter(plain, folder / "a.safetensors")
    assert torch.equal(anatomy.logits(plain, TOKENS), changed)


def leaves_nothing(model, plain, before, folder, by=0.1):
    """Moved, a method changes the logits; it is disabled, saved and removed without a trace."""
    changed = anatomy.logits(moved(model, by), TOKENS)
    assert changed.shape == before.shape and (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    loads_again(model, plain, changed, folder)
    remove_(model)
    assert not adapters(model) and torch.equal(anatomy.logits(model, TOKENS), before)


def beside_peft(family):
    """A model of a family that peft puts rows before, and what peft calls its task."""
    torch.manual_seed(0)
    if family == "bert":
        return hf.BertForTokenClassification(hf.BertConfig(**SIZES)).eval(), "TOKEN_CLS"
    return MODELS[family]().eval(), "CAUSAL_LM"


def same_under_a_cache(model, atol=0.1):
    """A `GPT` in bfloat16 reads a text in two pieces as it does at once; what it gives."""
    whole, cache = model(TOKENS), model.new_cache(16)
    parts = torch.cat([model(TOKENS[:, :4], cache), model(TOKENS[:, 4:], cache)], 1)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(parts, whole, atol=atol, rtol=0.1)
    return whole
