import pytest
import torch

from lablib.experts.compaction import keys_and_values, run_kept
from lablib.models import GPT, GPTConfig
from lablib.models.gpt import rotary_table

MASKS = {
    "uneven": [[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0]],
    "a row without": [[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]],
    "all": [[1] * 6, [1] * 6],
    "none": [[0] * 6, [0] * 6],
}


def block_and_states(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2}
    model = GPT(GPTConfig(**sizes, max_length=16, init_std=0.2, qk_norm=True, **options))
    return model, model.blocks[0], torch.randn(2, 6, 32)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "output_bias": True, "mlp_bias": True}])
def test_kept_rows_are_the_blocks_and_others_untouched(mask, options):
    model, block, x = block_and_states(**options)
    gate, rotary = torch.tensor(mask).float(), rotary_table(model.config, 0, 6, x)
    expected = torch.where(gate[..., None] > 0, block(x, rotary), x)
    assert torch.allclose(
        run_kept(block, x, block.attention_norm(x), gate, rotary), expected, atol=1e-5
    )


def test_the_gate_of_a_kept_row_has_the_equations_gradient():
    model, block, x = block_and_states()
    gate = torch.tensor(MASKS["uneven"]).float().requires_grad_()
    rotary = rotary_table(model.config, 0, 6, x)
    weight = torch.randn_like(x)
    (run_kept(block, x, block.attention_norm(x), gate, rotary) * weight).sum().backward()
    expected = ((block(x, rotary) - x) * weight).sum(-1)
    kept = gate.detach() > 0
    assert torch.allclose(gate.grad[kept], expected[kept], atol=1e-4)
    assert (gate.grad[~kept] == 0).all()


def test_a_token_that_skips_still_leaves_its_keys_and_values_in_the_cache():
    model, block, x = block_and_states()
    normed, cache = block.attention_norm(x), model.new_cache(6)[0]
    first, last, whole = (
        rotary_table(model.config, start, n, x) for start, n in ((0, 5), (5, 1), (0, 6))
    )
    run_kept(block, x[:, :5], normed[:, :5], torch.zeros(2, 5), first, cache)
    found = keys_and_values(block.attention, normed[:, 5:], last, cache)
    for made, expected in zip(found, keys_and_values(block.attention, normed, whole)):
        assert made.shape == (2, 2, 6, 8) and torch.allclose(made, expected, atol=1e-6)


def test_a_kept_token_sees_what_skipped_before_it_and_nothing_after():
    model, block, x = block_and_states()
    gate, rotary = torch.tensor([[0.0, 0, 1, 0, 0, 0]] * 2), rotary_table(model.config, 0, 6, x)

    def third(x):
        return run_kept(block, x, block.attention_norm(x), gate, rotary)[:, 2]

    earlier, later = x.clone(), x.clone()
    earlier[:, 0] += 1
    later[:, 3:] += 1
    assert torch.allclose(third(later), third(x), atol=1e-6)
    assert (third(earlier) - third(x)).abs().max() > 1e-3
