"""Padding is no token to a mixture of experts: not routed, not counted, no place taken."""

import pytest
import torch
from torch import nn

from lablib.experts.glam import GLaMFFN
from lablib.experts.moe import MoE, SwiGLUExperts, recorded
from lablib.experts.olmoe import OLMoEFFN
from lablib.experts.routing import (
    ExpertChoice,
    HashChoice,
    RandomChoice,
    SoftSlots,
    TokenChoice,
    hash_by_token,
    random_table,
)
from lablib.experts.switch_transformers import SwitchFFN
from lablib.models import GPT, GPTConfig
from lablib.training import evaluate, padded_next_token_loss
from lablib.training.losses import auxiliary_loss

LENGTHS = (9, 4, 6)


def build(router):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=23, dim=16, n_layers=2, n_heads=2, max_length=16))
    for block in model.blocks:
        block.mlp = MoE(router(), SwiGLUExperts(4, 16, 12))
    return model


def batch(padding):
    """Rows of LENGTHS tokens, filled up with some id: (tokens, mask)."""
    torch.manual_seed(1)
    rows = [torch.randint(23, (n,)) for n in LENGTHS]
    tokens, mask = torch.full((3, 12), padding), torch.zeros(3, 12, dtype=torch.bool)
    for place, row in enumerate(rows):
        tokens[place, : len(row)], mask[place, : len(row)] = row, True
    return tokens, mask


@pytest.mark.parametrize(
    "router",
    [
        lambda: TokenChoice(16, 4, top_k=2, balance=0.1, z=0.1, capacity_factor=0.75),
        lambda: ExpertChoice(16, 4, z=0.1),
    ],
)
def test_padding_changes_no_loss_and_no_gradient(router):
    """What the padding holds, and how much of it there is, makes no difference."""
    seen = []
    for padding, width in ((0, 12), (7, 12), (7, 9)):
        model, (tokens, mask) = build(router).train(), batch(padding)
        total, count = padded_next_token_loss(model, (tokens[:, :width], mask[:, :width]))
        extra = auxiliary_loss(model)
        (total / count + extra).backward()
        seen.append([total, count, extra, *(p.grad for p in model.parameters())])
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0])


def test_padding_is_not_routed():
    model, data = build(lambda: TokenChoice(16, 4)), batch(0)
    with recorded(model) as records:
        evaluate(model, [data], padded_next_token_loss)
    for (record,) in records.values():
        assert record.counts.sum() == len(record.experts) == sum(n - 1 for n in LENGTHS)
    assert all(block.mlp.router.counted is None for block in model.blocks)


def test_without_capacity_padded_rows_score_as_alone():
    model, (tokens, mask) = build(lambda: TokenChoice(16, 4, top_k=2)).eval(), batch(3)
    total, count = padded_next_token_loss(model, (tokens, mask))
    alone = [(row[None, :n], torch.ones(1, n, dtype=torch.bool)) for row, n in zip(tokens, LENGTHS)]
    sums = [padded_next_token_loss(model, one)[0] for one in alone]
    torch.testing.assert_close(total, sum(sums))
    assert count == sum(LENGTHS) - 3


def test_a_hash_takes_the_ids_that_count():
    model, (tokens, mask) = build(lambda: HashChoice(random_table(23, 4), 4)), batch(0)
    hash_by_token(model)
    with recorded(model) as records:
        padded_next_token_loss(model, (tokens, mask))
    table = model.blocks[0].mlp.router.table[:, 0]
    counted = tokens[:, :-1][mask[:, 1:]]
    assert records["blocks.0.mlp"][0].experts[:, 0].tolist() == table[counted].tolist()


def test_a_batch_of_padding_alone():
    model, (tokens, mask) = build(lambda: RandomChoice(4)), batch(0)
    total, count = padded_next_token_loss(model, (tokens, mask & False))
    assert total == count == 0


@pytest.mark.parametrize(
    "router", [lambda: SoftSlots(16, 4), lambda: TokenChoice(16, 4, capacity_of="sequence")]
)
def test_routers_by_sequence_refuse_padding(router):
    with pytest.raises(ValueError, match="treats each sequence apart"):
        padded_next_token_loss(build(router), batch(0))


def test_a_mask_of_other_tokens_is_refused():
    layer = MoE(TokenChoice(16, 4), SwiGLUExperts(4, 16, 12))
    layer.router.counted = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="a mask of 6 for 8 tokens"):
        layer(torch.randn(2, 4, 16))


@pytest.mark.parametrize(
    "definition",
    [
        lambda experts: SwitchFFN(16, experts),
        lambda experts: GLaMFFN(16, experts),
        lambda experts: OLMoEFFN(16, experts, top_k=2),
    ],
    ids=["switch", "glam", "olmoe"],
)
def test_a_definition_that_takes_no_mask_refuses_padding(definition):
    model = GPT(GPTConfig(vocab_size=23, dim=16, n_layers=1, n_heads=2, max_length=12))
    model.blocks[0].mlp = definition([nn.Linear(16, 16) for _ in range(3)])
    tokens, mask = batch(0)
    with pytest.raises(ValueError, match=r"blocks.0.mlp \(.*FFN\) routes padding"):
        padded_next_token_loss(model, (tokens, mask))
    whole, count = padded_next_token_loss(model, (tokens, torch.ones_like(mask)))
    assert whole.isfinite() and count == mask[:, 1:].numel()
