"""Convert a Llama model in GGUF, llama.cpp's format, to what `from_hf` and transformers read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SPECIAL = 3  # llama.cpp's token type for control tokens


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config.json, float32 model.safetensors and the tokenizer's files into folder.

    Quantized weights become the float32 numbers they stand for, nothing is rounded again.
    Raises ValueError when the file holds no Llama model with a byte-level BPE tokenizer, or a
    tensor that such a model has no place for.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _check(fields, file)
    config = _config(fields, tied=all(t.name != "output.weight" for t in reader.tensors))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _tokenizer(fields).save_pretrained(folder)
    weights = dict(_weight(tensor, config) for tensor in reader.tensors)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _check(fields: dict, file: Path) -> None:
    found = fields["general.architecture"], fields["tokenizer.ggml.model"]
    if found != ("llama", "gpt2"):
        raise ValueError(f"{file.name} holds {found}, not a Llama model with byte-level BPE")
    if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{file.name} scales rotary positions ({scaling}): not supported")


def _config(fields: dict, tied: bool) -> dict:
    theta = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
        "dtype": "float32",
    }


def _weight(tensor, config: dict) -> tuple[str, np.ndarray]:
    """One tensor under transformers' name, in float32."""
    from gguf import dequantize

    module, _, leaf = tensor.name.rpartition(".")
    known = _TOP_NAMES.keys() | _BLOCK_NAMES.keys()
    if leaf != "weight" or re.sub(r"^blk\.\d+\.", "", module) not in known:
        raise ValueError(f"{tensor.name} has no place in a Llama model without biases")
    value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if not module.startswith("blk."):
        return f"{_TOP_NAMES[module]}.{leaf}", value
    _, number, name = module.split(".")
    if name in ("attn_q", "attn_k"):
        role = "attention" if name == "attn_q" else "key_value"
        value = _halves(value, config[f"num_{role}_heads"])
    return f"model.layers.{number}.{_BLOCK_NAMES[name]}.{leaf}", np.ascontiguousarray(value)


def _halves(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder rotary pairs from llama.cpp's (x0, x1), (x2, x3), ... to (x_i, x_{i + d/2})."""
    pairs = weight.reshape(n_heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(fields: dict):
    """A transformers fast tokenizer: byte-level BPE that splits digits, as SmolLM's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(bpe)
    splits = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if fields.get("tokenizer.ggml.pre") == "smollm":
        splits.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = {
        f"{short}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=fields["llama.context_length"], **names
    )
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast
