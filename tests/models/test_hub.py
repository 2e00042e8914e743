"""GPT against transformers' own models, at tiny size."""

import copy
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from lablib.models import GPT, GPTConfig, from_hf, to_hf

FILE = "model.safetensors"
SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": (hf.LlamaConfig, {}),
    "llama-tied": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biased": (hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": (hf.LlamaConfig, {"head_dim": 20, "rms_norm_eps": 1e-3}),
    "llama3-rope": (hf.LlamaConfig, {"rope_parameters": LLAMA3}),
    "linear-rope": (
        hf.LlamaConfig,
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    ),
    "mistral": (hf.MistralConfig, {"sliding_window": None}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen2-tied": (hf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16}),
    "qwen3-biased": (hf.Qwen3Config, {"head_dim": 16, "attention_bias": True}),
}


@pytest.fixture(params=CASES)
def theirs(request):
    kind, changes = CASES[request.param]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(kind(**SIZES | changes)).eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a mix-up
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_logits_equal_and_survive_both_ways(theirs, tmp_path):
    tokens = torch.randint(90, (2, 50))
    expected = theirs(tokens).logits
    assert expected.std() > 0.1
    ours = from_hf(theirs)
    close(ours(tokens), expected)

    to_hf(ours, tmp_path / "written")
    close(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "written")(tokens).logits, expected)
    close(from_hf(tmp_path / "written")(tokens), expected)

    theirs.save_pretrained(tmp_path / "saved")
    close(from_hf(tmp_path / "saved")(tokens), expected)


def test_training_a_mapped_model_leaves_the_file_alone(tmp_path):
    model = GPT(GPTConfig(50, 32, 1))
    to_hf(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    mapped = from_hf(tmp_path)
    with torch.no_grad():
        for parameter in mapped.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    torch.testing.assert_close(mapped.norm.weight, model.norm.weight + 1)


def test_weights_may_be_stored_in_bfloat16(tmp_path):
    model = GPT(GPTConfig(50, 32, 1))
    to_hf(model, tmp_path, torch.bfloat16)
    assert from_hf(tmp_path).norm.weight.dtype == torch.bfloat16
    stored = from_hf(tmp_path, torch.float32).embedding.weight
    torch.testing.assert_close(stored, model.embedding.weight.bfloat16().float())


def test_a_tied_head_stays_tied():
    config = hf.LlamaConfig(**SIZES | {"tie_word_embeddings": True})
    ours = from_hf(hf.LlamaForCausalLM(config))
    assert ours.head.weight is ours.embedding.weight


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9), "'gpt2' is not of the Llama"),
        (hf.LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (hf.MistralConfig(**SIZES, sliding_window=8), "sliding_window 8 is not supported"),
        (
            hf.LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            "rope_scaling 'dynamic' is unknown",
        ),
    ],
)
def test_what_gpt_cannot_represent_is_named(config, message):
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        from_hf(model)


def test_a_replaced_part_cannot_be_written(tmp_path):
    model = GPT(GPTConfig(50, 32, 2))
    model.blocks[1].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.\S+ differs from a plain GPT"):
        to_hf(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has no .* weights"):
        from_hf(tmp_path)


def test_files_of_an_earlier_model_are_not_read(tmp_path):
    """As transformers chooses: model.safetensors, else what the index names."""
    old, new = GPT(GPTConfig(50, 32, 1)), GPT(GPTConfig(50, 32, 1))
    to_hf(old, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    to_hf(new, tmp_path)
    close(from_hf(tmp_path).norm.weight, new.norm.weight)
    close(from_hf(tmp_path).embedding.weight, new.embedding.weight)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    (tmp_path / "stale.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    close(from_hf(tmp_path).embedding.weight, new.embedding.weight)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"has other\.safetensors, stale\.safetensors, but no model"
    ):
        from_hf(tmp_path)


def test_a_model_in_parts_is_read_as_its_index_says(tmp_path):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "stale.safetensors").write_text("garbage")
    tokens = torch.randint(90, (1, 9))
    close(from_hf(tmp_path)(tokens), model(tokens).logits)


def test_weights_without_a_place_are_named(tmp_path):
    model = GPT(GPTConfig(50, 32, 1))
    to_hf(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"  # as fp8 files have them
    save_file(weights | {name: torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"no place for {re.escape(name)} \(1 weights left over"):
        from_hf(tmp_path)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | frequencies, tmp_path / "model.safetensors")
    close(from_hf(tmp_path).embedding.weight, model.embedding.weight)
    save_file(weights | {"lm_head.weight": torch.ones(50, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings is set, but"):
        from_hf(tmp_path)


def test_a_quantized_model_is_refused(tmp_path):
    to_hf(GPT(GPTConfig(50, 32, 1)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fp8 weights are not supported"):
        from_hf(tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_cut_file_is_named(tmp_path, keep):
    to_hf(GPT(GPTConfig(50, 32, 1)), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut or no safetensors file"):
        from_hf(tmp_path)


def test_a_head_untied_by_hand_is_written(tmp_path):
    model = GPT(GPTConfig(50, 32, 1)).eval()
    model.head.weight = nn.Parameter(torch.randn(50, 32))
    to_hf(model, tmp_path / "untied")
    tokens = torch.randint(50, (1, 9))
    close(from_hf(tmp_path / "untied")(tokens), model(tokens))
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    close(theirs(tokens).logits, model(tokens))
    model = GPT(GPTConfig(50, 32, 1, tied=False)).eval()
    model.head.weight = model.embedding.weight
    to_hf(model, tmp_path / "tied")
    close(from_hf(tmp_path / "tied")(tokens), model(tokens))


def test_each_parameter_keeps_its_type(tmp_path):
    model = GPT(GPTConfig(50, 32, 1)).bfloat16()
    model.norm.float()
    with torch.no_grad():
        model.norm.weight.add_(1e-4)
    to_hf(model, tmp_path)
    again = from_hf(tmp_path)
    assert torch.equal(again.norm.weight, model.norm.weight)
    assert again.embedding.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_a_model_replaced_while_it_is_read_is_one_of_the_two(tmp_path):
    """Two writers and a reader of one folder: no error, no half of each."""
    models = [GPT(GPTConfig(50, 32, layers)) for layers in (1, 3)]
    for value, model in enumerate(models, start=1):
        nn.init.constant_(model.norm.weight, value)
    folder = tmp_path / "model"
    to_hf(models[0], folder)
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(lambda m=m: [to_hf(m, folder) for _ in range(30)]) for m in models]
        seen = []
        while not all(writer.done() for writer in writers):
            model = from_hf(folder)
            seen.append((len(model.blocks), model.norm.weight[0].item()))
        for writer in writers:
            writer.result()
    assert len(seen) > 10 and set(seen) <= {(1, 1.0), (3, 2.0)}


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
def test_weights_can_be_read_by_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "."):
        to_hf(GPT(GPTConfig(50, 32, 1)), folder)
        assert len({(Path(folder) / n).stat().st_mode for n in ("config.json", FILE)}) == 1
    close(from_hf(".").norm.weight, torch.ones(32))


def test_missing_weights_are_named():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    broken = copy.deepcopy(model)
    del broken.model.norm
    with pytest.raises(ValueError, match=r"nothing for norm\.weight"):
        from_hf(broken)


def test_loading_in_threads_leaves_new_layers_alone(tmp_path):
    to_hf(GPT(GPTConfig(50, 32, 1)), tmp_path)
    expected = from_hf(tmp_path).norm.weight
    stop = threading.Event()
    layers = []

    def build():
        while not stop.is_set():
            layers.append(nn.Linear(3, 3))

    with ThreadPoolExecutor(3) as pool:
        building = pool.submit(build)
        loaded = [pool.submit(from_hf, tmp_path) for _ in range(20)]
        weights = [future.result().norm.weight for future in loaded]
        stop.set()
        building.result()
    assert all(torch.equal(weight, expected) for weight in weights)
    assert all(0 < layer.weight.abs().max() <= 3**-0.5 for layer in layers)
    assert torch.nn.Linear(3, 3).weight.is_cpu and len(layers) > 20


def test_an_empty_model_takes_no_random_numbers_and_no_compiler():
    code = """
import sys, torch
from lablib.models import GPTConfig
from lablib.models.hub import empty_model
state = torch.get_rng_state()
model = empty_model(GPTConfig(50, 32, 1, qkv_bias=True))
assert all(p.is_meta for p in model.parameters())
assert torch.equal(state, torch.get_rng_state()) and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
