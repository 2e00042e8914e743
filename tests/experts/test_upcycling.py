"""Upcycling: what is copied and scaled, and where the newborn function is the dense one's."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from lablib.exercises import upcycling as exercises
from lablib.experts import upcycling as up
from lablib.experts.moe import moe_layers, recorded
from lablib.models import GPT, GPTConfig, anatomy, pretrained
from lablib.models.flops import flops_per_token
from lablib.models.hub import from_hf
from lablib.studies import upcycling as study
from lablib.training import evaluate

OUTER = ("up", "down")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(**options):
    sizes = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "max_length": 32}
    return GPT(GPTConfig(**sizes | {"ffn_dim": 48, "init_std": 0.3} | options))


def tokens(rows=3, length=20):
    return torch.randint(40, (rows, length))


def weights(width=12, dim=6):
    return torch.randn(width, dim), torch.randn(width, dim), torch.randn(dim, width)


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_experts_are_copies_of_shards_whose_sum_is_the_dense_layer():
    gate, up_, down = weights()
    layer = up.upcycled((gate, up_, down), 2, 3, 3, scaled=())
    assert layer.experts.gate_up.shape == (6, 8, 6) and layer.experts.down.shape == (6, 6, 4)
    x = torch.randn(5, 6)
    for row in range(2):
        parts = []
        for shard in range(3):
            mine = layer.experts.gate_up[3 * row + shard]
            parts.append(swiglu(x, mine[:4], mine[4:], layer.experts.down[3 * row + shard]))
            assert torch.equal(mine[:4], gate[4 * shard : 4 * shard + 4])
        torch.testing.assert_close(sum(parts), swiglu(x, gate, up_, down))


def test_virtual_groups_choose_one_of_each_shard_and_naive_ones_do_not():
    x = torch.randn(200, 6)
    shards = {}
    for virtual in (True, False):
        layer = up.upcycled(weights(), 4, 3, 3, virtual=virtual)
        with recorded(torch.nn.Sequential(layer)) as records:
            layer(x)
        chosen = records["0"][0].experts % 3  # (200, 3): which shard each is
        shards[virtual] = (chosen.sort(1).values == torch.arange(3)).all(1).float().mean()
    assert shards[True] == 1 and shards[False] < 0.5


CASES = list(
    itertools.product([(4, 1, 1), (4, 1, 2), (4, 1, 4), (2, 3, 3), (2, 3, 6), (4, 3, 6)],
                      ["before", "after"], [True, False], [(), OUTER, up.ROLES])
)  # fmt: skip


@pytest.mark.parametrize(("sizes", "softmax", "virtual", "scaled"), CASES)
def test_the_newborn_function_is_the_dense_one_where_theory_says_so(
    sizes, softmax, virtual, scaled
):
    dense, text = small().eval(), tokens()
    options = {"virtual": virtual, "scaled": scaled}
    model = up.upcycle_(copy.deepcopy(dense), *sizes, softmax, **options)
    for layer in moe_layers(model).values():
        layer.router.weight.data.mul_(20)
    equal = torch.allclose(model(text), dense(text), atol=1e-4)
    assert equal == up.keeps_function(*sizes, softmax, **options)


def test_near_uniform_routers_need_the_papers_factor():
    dense = weights()
    x = torch.randn(50, 6)
    for sizes in ((8, 1, 1), (8, 1, 2), (4, 3, 3), (4, 3, 6)):
        layer = up.upcycled(dense, *sizes, scaled=OUTER)
        layer.router.weight.data.mul_(1e-4)
        torch.testing.assert_close(layer(x), swiglu(x, *dense), rtol=1e-3, atol=1e-3)


def test_the_factor_is_the_papers():
    assert up.weight_scale(8, 8, 8) == pytest.approx(4)  # section 3.5: 64 experts, top-8
    assert up.weight_scale(8, 1, 1) == pytest.approx(2)
    assert up.output_factor(8, 1, 2, "after") == 1 and up.output_factor(8, 4, 4, "after") == 4


def test_the_scale_is_shared_by_the_matrices_named():
    dense = weights()
    plain = up.upcycled(dense, 8, 2, 2, scaled=())
    for scaled in (up.ROLES, OUTER, ("down",)):
        layer = up.upcycled(dense, 8, 2, 2, scaled=scaled)
        gate, upper = layer.experts.gate_up.chunk(2, 1)
        gate_, upper_ = plain.experts.gate_up.chunk(2, 1)
        each = 16 ** (1 / len(scaled))
        for role, mine, other in (
            ("gate", gate, gate_),
            ("up", upper, upper_),
            ("down", layer.experts.down, plain.experts.down),
        ):
            torch.testing.assert_close(mine, other * (each if role in scaled else 1))


def test_squared_relu_makes_the_cube_root_exact():
    """The paper's derivation: W1 and W2 scaled by s give s^3 times the output."""
    x, w1, w2 = torch.randn(5, 4), torch.randn(8, 4), torch.randn(4, 8)
    s = up.weight_scale(8, 4, 4)
    out = F.relu(x @ (s * w1).T).square() @ (s * w2).T
    dense = F.relu(x @ w1.T).square() @ w2.T
    torch.testing.assert_close(out, up.output_factor(8, 4, 4) * dense)


def test_bad_sizes_are_refused_and_the_model_left_as_it_was():
    model = small()
    before = [block.mlp for block in model.blocks]
    with pytest.raises(ValueError, match="width of 48 can't be cut into 5"):
        up.upcycle_(model, 2, 5, 5)
    with pytest.raises(ValueError, match="middle is none of gate, up, down"):
        up.upcycle_(model, 2, scaled=("middle",))
    with pytest.raises(ValueError, match="has biases"):
        up.upcycle_(small(mlp_bias=True), 2)
    assert [block.mlp for block in model.blocks] == before
    up.upcycle_(model, 2, blocks=[1])
    assert list(moe_layers(model)) == ["blocks.1.mlp"]
    with pytest.raises(ValueError, match="block 1 is a mixture of experts already"):
        up.upcycle_(model, 2)


def test_it_works_on_a_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=16, **sizes)
    model, text = transformers.LlamaForCausalLM(config).eval(), tokens()
    expected = anatomy.logits(model, text)
    up.upcycle_(model, 4, 2, 2, "after", scaled=OUTER)
    torch.testing.assert_close(anatomy.logits(model, text), expected)


@pytest.mark.parametrize("expansion", [1, 4])
def test_a_pretrained_llama_learns_on_from_its_own_function_and_stays_as_it_was(expansion):
    transformers = pytest.importorskip("transformers")
    _, tokenizer = pretrained("tiny-1m")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, **sizes)
    model = from_hf(transformers.LlamaForCausalLM(config)).eval()
    kept, (_, held_out) = copy.deepcopy(model), study.django(tokenizer, 20, 32)
    losses = study.learns_on(model, tokenizer, expansion, steps=2, documents=20, length=32)
    assert [step for step, _ in losses] == [0, 1, 2]
    assert losses[0][1] == pytest.approx(evaluate(model, held_out), rel=1e-5) != losses[2][1]
    same = zip(model.parameters(), kept.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


def test_the_dense_model_is_not_changed_by_training_the_experts():
    dense = small()
    kept = dense.blocks[0].mlp.gate.weight.clone()
    layer = up.upcycled(up.dense_weights(dense, 0), 2)
    layer.experts.gate_up.data.add_(1)
    assert torch.equal(dense.blocks[0].mlp.gate.weight, kept)


def test_flops_follow_the_active_width():
    config = small().config
    dense = flops_per_token(config, 32)
    assert up.active_flops(config, 32) == dense
    fine, coarse = (up.active_flops(config, 32, *sizes) for sizes in ((8, 4, 4), (8, 1, 1)))
    assert coarse - dense == 2 * 2 * 16 * 8 and fine - dense == 2 * 2 * 16 * 32
    two = up.active_flops(config, 32, 8, 1, 2)
    assert two - coarse == 2 * 2 * 3 * 16 * 48


def test_similarity_is_one_at_birth_and_the_mean_of_cosines_later():
    dense = weights()
    layer = up.upcycled(dense, 2, 3, 3)
    assert up.similarity(layer, dense) == pytest.approx(1, abs=1e-6)
    layer.experts.down.data[3:] *= -1
    layer.experts.gate_up.data[3:] *= -1
    assert up.similarity(layer, dense) == pytest.approx(0, abs=1e-6)


def interleaves_copies(up_, expansion, granularity):
    return exercises._shards(up_, 1, granularity).repeat_interleave(expansion, 0)


def takes_every_gth(up_, expansion, granularity):
    return torch.stack([up_[g::granularity] for g in range(granularity)]).repeat(expansion, 1, 1)


def forgets_granularity(weights, granularity):
    return 1 / weights.sum(1)


def upside_down(weights, granularity):
    return weights.sum(1) / granularity


def one_matrix(weights, granularity):
    return (granularity / weights.sum(1)) ** (1 / 3)


def by_shard(rows, granularity, order):
    return rows[order % len(rows)]


def ignores_order(rows, granularity, order):
    return rows.repeat_interleave(granularity, 0)


WRONG = {
    "shards": [interleaves_copies, takes_every_gth],
    "too_small": [forgets_granularity, upside_down, one_matrix],
    "virtual_router": [by_shard, ignores_order],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
