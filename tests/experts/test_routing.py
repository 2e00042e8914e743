"""Routers: what they choose, what finds a place, and a router of one's own."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lablib.experts.moe import ExpertList, FeedForwardExperts, MoE, SwiGLUExperts, recorded
from lablib.experts.routing import (
    ExpertChoice,
    LinearRouter,
    Router,
    TokenChoice,
    best_tokens,
    capacity,
    load_balancing_loss,
    router_z_loss,
    within_capacity,
)
from lablib.models import GPT, GPTConfig
from lablib.training.losses import auxiliary_loss


@pytest.fixture
def x():
    torch.manual_seed(3)
    return torch.randn(3, 10, 16)


@pytest.mark.parametrize("top_k", [1, 2])
def test_losses_equal_transformers(top_k):
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    layers = [torch.randn(20, 6) for _ in range(3)]
    probs = torch.cat(layers).softmax(-1)
    experts = probs.topk(top_k).indices
    ours = load_balancing_loss(probs, experts.flatten().bincount(minlength=6))
    torch.testing.assert_close(ours, load_balancing_loss_func(tuple(layers), 6, top_k))
    logits = layers[0]
    torch.testing.assert_close(router_z_loss(logits), switch.router_z_loss_func(logits[None]))
    if top_k == 1:
        one = logits.softmax(-1)
        counts = one.argmax(1).bincount(minlength=6)
        theirs = switch.load_balancing_loss_func(one[None], one.argmax(1)[None, :, None])
        torch.testing.assert_close(load_balancing_loss(one, counts), theirs)


def test_balancing_loss_is_top_k_when_even_and_n_at_worst():
    even = torch.full((12, 4), 0.25)
    torch.testing.assert_close(load_balancing_loss(even, torch.full((4,), 6)), torch.tensor(2.0))
    one = F.one_hot(torch.zeros(12, dtype=torch.long), 4).float()
    torch.testing.assert_close(
        load_balancing_loss(one, torch.tensor([12, 0, 0, 0])), torch.tensor(4.0)
    )


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 12),
    top_k=st.integers(1, 3),
    n_experts=st.integers(3, 5),
    sequences=st.integers(1, 3),
    places=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
def test_capacity_keeps_first_choices_then_earlier_tokens(
    tokens, top_k, n_experts, sequences, places, seed
):
    generator = torch.Generator().manual_seed(seed)
    total = tokens * sequences
    experts = torch.rand(total, n_experts, generator=generator).topk(top_k).indices
    order, counts = within_capacity(experts, n_experts, places, sequences)
    taken = {}
    kept = set()
    for choice in range(top_k):  # by hand, one assignment after the other
        for token in range(total):
            group = int(experts[token, choice]), token // tokens
            if taken.setdefault(group, 0) < places:
                taken[group] += 1
                kept.add(token * top_k + choice)
    assert set(order.tolist()) == kept
    assert (experts.flatten()[order].diff() >= 0).all()
    assert torch.equal(counts, experts.flatten()[order].bincount(minlength=n_experts))


def test_capacity_is_the_ceiling_of_exact_arithmetic():
    assert capacity(40, 4, 1.1) == 11  # in binary 1.1 * 10 is a little more
    assert capacity(10, 4, 1.0, top_k=2) == 5
    assert capacity(1, 64, 0.5) == 1
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is not above 0"):
            capacity(10, 4, wrong)


def test_a_dropped_token_gets_nothing(x):
    layer = MoE(TokenChoice(16, 2, capacity_factor=0.2), FeedForwardExperts(2, 16, 8))
    with recorded(layer) as records:
        out = layer(x).flatten(0, 1)
    record = records[""][0]
    dropped = torch.ones(30, dtype=torch.bool)
    dropped[record.token] = False
    assert int(record.counts.max()) <= capacity(30, 2, 0.2) == 3
    assert dropped.sum() >= 24
    assert (out[dropped] == 0).all() and (out[~dropped] != 0).any(1).all()


def test_a_capacity_of_sequences_needs_to_know_them(x):
    options = {"capacity_factor": 0.2, "capacity_of": "sequence"}
    layer = MoE(TokenChoice(16, 2, **options), FeedForwardExperts(2, 16, 8))
    with recorded(layer) as records:
        layer(x)
    rows = records[""][0].token.bincount(minlength=30).view(3, 10).sum(1)
    assert (rows <= 2).all() and (rows > 0).all()  # one place an expert in each sequence
    with pytest.raises(ValueError, match="where a sequence ends"):
        layer(x.flatten(0, 1))
    layer.eval()
    torch.testing.assert_close(layer(x.flatten(0, 1)), layer(x).flatten(0, 1))
    expert_choice = MoE(ExpertChoice(16, 2, capacity_of="sequence"), FeedForwardExperts(2, 16, 8))
    with pytest.raises(ValueError, match="where a sequence ends"):
        expert_choice(x[0])


def model_of(**options):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=16, dim=16, n_layers=2, n_heads=2, init_std=0.2))
    for block in model.blocks:
        router = TokenChoice(16, 4, **options)
        nn.init.normal_(router.weight)
        block.mlp = MoE(router, SwiGLUExperts(4, 16, 16))
        for parameter in block.mlp.experts.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    return model.eval()


def company(model):
    """How far a text's logits move beside seven others, and by the token after it."""
    text = torch.randint(16, (8, 12), generator=torch.Generator().manual_seed(1))
    alone, later = model(text[-1:]), text[-1:].clone()
    later[0, -1] = (later[0, -1] + 1) % 16
    return (
        (model(text)[-1:] - alone).abs().max().item(),
        (model(later) - alone)[:, :-1].abs().max().item(),
    )


def test_logits_in_eval_mode_depend_on_no_other_text_and_no_later_token():
    assert max(company(model_of(capacity_factor=0.5))) < 1e-5
    beside, _ = company(model_of(eval_capacity_factor=0.5))
    assert beside > 0.1, "a capacity of the batch does what the docstring says"


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"capacity_factor": 0.5}])
def test_generation_with_a_cache_equals_generation_without(options):
    model, prompt = model_of(**options), torch.randint(16, (3, 5))
    cached = model.generate(prompt, 20, greedy=True)
    assert torch.equal(cached, model.generate(prompt, 20, greedy=True, use_cache=False))


def test_expert_choice_fills_every_expert_with_its_best(x):
    layer = MoE(ExpertChoice(16, 3, capacity_factor=2.0), SwiGLUExperts(3, 16, 8))
    with recorded(layer) as records:
        out = layer(x)
    record = records[""][0]
    assert record.counts.tolist() == [20, 20, 20]  # 30 tokens * 2 / 3 experts
    expected = torch.zeros(30, 16)
    for expert, chosen in enumerate(record.token.view(3, 20)):
        left = torch.ones(30, dtype=torch.bool)
        left[chosen] = False
        assert record.probs[chosen, expert].min() >= record.probs[left, expert].max()
        one_hot = torch.zeros(3, dtype=torch.long)
        one_hot[expert] = 20
        rows = layer.experts(x.flatten(0, 1)[chosen], one_hot)
        expected[chosen] += record.probs[chosen, expert, None] * rows
    torch.testing.assert_close(out.flatten(0, 1), expected)
    by_sequence = best_tokens(record.probs, 4, sequences=3).view(3, 3, 4)
    assert (by_sequence // 10 == torch.arange(3)[None, :, None]).all()


def test_expert_choice_leaves_its_z_loss(x):
    layer = MoE(ExpertChoice(16, 3, z=0.5), SwiGLUExperts(3, 16, 8))
    layer(x)
    expected = 0.5 * router_z_loss(layer.router.logits(x.flatten(0, 1)))
    torch.testing.assert_close(auxiliary_loss(layer), expected)


class Sigmoid(LinearRouter):
    def forward(self, x, sequences=None):
        weights, experts = self.logits(x).sigmoid().topk(2)
        return self.assign(experts, weights / weights.sum(1, keepdim=True))


class Slots(LinearRouter):
    """Soft MoE with one slot an expert: an expert sees one mean of tokens."""

    def forward(self, x, sequences=None):
        self.scores = self.logits(x)  # (tokens, n_experts)
        return self

    def mix(self, experts, x):
        slots = self.scores.softmax(0).t() @ x  # (n_experts, dim)
        counts = torch.ones(self.n_experts, dtype=torch.long)
        return self.scores.softmax(1) @ experts(slots, counts)  # (tokens, dim)


def test_a_router_of_ones_own_is_a_few_lines(x):
    layer, flat = MoE(Sigmoid(16, 4), SwiGLUExperts(4, 16, 8)), x.flatten(0, 1)
    with recorded(layer) as records:
        out = layer(x).flatten(0, 1)
    record = records[""][0]
    assert record.experts.shape == (30, 2) and int(record.counts.sum()) == 60
    scores = layer.router.logits(flat).sigmoid()
    for token in (0, 17):
        best = scores[token].topk(2)
        expected = torch.zeros(16)
        for score, expert in zip(best.values, best.indices):
            one = F.one_hot(expert, 4)
            expected += score / best.values.sum() * layer.experts(flat[token, None], one)[0]
        torch.testing.assert_close(out[token], expected)


def test_a_soft_router_mixes_by_itself(x):
    layer, flat = MoE(Slots(16, 4), ExpertList(nn.Linear(16, 16) for _ in range(4))), x[0]
    scores = layer.router.logits(flat)
    slots = scores.softmax(0).t() @ flat
    rows = torch.stack([one(slot) for one, slot in zip(layer.experts.experts, slots)])
    torch.testing.assert_close(layer(flat), scores.softmax(1) @ rows)


def test_the_router_stays_in_float32(x):
    layer = MoE(TokenChoice(16, 4), SwiGLUExperts(4, 16, 8)).bfloat16()
    flat = x.flatten(0, 1)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer.router.logits(flat.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        layer.float()(x)
        logits = layer.router.logits(flat)
    assert torch.equal(logits, flat @ layer.router.weight.t())


def test_jitter_moves_logits_in_training_only(x):
    router, flat = TokenChoice(16, 4, jitter=0.5), x.flatten(0, 1)
    assert not torch.equal(router.logits(flat), router.logits(flat))
    router.eval()
    assert torch.equal(router.logits(flat), router.logits(flat))


def test_auxiliary_losses_are_left_in_training_only(x):
    layer = MoE(TokenChoice(16, 4, balance=0.5, z=0.25), SwiGLUExperts(4, 16, 8))
    with recorded(layer) as records:
        layer(x)
    record, logits = records[""][0], layer.router.logits(x.flatten(0, 1))
    expected = 0.5 * load_balancing_loss(record.probs, record.counts)
    torch.testing.assert_close(auxiliary_loss(layer), expected + 0.25 * router_z_loss(logits))
    layer.eval()
    layer(x)
    assert auxiliary_loss(layer) == 0
    assert layer.router.observer is None


def test_a_layer_can_be_copied_and_pickled_after_a_step(x):
    layer = MoE(TokenChoice(16, 4, balance=0.5), SwiGLUExperts(4, 16, 8))
    with recorded(layer):
        out = layer(x)
        assert layer.router.auxiliary_loss.requires_grad
        twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in twins:
        assert twin.router.auxiliary_loss is None and twin.router.observer is None
        assert torch.equal(twin(x), out)
    assert layer.router.auxiliary_loss is not None, "what is copied keeps its own"


@pytest.mark.parametrize("factor", [0, -1.0, float("nan")])
@pytest.mark.parametrize("where", ["capacity_factor", "eval_capacity_factor"])
def test_capacities_of_nothing_are_refused(where, factor):
    with pytest.raises(ValueError, match="is not above 0; None drops nothing"):
        TokenChoice(16, 4, **{where: factor})
    with pytest.raises(ValueError, match="is not above 0"):
        ExpertChoice(16, 4, factor)


def test_says_what_does_not_fit(x):
    with pytest.raises(ValueError, match="'word' is neither"):
        TokenChoice(16, 4, capacity_of="word")
    with pytest.raises(ValueError, match="from 4 experts, not 5"):
        MoE(TokenChoice(16, 4), SwiGLUExperts(5, 16, 8))
    with pytest.raises(NotImplementedError):
        MoE(Router(4), SwiGLUExperts(4, 16, 8))(x)
