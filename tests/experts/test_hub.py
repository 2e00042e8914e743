import pytest
import torch
from torch import nn

from lablib.experts.hub import from_hf_moe
from lablib.experts.moe import moe_layers, recorded
from lablib.training.losses import auxiliary_loss

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

    sizes = SIZES | options
    config = getattr(transformers, f"{name}Config")(**sizes, num_experts_per_tok=2)
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


def test_weights_without_a_place_are_named(tmp_path):
    theirs = _random("Mixtral", num_local_experts=4, sliding_window=None)
    theirs.model.layers[1].mlp.register_buffer("correction", torch.ones(4))
    with pytest.raises(ValueError, match=r"no place for model\.layers\.1\.\S*correction"):
        from_hf_moe(theirs)


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


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(
    ("name", "experts"), [("Olmoe", "num_experts"), ("Mixtral", "num_local_experts")]
)
def test_the_balancing_loss_is_that_of_transformers_but_for_the_covariance_over_layers(
    name, experts, layers
):
    options = {experts: 6, "router_aux_loss_coef": 0.3, "num_hidden_layers": layers}
    theirs = _random(name, output_router_logits=True, **options)
    ours, tokens = from_hf_moe(theirs).train(), torch.randint(97, (2, 17))
    with recorded(ours) as records:
        ours(tokens)
    loss = auxiliary_loss(ours)
    one_by_one = [single for (single,) in records.values()]
    shares = torch.stack([one.counts / len(one.probs) for one in one_by_one])  # (layers, experts)
    means = torch.stack([one.probs.mean(0) for one in one_by_one])
    covariance = (shares * means).mean(0) - shares.mean(0) * means.mean(0)
    expected = 0.3 * theirs(tokens).aux_loss
    torch.testing.assert_close(loss - 0.3 * 6 * covariance.sum(), expected, atol=1e-5, rtol=1e-5)
    assert (abs(loss - expected) < 1e-5) == (layers == 1)
    assert abs(loss - expected) < 0.2 * expected, "not as many times theirs as there are layers"
