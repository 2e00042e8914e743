"""The shared layer: equal to transformers' blocks, with any experts, shared ones and balancing."""

import copy

import pytest
import torch
from torch import nn

from lablib.data import Batches
from lablib.experts.hub import from_hf_switch
from lablib.experts.moe import (
    ExpertList,
    FeedForwardExperts,
    MoE,
    SwiGLUExperts,
    moe_layers,
    observed,
    recorded,
)
from lablib.experts.routing import TokenChoice, capacity
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
    router = TokenChoice(16, 5, top_k=2, softmax="after" if after else "before")
    ours = MoE(router, SwiGLUExperts(5, 16, 12))
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
    torch.testing.assert_close(ours.router.logits(flat), theirs.gate(flat)[0])
    _same(ours, theirs, x, pairs)


@pytest.mark.parametrize("places", [100, 2, 1])
def test_equals_transformers_switch_block_dropped_tokens_too(places, x):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = SwitchTransformersConfig(
        d_model=16, d_ff=12, num_experts=5, expert_capacity=places, dropout_rate=0.0
    )
    theirs = SwitchTransformersSparseMLP(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    ours = from_hf_switch(theirs, capacity_factor=places * 5 / X[1]).eval()
    assert capacity(X[1], 5, places * 5 / X[1]) == places
    _same(ours, theirs, x, [(ours.router.weight, theirs.router.classifier.weight)])


@pytest.mark.parametrize("experts", [FeedForwardExperts(4, 16, 8), SwiGLUExperts(4, 16, 8)])
def test_any_module_can_be_an_expert(experts, x):
    """A list of modules with the same weights gives the same as the grouped weights."""

    class One(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index = torch.zeros(4, dtype=torch.long).index_fill(0, torch.tensor(index), 1)

        def forward(self, rows):
            return experts(rows, self.index * len(rows))

    grouped = MoE(TokenChoice(16, 4, top_k=2), experts)
    listed = MoE(grouped.router, ExpertList(One(i) for i in range(4)))
    torch.testing.assert_close(grouped(x), listed(x))


def test_shared_experts_are_added(x):
    shared = SwiGLU(GPTConfig(dim=16, ffn_dim=8))
    layer = MoE(TokenChoice(16, 4), SwiGLUExperts(4, 16, 8), shared=shared)
    alone = copy.deepcopy(layer)
    alone.shared = None
    torch.testing.assert_close(layer(x), alone(x) + shared(x))


def test_fit_trains_it_and_balancing_evens_the_load():
    def spread(balance):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2, max_length=16))
        model.blocks[0].mlp = MoE(TokenChoice(16, 4, balance=balance), SwiGLUExperts(4, 16, 16))
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
    model.blocks[1].mlp = MoE(TokenChoice(16, 4), SwiGLUExperts(4, 16, 8))
    assert list(moe_layers(model)) == ["blocks.1.mlp"]


def test_observers_within_observers_take_turns(x):
    layer, outer = MoE(TokenChoice(16, 4), SwiGLUExperts(4, 16, 8)), []
    with observed(layer, lambda name, layer, record: outer.append(record)):
        layer(x)
        with recorded(layer) as records:
            layer(x)
        layer(x)
    layer(x)
    assert len(outer) == 2 and len(records[""]) == 1
