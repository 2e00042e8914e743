"""The shared layer: equal to transformers' blocks, and what dropping and expert choice promise."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lablib.data import Batches
from lablib.experts.hub import from_hf_switch
from lablib.experts.moe import (
    ExpertList,
    FeedForwardExperts,
    MoE,
    SwiGLUExperts,
    expert_choice,
    load_balancing_loss,
    moe_layers,
    recorded,
    router_z_loss,
    within_capacity,
)
from lablib.models import GPT, GPTConfig, SwiGLU
from lablib.training import fit

X = (3, 10, 16)


@pytest.fixture
def x():
    torch.manual_seed(3)
    return torch.randn(X)


def _same(ours, theirs, x, pairs):
    """Outputs, the input's gradient and the paired parameters' gradients agree."""
    found = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        out = layer(given)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append((out.detach(), given.grad))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)


def _glu_block(name, **options):
    """transformers' block with random weights, and ours with the same."""
    from transformers import MixtralConfig, OlmoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_experts_per_tok": 2}
    if name == "mixtral":
        theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes, num_local_experts=5))
    else:
        theirs = OlmoeSparseMoeBlock(OlmoeConfig(**sizes, num_experts=5, **options))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    after = name == "mixtral" or options.get("norm_topk_prob", False)
    ours = MoE(16, SwiGLUExperts(5, 16, 12), 5, top_k=2, softmax="after" if after else "before")
    pairs = [
        (ours.router.weight, theirs.gate.weight),
        (ours.experts.gate_up, theirs.experts.gate_up_proj),
        (ours.experts.down, theirs.experts.down_proj),
    ]
    for one, other in pairs:
        one.data.copy_(other.data)
    return ours, theirs, pairs


@pytest.mark.parametrize(
    ("name", "options"),
    [("mixtral", {}), ("olmoe", {"norm_topk_prob": False}), ("olmoe", {"norm_topk_prob": True})],
)
def test_equals_transformers_glu_blocks(name, options, x):
    ours, theirs, pairs = _glu_block(name, **options)
    flat = x.flatten(0, 1)
    torch.testing.assert_close(ours.router(flat), theirs.gate(flat)[0])
    _same(ours, theirs, x, pairs)


@pytest.mark.parametrize("capacity", [100, 2, 1])
def test_equals_transformers_switch_block_dropped_tokens_too(capacity, x):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = SwitchTransformersConfig(
        d_model=16, d_ff=12, num_experts=5, expert_capacity=capacity, dropout_rate=0.0
    )
    theirs = SwitchTransformersSparseMLP(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    ours = from_hf_switch(theirs, capacity_factor=capacity * 5 / X[1]).eval()
    assert ours.capacity(X[1]) == capacity
    _same(ours, theirs, x, [(ours.router.weight, theirs.router.classifier.weight)])


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
    capacity=st.integers(1, 8),
    seed=st.integers(0, 10**6),
)
def test_capacity_keeps_first_choices_then_earlier_tokens(
    tokens, top_k, n_experts, sequences, capacity, seed
):
    generator = torch.Generator().manual_seed(seed)
    total = tokens * sequences
    experts = torch.rand(total, n_experts, generator=generator).topk(top_k).indices
    order, counts = within_capacity(experts, n_experts, capacity, sequences)
    places = {}
    kept = set()
    for choice in range(top_k):  # by hand, one assignment after the other
        for token in range(total):
            group = int(experts[token, choice]), token // tokens
            if places.setdefault(group, 0) < capacity:
                places[group] += 1
                kept.add(token * top_k + choice)
    assert set(order.tolist()) == kept
    assert (experts.flatten()[order].diff() >= 0).all()
    assert torch.equal(counts, experts.flatten()[order].bincount(minlength=n_experts))


def test_a_dropped_token_gets_nothing(x):
    layer = MoE(16, FeedForwardExperts(2, 16, 8), 2, capacity_factor=0.2)
    with recorded(layer) as records:
        out = layer(x).flatten(0, 1)
    record = records[""][0]
    dropped = torch.ones(30, dtype=torch.bool)
    dropped[record.token] = False
    assert int(record.counts.max()) <= layer.capacity(30) == 3
    assert dropped.sum() >= 24
    assert (out[dropped] == 0).all() and (out[~dropped] != 0).any(1).all()


def test_expert_choice_fills_every_expert_with_its_best(x):
    layer = MoE(16, SwiGLUExperts(3, 16, 8), 3, choice="expert", capacity_factor=1.0, top_k=2)
    with recorded(layer) as records:
        out = layer(x)
    record = records[""][0]
    assert record.counts.tolist() == [20, 20, 20]  # 30 tokens * 2 / 3 experts
    for expert, chosen in enumerate(record.token.view(3, 20)):
        left = torch.ones(30, dtype=torch.bool)
        left[chosen] = False
        assert record.probs[chosen, expert].min() >= record.probs[left, expert].max()
    expected = torch.zeros(30, 16)
    for expert, chosen in enumerate(record.token.view(3, 20)):
        one_hot = torch.zeros(3, dtype=torch.long)
        one_hot[expert] = 20
        rows = layer.experts(x.flatten(0, 1)[chosen], one_hot)
        expected[chosen] += record.probs[chosen, expert, None] * rows
    torch.testing.assert_close(out.flatten(0, 1), expected)
    by_sequence = expert_choice(record.probs, 4, sequences=3).view(3, 3, 4)
    assert (by_sequence // 10 == torch.arange(3)[None, :, None]).all()


@pytest.mark.parametrize("experts", [FeedForwardExperts(4, 16, 8), SwiGLUExperts(4, 16, 8)])
def test_any_module_can_be_an_expert(experts, x):
    """A list of modules with the same weights gives the same as the grouped weights."""

    class One(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index = torch.zeros(4, dtype=torch.long).index_fill(0, torch.tensor(index), 1)

        def forward(self, rows):
            return experts(rows, self.index * len(rows))

    grouped = MoE(16, experts, 4, top_k=2)
    listed = MoE(16, ExpertList(One(i) for i in range(4)), 4, top_k=2)
    listed.router = grouped.router
    torch.testing.assert_close(grouped(x), listed(x))


def test_shared_experts_are_added(x):
    shared = SwiGLU(GPTConfig(dim=16, ffn_dim=8))
    layer = MoE(16, SwiGLUExperts(4, 16, 8), 4, shared=shared)
    alone = copy.deepcopy(layer)
    alone.shared = None
    torch.testing.assert_close(layer(x), alone(x) + shared(x))


def test_the_router_stays_in_float32(x):
    layer = MoE(16, SwiGLUExperts(4, 16, 8), 4).bfloat16()
    seen = []
    layer.router.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        layer.float()(x)
    assert seen == [torch.float32, torch.float32]


def test_jitter_moves_logits_in_training_only(x):
    layer = MoE(16, SwiGLUExperts(4, 16, 8), 4, jitter=0.5)
    flat = x.flatten(0, 1)
    assert not torch.equal(layer.router(flat), layer.router(flat))
    layer.eval()
    assert torch.equal(layer.router(flat), layer.router(flat))


def test_auxiliary_losses_are_left_in_training_only(x):
    layer = MoE(16, SwiGLUExperts(4, 16, 8), 4, balance=0.5, z=0.25)
    with recorded(layer) as records:
        layer(x)
    record, logits = records[""][0], layer.router(x.flatten(0, 1))
    expected = 0.5 * load_balancing_loss(record.probs, record.counts)
    torch.testing.assert_close(layer.auxiliary_loss, expected + 0.25 * router_z_loss(logits))
    layer.auxiliary_loss = None
    layer.eval()
    layer(x)
    assert layer.auxiliary_loss is None
    assert layer.records is None


def test_fit_trains_it_and_balancing_evens_the_load():
    def spread(balance):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, max_length=16))
        model.blocks[0].mlp = MoE(16, SwiGLUExperts(4, 16, 16), 4, balance=balance)
        nn.init.normal_(model.blocks[0].mlp.router.weight, 0.0, 1.0)  # uneven to begin with
        data = Batches(torch.arange(2000) * 7 % 16, 8, 16)
        history = fit(model, data, steps=60, progress=False)
        with recorded(model) as records:
            model(next(iter(data))[:, :-1])
        (record,) = next(iter(records.values()))
        return history, record.counts.float().std()

    history, evened = spread(0.3)
    assert history.losses[-1] < history.losses[0] - 0.5
    assert evened < spread(0.0)[1]


def test_layers_are_found_by_name():
    model = GPT(GPTConfig(vocab_size=16, dim=16, n_layers=2, n_heads=2))
    model.blocks[1].mlp = MoE(16, SwiGLUExperts(4, 16, 8), 4)
    assert list(moe_layers(model)) == ["blocks.1.mlp"]


def test_says_what_does_not_fit():
    experts = SwiGLUExperts(4, 16, 8)
    with pytest.raises(ValueError, match="nobody"):
        MoE(16, experts, 4, choice="nobody")
    with pytest.raises(ValueError, match="word"):
        MoE(16, experts, 4, capacity_of="word")
    with pytest.raises(ValueError, match="capacity_factor"):
        MoE(16, experts, 4, choice="expert")
