"""A tiny model of each family whose texts become vectors."""

import transformers as hf

from lablib.models import GPT, GPTConfig


def sizes(n_layers):
    """Of transformers' Llama and BERT: so many layers of width 32 over 60 tokens."""
    return {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
    }


def models(n_layers):
    """Name -> what makes the model, in those sizes."""
    gpt2 = {"vocab_size": 60, "n_embd": 32, "n_layer": n_layers, "n_head": 4, "n_positions": 32}
    llama = {**sizes(n_layers), "num_key_value_heads": 2}
    return {
        "gpt": lambda: GPT(GPTConfig(60, 32, n_layers, 4, 2, init_std=0.2)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
        "bert": lambda: hf.BertModel(hf.BertConfig(**sizes(n_layers))),
    }
