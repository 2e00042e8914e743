"""GPT against transformers' own models, at tiny size."""

import copy

import pytest
import torch
import transformers as hf

from lablib.models import GPT, GPTConfig, from_hf, to_hf

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


def test_missing_weights_are_named():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))
    broken = copy.deepcopy(model)
    del broken.model.norm
    with pytest.raises(ValueError, match=r"nothing for norm\.weight"):
        from_hf(broken)
