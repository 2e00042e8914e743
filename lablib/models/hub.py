"""Read and write Llama-family models of Hugging Face transformers.

Known families: Llama, Mistral (without a sliding window), Qwen2 and Qwen3.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lablib.models.gpt import GPT, GPTConfig
from lablib.models.weights import read_json, weight_files

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Ours on the left, theirs on the right, below model.layers.N / blocks.N.
_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_TOP_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def hub_name(name: str) -> str:
    """Our parameter's name in transformers: blocks.0.mlp.up.weight -> model.layers.0....

    Raises KeyError when a Llama-family file has no place for it.
    """
    module, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return f"model.layers.{match[1]}.{_BLOCK_NAMES[match[2]]}.{leaf}"
    return f"{_TOP_NAMES[module]}.{leaf}"


def config_from_hub(config: dict) -> GPTConfig:
    """A transformers config.json, as a dictionary, in our terms.

    Raises ValueError naming what we can't represent (another architecture or activation,
    a sliding window, an unknown rotary scaling).
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not of the Llama family; known are {', '.join(FAMILIES)}"
        )
    _refuse_what_differs(config, family)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    bias = config.get("attention_bias", False)
    return GPTConfig(
        vocab_size=config["vocab_size"],
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim") or (128 if family == "qwen3" else None),
        ffn_dim=config["intermediate_size"],
        max_length=config["max_position_embeddings"],
        rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
        rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        qk_norm=family == "qwen3",
        qkv_bias=True if family == "qwen2" else bias,
        output_bias=False if family == "qwen2" else bias,
        mlp_bias=config.get("mlp_bias", False),
        tied=config.get("tie_word_embeddings", False),
    )


def _refuse_what_differs(config: dict, family: str) -> None:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {activation!r} is not supported: GPT's mlp uses silu")
    if quantized := config.get("quantization_config"):
        method = dict(quantized).get("quant_method", "quantized")
        raise ValueError(f"{method} weights are not supported: save the model dequantized")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and family != "llama" and window < config["max_position_embeddings"]:
        raise ValueError(
            f"sliding_window {window} is not supported: GPT attends to all earlier positions"
        )


def config_to_hub(config: GPTConfig) -> dict:
    """The config.json that transformers reads, in the simplest family that fits.

    Raises ValueError when no known family has this combination of biases and norms.
    """
    c = config
    family = _family_of(c)
    rope = {"rope_type": "default"} | (c.rope_scaling or {}) | {"rope_theta": c.rope_theta}
    written = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_dim,
        "max_position_embeddings": c.max_length,
        "rope_theta": c.rope_theta,
        "rope_parameters": rope,
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied,
        "attention_bias": family != "qwen2" and c.qkv_bias,
        "mlp_bias": c.mlp_bias,
    }
    if c.rope_scaling:
        written["rope_scaling"] = c.rope_scaling
    return written


def _family_of(c: GPTConfig) -> str:
    if c.qk_norm and c.qkv_bias == c.output_bias and not c.mlp_bias:
        return "qwen3"
    if c.qkv_bias and not (c.output_bias or c.mlp_bias or c.qk_norm):
        return "qwen2"
    if c.qkv_bias == c.output_bias and not c.qk_norm:
        return "llama"
    raise ValueError(
        f"no Llama-family model has qk_norm={c.qk_norm}, qkv_bias={c.qkv_bias}, "
        f"output_bias={c.output_bias} and mlp_bias={c.mlp_bias} together"
    )


def from_hf(source: nn.Module | str | Path, dtype: torch.dtype | None = None) -> GPT:
    """A `GPT` with the weights of a transformers model, or of a folder that it was saved to.

    source: a model, or a folder with config.json and *.safetensors, which is mapped into
    memory rather than read (parameters that you change are copied, the file stays).
    dtype: None keeps that of the weights.
    Raises ValueError for an architecture that GPT can't represent, weights that it has no place
    for, and files that can't be read; FileNotFoundError for a folder without config.json or
    weights.
    """
    config, weights = read_model(source)
    model = empty_model(config_from_hub(config))
    load_weights(model, weights)
    return model.to(dtype) if dtype else model


Take = Callable[[dict[str, Tensor], str], Tensor | None]


def _take(weights: dict[str, Tensor], name: str) -> Tensor | None:
    return weights.pop(hub_name(name), None)


def load_weights(model: GPT, weights: dict[str, Tensor], take: Take = _take) -> None:
    """Fill an `empty_model`, in place; a tied head needs no weights of its own.

    weights: by name, as a file holds them; the dictionary is emptied.
    take: (weights, name of one of the model's parameters) -> its tensor, taken out of the weights,
    or None where there is none.
    Raises ValueError that names the first parameter without a tensor or the first tensor without a
    parameter, and when a tied head has other weights than the embedding.
    """
    state = {name: take(weights, name) for name in model.state_dict()}
    if model.config.tied:
        state["head.weight"] = _tied(state["embedding.weight"], state["head.weight"])
    if missing := [name for name, value in state.items() if value is None]:
        raise ValueError(f"the weights have nothing for {missing[0]} ({len(missing)} missing)")
    # Older files keep the rotary frequencies, which follow from the configuration.
    if left := [name for name in weights if not name.endswith("rotary_emb.inv_freq")]:
        raise ValueError(f"the model has no place for {left[0]} ({len(left)} weights left over)")
    model.load_state_dict(state, assign=True)
    if model.config.tied:
        model.head.weight = model.embedding.weight


def _tied(embedding: Tensor | None, head: Tensor | None) -> Tensor | None:
    if embedding is not None and head is not None and not torch.equal(embedding, head):
        raise ValueError("tie_word_embeddings is set, but lm_head.weight is not the embedding")
    return embedding


def read_model(source: nn.Module | str | Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration and the weights by name of a transformers model or a saved folder.

    A folder that is replaced while it is read is read again.
    Raises FileNotFoundError for a folder without config.json or weights, ValueError for a file that
    can't be read.
    """
    if isinstance(source, nn.Module):
        return source.config.to_dict(), dict(source.state_dict())
    for _ in range(100):
        before = _identity(Path(source))
        try:
            read = _read_folder(Path(source))
        except (OSError, ValueError):
            if _identity(Path(source)) == before:
                raise
        else:
            if _identity(Path(source)) == before:
                return read
    raise OSError(f"{source} is replaced by others all the time")


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder has this name now; None when none has."""
    try:
        return folder.stat().st_ino, folder.stat().st_mtime_ns
    except OSError:
        return None


def empty_model(config: GPTConfig) -> GPT:
    """A GPT whose parameters are shapes only, on torch's meta device."""
    with torch.device("meta"), _NothingDrawn():
        return GPT(config)


class _NothingDrawn(TorchFunctionMode):
    """Leave new parameters as they are; like every mode it belongs to its thread alone.

    Drawing random numbers on the meta device imports torch's compiler, which takes seconds.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no saved model")
    files = weight_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors weights")
    weights: dict[str, Tensor] = {}
    for file in files:
        part = _read_weights(file)
        if twice := weights.keys() & part.keys():
            raise ValueError(f"{min(twice)} is in more than one file of {folder}")
        weights |= part
    return read_json(folder / "config.json"), weights


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is cut or no safetensors file: {error}") from error


def to_hf(model: GPT, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors so that transformers can load them.

    folder: new, or that of an earlier model, which is replaced as a whole; what else it holds, such
    as a tokenizer's files, is kept. Only in one with subfolders, and in the working folder, are the
    two files replaced one after the other.
    dtype: what to store; None keeps the parameters'. A head is written when it is not the
    embedding itself, whatever the configuration says.
    Raises ValueError when a part was replaced by one that a Llama-family file has no place
    for, before anything is written.
    """
    from lablib.files import atomic_write

    folder = Path(folder)
    tied = getattr(model.head, "weight", None) is getattr(model.embedding, "weight", None)
    config = replace(model.config, tied=tied)
    weights = _named_for_hub(model, config)
    weights = {name: w.detach().to("cpu", dtype or w.dtype) for name, w in weights.items()}
    if folder.resolve() == Path.cwd() or any(path.is_dir() for path in folder.glob("*")):
        _write_folder(folder, config_to_hub(config), weights)
        return
    with atomic_write(folder) as new:
        new.mkdir()
        _keep_the_rest(folder, new)
        _write_folder(new, config_to_hub(config), weights)


def _keep_the_rest(old: Path, new: Path) -> None:
    """Take over the files that are neither weights of a model nor its configuration."""
    replaced = r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    for file in old.glob("*"):
        if not re.fullmatch(replaced, file.name):
            shutil.copy2(file, new / file.name)


def _write_folder(folder: Path, config: dict, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    from lablib.files import atomic_write

    kept = functools.reduce(torch.promote_types, {w.dtype for w in weights.values()})
    config["dtype"] = config["torch_dtype"] = str(kept).removeprefix("torch.")
    with atomic_write(folder / "model.safetensors") as path:
        whole = {name: w.contiguous() for name, w in weights.items()}
        save_file(whole, path, metadata={"format": "pt"})
    with atomic_write(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _named_for_hub(model: GPT, config: GPTConfig) -> dict[str, Tensor]:
    plain = empty_model(config).state_dict()
    state = model.state_dict()
    for name in state.keys() ^ plain.keys():
        raise ValueError(f"{name} differs from a plain GPT: a Llama-family file can't hold it")
    for name, value in state.items():
        if value.shape != plain[name].shape:
            raise ValueError(
                f"{name} is {tuple(value.shape)}, but its config says {tuple(plain[name].shape)}"
            )
    return {hub_name(n): w for n, w in state.items() if not (config.tied and n == "head.weight")}
