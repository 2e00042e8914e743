import pytest
import torch
from torch import nn

from lablib.experts.hub import from_hf_moe
from lablib.experts.moe import moe_layers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _random(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES, num_experts_per_tok=2, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key or "gate" in key:  # so that a norm or a router left out would show
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Olmoe", {"num_experts": 8}),
        ("Olmoe", {"num_experts": 4, "norm_topk_prob": True, "tie_word_embeddings": True}),
        ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    ],
)
def test_logits_equal_transformers_from_memory_and_from_disk(name, options, tmp_path):
    theirs = _random(name, **options)
    tokens = torch.randint(97, (2, 17))
    expected = theirs(tokens).logits
    ours = from_hf_moe(theirs).eval()
    torch.testing.assert_close(ours(tokens), expected, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(from_hf_moe(tmp_path).eval()(tokens), expected, atol=1e-5, rtol=1e-5)
    assert len(moe_layers(ours)) == 2


def test_generates_with_a_cache():
    ours = from_hf_moe(_random("Olmoe", num_experts=8)).eval()
    prompt = torch.randint(97, (1, 5))
    out = ours.generate(prompt, 6, temperature=0.0)
    for length in range(5, 11):
        assert ours(out[:, :length])[0, -1].argmax() == out[0, length]


def test_refuses_what_it_cannot_represent():
    import transformers

    with pytest.raises(ValueError, match="llama"):
        from_hf_moe(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
    with pytest.raises(ValueError, match="clip_qkv"):
        from_hf_moe(_random("Olmoe", num_experts=4, clip_qkv=8.0))
