import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lablib.models import GPT, GPTConfig
from lablib.scaling import counts
from lablib.scaling.counts import forward_flops, non_embedding, training_flops


def test_the_largest_model_of_the_paper():
    table = counts.classic(1600, 48, 50257, 1024)
    assert non_embedding(table) == counts.classic_size(1600, 48) == 12 * 48 * 1600**2
    assert non_embedding(table) == pytest.approx(1.4746e9, rel=1e-4)
    assert forward_flops(table) == 2 * non_embedding(table) + 2 * 48 * 1024 * 1600


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 1, "head_dim": 8, "tied": False}])
def test_our_counts_are_the_models_own(options):
    config = GPTConfig(vocab_size=96, dim=32, n_layers=3, n_heads=2, max_length=64, **options)
    model = GPT(config)
    table = counts.counts(config, 64)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert sum(row.parameters for row in table.values()) == model.n_parameters() - norms
    assert non_embedding(table) == model.n_parameters(embeddings=False) - norms
    assert counts.counts_of(model, 64) == table


def counted(model, length):
    plain = sdpa_kernel(SDPBackend.MATH)  # the fused one is not counted on CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model(torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops() / length


def test_a_flop_counter_sees_the_whole_of_attention():
    config = GPTConfig(vocab_size=96, dim=32, n_layers=3, n_heads=2, max_length=64)
    table = counts.counts(config, 64)
    expected = forward_flops(table, head=True) + table["attention"].flops
    assert counted(GPT(config), 64) == pytest.approx(expected)


def test_transformers_models_are_counted_on_the_meta_device():
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96,
                hidden_size=32,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
        gpt2 = GPT2LMHeadModel(
            GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        )
    table = counts.counts_of(llama, 64)
    matrices = sum(p.numel() for p in llama.parameters() if p.ndim == 2)
    assert sum(row.parameters for row in table.values()) == matrices
    assert table["attention"].flops == 2 * 2 * 64 * 32
    assert non_embedding(counts.counts_of(gpt2, 64)) == counts.classic_size(32, 2)
    with pytest.raises(ValueError, match="none of these families"):
        counts.counts_of(torch.nn.Linear(2, 2), 64)


def test_training_takes_three_forward_passes():
    assert training_flops(1e6, 1e9) == 6e15 and training_flops(1e6, 1e9, 1e6) == 12e15
