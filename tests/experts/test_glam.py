"""GLaM: the layer against its definition and by hand, the filter, and the counts of Table 4."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lablib.exercises import glam as exercises
from lablib.experts import glam
from lablib.experts.accounting import parameters
from lablib.experts.moe import MoE, moe_layers
from lablib.models import GPT, GPTConfig
from lablib.studies import glam as study
from lablib.training.losses import auxiliary_loss


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("places", [3, 6, 10, 40])
def test_a_capacity_keeps_what_transformers_keeps(places):
    """NLLB's top-2 router is GShard's: first choices first, earlier tokens before later ones."""
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    tokens, dim, n = 40, 6, 4
    config = NllbMoeConfig(
        hidden_size=dim,
        num_experts=n,
        expert_capacity=places,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        router_bias=False,
        router_dtype="float32",
    )
    theirs = NllbMoeTop2Router(config).train()
    factor = places * n / (2 * tokens)
    ours = glam.TopTwo(dim, n, capacity_factor=factor).train()
    ours.weight.data.copy_(theirs.classifier.weight.data)
    x = torch.randn(tokens, dim)
    made = ours(x)
    expert = torch.arange(n).repeat_interleave(made.counts)
    weights = torch.zeros(tokens, n)
    weights[made.token, expert] = made.weight
    _, kept = theirs.route_tokens(theirs.classifier(x))
    torch.testing.assert_close(weights, kept, atol=1e-6, rtol=0)
    assert made.counts.max() <= places


class Expert(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.up)), self.down)


def both_layers(n=5, dim=6, width=10):
    fast = glam.glam_layer(dim, width, n)
    for weight in fast.parameters():
        weight.data.normal_(0, 0.5)
    pairs = zip(fast.experts.up.data, fast.experts.down.data)
    definition = glam.GLaMFFN(dim, [Expert(*pair) for pair in pairs])
    definition.gate.weight.data.copy_(fast.router.weight)
    return definition, fast


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(29, 6), (3, 17, 6), (1, 6)])
def test_the_fast_layer_is_the_definition(shape, training):
    definition, fast = both_layers()
    x = torch.randn(shape)
    sides = []
    for layer, gate in ((definition, definition.gate), (fast, fast.router)):
        given = x.clone().requires_grad_()
        y = layer.train(training)(given)
        loss = auxiliary_loss(layer)
        assert torch.is_tensor(loss) == training
        (y.square().sum() + loss).backward()
        sides.append([y.detach(), torch.as_tensor(loss), given.grad, gate.weight.grad])
    for ours, theirs in zip(*sides):
        torch.testing.assert_close(ours, theirs)
    for at, expert in enumerate(definition.experts):
        up = torch.zeros_like(expert.up) if expert.up.grad is None else expert.up.grad
        torch.testing.assert_close(fast.experts.up.grad[at], up)


def test_a_token_gets_its_two_best_experts_by_their_shares():
    definition, _ = both_layers()
    x = torch.randn(4, 6)
    scores = x @ definition.gate.weight.t()
    for row, score, y in zip(x, scores, definition.eval()(x)):
        a, b = score.topk(2).indices.tolist()
        first = 1 / (1 + math.exp((score[b] - score[a]).item()))
        expected = first * definition.experts[a](row) + (1 - first) * definition.experts[b](row)
        torch.testing.assert_close(y, expected)


def test_the_balancing_loss_counts_first_choices():
    _, fast = both_layers(n=4)
    fast.router.weight.data.zero_()
    fast.router.weight.data[0] = 4.0
    fast.router.weight.data[1] = 3.9
    x = torch.rand(20, 6) + 0.5
    fast(x)
    p = (x @ fast.router.weight.t()).softmax(-1).mean(0)
    torch.testing.assert_close(auxiliary_loss(fast), 0.01 * 4 * p[0])


def small(n_layers=4, **options):
    sizes = {"vocab_size": 40, "dim": 16, "n_heads": 2, "max_length": 32, "ffn_dim": 32}
    return GPT(GPTConfig(n_layers=n_layers, **sizes | options))


def test_every_other_block_gets_experts_and_the_rest_geglu():
    model = glam.glam_(small(), 8)
    kinds = [isinstance(block.mlp, MoE) for block in model.blocks]
    assert kinds == [True, False, True, False]
    assert isinstance(model.blocks[1].mlp, glam.GEGLU)
    assert model(torch.randint(40, (2, 9))).shape == (2, 9, 40)
    assert not moe_layers(glam.glam_(small(), 0))
    with pytest.raises(ValueError, match="two experts at least"):
        glam.glam_(small(), 1)


def test_geglu_is_gated_by_a_gelu():
    part = glam.GEGLU(6, 10)
    x = torch.randn(3, 6)
    gate, up = F.linear(x, part.gate.weight), F.linear(x, part.up.weight)
    torch.testing.assert_close(part(x), F.linear(F.gelu(gate) * up, part.down.weight))


def test_the_studys_models_have_as_many_active_parameters_but_for_the_gates():
    dense, sparse = (parameters(study.build(0, n)) for n in (0, 16))
    assert sparse.active - dense.active == (study.LAYERS + 1) // 2 * study.DIM * 16
    assert sparse.total > 3 * dense.total / 2 and dense.total == dense.active


@pytest.mark.parametrize("name", ["0.1B", "0.1B/64E", "1.7B/32E"])
def test_counts_are_those_of_a_model_that_is_built(name):
    sizes = glam.TABLE_4[name].sizes
    config = GPTConfig(
        vocab_size=500,
        dim=sizes.dim,
        ffn_dim=sizes.ffn,
        n_layers=sizes.layers,
        n_heads=sizes.heads,
        head_dim=sizes.head_dim,
    )
    with torch.device("meta"):
        model = glam.glam_(GPT(config), sizes.experts)
    norms = (2 * sizes.layers + 1) * sizes.dim
    built = parameters(model)
    assert built.total - norms == glam.parameters(sizes, 500)
    assert built.active - norms == glam.parameters(sizes, 500, top_k=2)


def test_gpt3_has_175_billion_parameters_and_the_chips_took_213_megawatt_hours():
    assert round(glam.gpt3_parameters() / 1e9) == 175
    assert round(glam.training_energy(1024, 574, 326, 1.11)) == 213


def test_the_classifier_tells_pages_by_their_words():
    good = [f"the king said unto {name} go thou" for name in "abcdefghij"] * 4
    bad = [f"msgid {n} msgstr {n} %s" for n in range(40)]
    judge = glam.QualityClassifier.trained(good, bad[:35] + good[:5], epochs=20)
    scores = judge.scores(["the king said go", "msgid 99 msgstr %s", ""])
    assert scores[0] > 0.7 > 0.3 > scores[1] and 0 < scores[2] < 1
    again = glam.QualityClassifier.trained(good, bad[:35] + good[:5], epochs=20)
    assert np.array_equal(judge.scores(good[:3]), again.scores(good[:3]))


def test_a_pages_logit_is_the_mean_weight_of_its_words_and_a_bias():
    judge = glam.QualityClassifier(64)
    judge.weight.weight.data.normal_()
    judge.bias.data.fill_(0.5)
    pages = glam.hashed(["a b a", "c!"], 64)
    assert pages[0][0] == pages[0][2] and [len(page) for page in pages] == [3, 2]
    expected = judge.weight.weight[pages[0], 0].mean() + 0.5
    torch.testing.assert_close(judge(pages)[0], expected)
    assert judge.scores(["a b a"])[0] == pytest.approx(torch.sigmoid(expected).item())


@pytest.mark.parametrize("alpha", [2.0, 9.0])
def test_pages_are_kept_with_the_pareto_distributions_chance(alpha):
    scores = np.repeat([0.0, 0.5, 0.9, 1.0], 20_000)
    kept = glam.pareto_kept(scores, alpha).reshape(4, -1).mean(1)
    chances = glam.keep_probability(np.array([0.0, 0.5, 0.9, 1.0]), alpha)
    assert np.allclose(kept, chances, atol=0.015) and kept[-1] == 1


def test_the_control_keeps_as_many_pages_but_others(monkeypatch):
    pages = [f"the king {n}" for n in range(50)] + [f"msgid {n}" for n in range(50)]
    monkeypatch.setattr(
        study, "web", lambda: {"pages": pages, "curated": pages[:50], "sample": pages[::2]}
    )
    study.classifier.cache_clear()
    whole, some, drawn = (study.kept(text) for text in ("unfiltered", "filtered", "random"))
    study.classifier.cache_clear()
    assert whole.sum() == 34 and some.sum() == drawn.sum() < 100 and (some != drawn).any()
    assert some[:50].sum() > 2 * some[50:].sum()


def first_share(gap):
    return 1 / (1 + (-gap).exp())


def ratio(gap):
    return (-gap).exp()


def counted(layers, dim, ffn, inner, n_experts, vocabulary, *, per_expert=2, gates=1, used=2):
    shared = layers * 4 * dim * inner + vocabulary * dim
    shared += layers // 2 * (3 * dim * ffn + gates * dim * n_experts)
    expert = layers // 2 * per_expert * dim * ffn
    return shared + n_experts * expert, shared + used * expert


def gated_experts(*sizes):
    return counted(*sizes, per_expert=3)


def without_gates(*sizes):
    return counted(*sizes, gates=0)


def one_expert(*sizes):
    return counted(*sizes, used=1)


def of_the_mean(scores, alpha):
    return float((2 - scores.mean()) ** -alpha)


def of_the_score(scores, alpha):
    return float(np.mean((1 + scores) ** -alpha))


WRONG = {
    "second_share": [first_share, ratio],
    "total_and_active": [gated_experts, without_gates, one_expert],
    "kept_share": [of_the_mean, of_the_score],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
