import pytest
import torch

from lablib.models import GPT, GPTConfig
from lablib.models.flops import block_flops, flops_per_token, head_flops


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_flops_equal_a_count_of_every_product(kv):
    sizes = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": kv, "vocab_size": 40}
    model = GPT(GPTConfig(**sizes, max_length=64))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    # Attention's two products with one key: the counter may not know the fused kernel.
    known = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in known.items() if "attention" not in str(op))
    scores = 3 * 2 * 2 * 32
    assert flops_per_token(model.config, 1) == pytest.approx(linear + scores)


def test_a_longer_text_costs_more_scores_alone():
    config = GPTConfig(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=40)
    short, long = (block_flops(config, length) for length in (1, 9))
    assert long.keys_values == short.keys_values == 2 * 2 * 32 * 16
    assert long.rest - short.rest == 2 * 2 * 32 * (5 - 1)  # five keys on average, not one
    whole = 3 * (long.keys_values + long.rest) + head_flops(config)
    assert flops_per_token(config, 9) == whole
