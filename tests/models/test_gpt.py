import pytest
import torch

from lablib.models import GPT, GPTConfig
from lablib.models.gpt import rotary_table, rotate

TINY = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_length": 24}


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**TINY | changes))


def test_a_later_token_changes_no_earlier_logits():
    model, tokens = tiny(), torch.randint(50, (2, 10))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_cached_equals_uncached_in_any_chunks():
    model, tokens = tiny(), torch.randint(50, (2, 12))
    whole, cache = model(tokens), model.new_cache()
    parts = [model(part, cache) for part in tokens.split([5, 1, 4, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_a_full_cache_says_so():
    model = tiny()
    with pytest.raises(ValueError, match="room for 3 positions, not 4"):
        model(torch.zeros(1, 4, dtype=torch.long), model.new_cache(3))


def test_rotary_scores_depend_on_distance_alone():
    config, x = GPTConfig(**TINY), torch.randn(1, 1, 1, 8)

    def turned(position):
        return rotate(x, *rotary_table(config, position, 1, x))

    near = (turned(3) * turned(1)).sum()
    torch.testing.assert_close(near, (turned(19) * turned(17)).sum())
    assert not torch.allclose(near, (turned(4) * turned(1)).sum())


def test_compiled_without_a_break_at_other_lengths():
    model, tokens = tiny(), torch.randint(50, (2, 24))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for length in (5, 9, 13, 24, 2):
        part = tokens[:, :length]
        torch.testing.assert_close(compiled(part), model(part))
    assert len(graphs) == 2  # of the first length, then of any
    torch.testing.assert_close(compiled(tokens[:, :1]), model(tokens[:, :1]))


def test_compiled_with_a_cache():
    model, tokens = tiny(), torch.randint(50, (2, 12))
    cache, compiled = model.new_cache(), torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        parts = [compiled(part, cache) for part in tokens.split([5, 1, 1, 1, 4], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-5, rtol=1e-5)


def test_a_replaced_mlp_is_used_and_trained():
    model, tokens = tiny(), torch.randint(50, (1, 6))
    before = model(tokens)
    model.blocks[1].mlp = torch.nn.Linear(32, 32)
    after = model(tokens)
    assert not torch.allclose(before, after)
    after.sum().backward()
    assert model.blocks[1].mlp.weight.grad.abs().sum() > 0


def test_parameters_are_counted_once():
    tied, untied = tiny(), tiny(tied=False)
    assert untied.n_parameters() - tied.n_parameters() == 50 * 32
    assert tied.n_parameters(embeddings=False) == untied.n_parameters(embeddings=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "dim 32 is not a multiple of n_heads 5"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**TINY | changes)
