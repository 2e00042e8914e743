"""Routers beside token and expert choice: random, sigmoid, hash and soft ones."""

import copy

import pytest
import torch
from torch import nn

from lablib.experts.moe import ExpertList, MoE, SwiGLUExperts, recorded
from lablib.experts.routing import (
    ExpertChoice,
    HashChoice,
    RandomChoice,
    SigmoidChoice,
    SoftSlots,
    TokenChoice,
    balanced_table,
    hash_by_token,
    random_table,
)
from lablib.models import GPT, GPTConfig


def test_random_choice_draws_distinct_experts_evenly():
    torch.manual_seed(0)
    router = RandomChoice(6, top_k=2)
    token, weight, counts = router(torch.randn(3000, 4))
    assert token.bincount().unique().tolist() == [2]
    assert (counts - 1000).abs().max() < 120  # over four deviations
    assert weight.unique().tolist() == [0.5]
    with pytest.raises(ValueError, match="top_k 7"):
        RandomChoice(6, top_k=7)


def test_a_layer_of_sigmoids_with_a_shared_expert_equals_deepseek_of_transformers():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    sizes = {"hidden_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1}
    sizes |= {"topk_group": 1, "moe_intermediate_size": 12, "n_shared_experts": 1}
    torch.manual_seed(1)
    theirs = DeepseekV3MoE(DeepseekV3Config(routed_scaling_factor=1.0, **sizes)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    experts = SwiGLUExperts(8, 16, 12)
    experts.load_state_dict({
        "gate_up": theirs.experts.gate_up_proj, "down": theirs.experts.down_proj,
    })  # fmt: skip
    ours = MoE(SigmoidChoice(16, 8, top_k=3), experts, shared=theirs.shared_experts)
    ours.router.weight.data.copy_(theirs.gate.weight)
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_sigmoid_choice_needs_two_experts_and_learns():
    with pytest.raises(ValueError, match="learns nothing"):
        SigmoidChoice(16, 8, top_k=1)
    layer = MoE(SigmoidChoice(8, 4, balance=0.1), SwiGLUExperts(4, 8, 8))
    (layer(torch.randn(2, 5, 8)).square().mean() + layer.router.auxiliary_loss).backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_hash_choice_follows_the_table():
    table = torch.tensor([2, 0, 1, 1])
    model = GPT(GPTConfig(vocab_size=4, dim=8, n_layers=2, n_heads=2))
    for block in model.blocks:
        block.mlp = MoE(HashChoice(table, 3), SwiGLUExperts(3, 8, 8))
    tokens = torch.tensor([[0, 1, 2], [3, 3, 0]])
    with pytest.raises(ValueError, match="hash_by_token"):
        model(tokens)
    hash_by_token(model)
    with recorded(model) as records:
        model(tokens)
    for (record,) in records.values():
        assert record.experts.view(2, 3).tolist() == table[tokens].tolist()
    torch.testing.assert_close(copy.deepcopy(model)(tokens), model(tokens))
    with pytest.raises(ValueError, match="outside"):
        HashChoice(table, 2)


def test_a_hash_generates_with_a_cache_as_without():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=16, dim=8, n_layers=2, n_heads=2, max_length=32)).eval()
    for block in model.blocks:
        block.mlp = MoE(HashChoice(random_table(16, 4, 2), 4), SwiGLUExperts(4, 8, 8))
    hash_by_token(model)
    made = model.generate(torch.tensor([[1, 2, 3]]), 6, temperature=0)
    again = torch.tensor([[1, 2, 3]])
    for _ in range(6):
        again = torch.cat([again, model(again)[:, -1:].argmax(-1)], 1)
    assert made.tolist() == again.tolist()


def test_tables():
    assert sorted(random_table(5, 3, top_k=3)[0].tolist()) == [0, 1, 2]
    frequencies = torch.tensor([5.0, 1, 4, 1, 1, 3, 3])
    table = balanced_table(frequencies, 3)
    load = torch.zeros(3).index_add(0, table, frequencies)
    assert load.sum() == 18 and load.max() - load.min() <= 1


def test_soft_slots_equal_their_definition():
    """Algorithm 1 of Soft MoE, slot by slot."""
    torch.manual_seed(0)
    experts = [nn.Linear(6, 6) for _ in range(3)]
    layer = MoE(SoftSlots(6, 3, slots=2), ExpertList(experts))
    nn.init.constant_(layer.router.scale, 3.0)
    x = torch.randn(2, 5, 6)
    expected = torch.zeros_like(x)
    for row, tokens in enumerate(x):
        phi = layer.router.weight / layer.router.weight.norm(dim=1, keepdim=True)
        logits = 3.0 * (tokens / tokens.norm(dim=1, keepdim=True)) @ phi.t()  # (5, 6 slots)
        dispatch, combine = logits.exp() / logits.exp().sum(0), logits.exp()
        combine = combine / combine.sum(1, keepdim=True)
        for slot in range(6):
            slotted = (dispatch[:, slot, None] * tokens).sum(0)
            expected[row] += combine[:, slot, None] * experts[slot // 2](slotted)
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("router", "leaks"),
    [
        (lambda: TokenChoice(16, 4), False),
        (lambda: SigmoidChoice(16, 4), False),
        (lambda: ExpertChoice(16, 4, capacity_of="sequence"), True),
        (lambda: SoftSlots(16, 4, slots=4), True),
    ],
)
def test_who_sees_the_future(router, leaks):
    """Changing the last token changes an earlier logit where experts choose or slots mix."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=16, dim=16, n_layers=1, n_heads=2)).eval()
    model.blocks[0].mlp = MoE(router(), SwiGLUExperts(4, 16, 16))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randint(16, (1, 16))
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % 16
    with torch.no_grad():
        moved = (model(tokens) - model(other))[:, :-1].abs().max().item()
    assert (moved > 1e-3) == leaks
