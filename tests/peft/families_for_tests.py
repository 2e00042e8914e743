"""A tiny model of each family that a method is tested on."""

import torch
import transformers as hf

from lablib.models import GPT, GPTConfig
from lablib.peft.adapter import trainable

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(60, 32, 2, 4, 2)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES, **STILL)),
}
TOKENS = torch.randint(2, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def moved(model, by=0.1):
    """Every adapter's parameters, as if they had trained; tied ones once."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in {id(p): p for p in trainable(model).values()}.values():
            parameter.add_(by * torch.randn_like(parameter))
    return model
