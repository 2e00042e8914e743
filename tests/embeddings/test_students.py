"""Contrastive training of an encoder: it learns, it repeats itself, it trains what it is told."""

import copy
from dataclasses import replace

import pytest
import torch

from lablib.embeddings.encode import Encoder, Prompt
from lablib.embeddings.students import train
from lablib.models.weights import pretrained
from lablib.peft.adapter import trainable
from lablib.peft.lora import lora_

NAMES = ("Adam", "Seth", "Noah", "Ham", "Lot", "Job")
PAIRS = [(f"the house of {name}", f"{name} has a home") for name in NAMES]


@pytest.fixture
def encoder():
    return Encoder(*pretrained("tiny-1m"))


def accuracy(encoder):
    a, b = (encoder(texts) for texts in zip(*PAIRS))
    return (a @ b.t()).argmax(1).eq(torch.arange(len(a))).float().mean().item()


def test_pairs_find_each_other_after_training(encoder):
    losses = train(encoder, PAIRS, 15, 1e-3, batch=6)
    assert len(losses) == 15 and losses[-1] < losses[0] / 4 and accuracy(encoder) == 1.0
    assert all(p.requires_grad for p in encoder.model.parameters())


def test_the_same_seed_gives_the_same_training(encoder):
    other = replace(encoder, model=copy.deepcopy(encoder.model))
    assert train(encoder, PAIRS, 3, 1e-3, batch=4, seed=2) == train(
        other, PAIRS, 3, 1e-3, batch=4, seed=2
    )


def test_hard_negatives_and_a_second_prompt_enter_the_loss(encoder):
    triples = [(a, b, "nobody has a home") for a, b in PAIRS]
    plain = train(replace(encoder, model=copy.deepcopy(encoder.model)), PAIRS, 1, 0.0, batch=6)
    hard = train(replace(encoder, model=copy.deepcopy(encoder.model)), triples, 1, 0.0, batch=6)
    second = replace(encoder, prompt=Prompt("Query: "))
    prompted = train(encoder, PAIRS, 1, 0.0, batch=6, second=second)
    assert hard[0] > plain[0] and prompted[0] != plain[0]


def test_only_what_is_named_learns(encoder):
    before = {n: p.clone() for n, p in encoder.model.state_dict().items()}
    lora_(encoder.model, ("query",), rank=2)
    train(encoder, PAIRS, 3, 1e-2, batch=6, trainable=list(trainable(encoder.model)))
    after = encoder.model.state_dict()
    moved = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert not moved and any(
        "lora" in n or "down" in n or "up" in n for n in after if n not in before
    )


def test_thin_matrices_have_the_rank_that_is_asked_for(encoder, monkeypatch):
    """What LoRA adds to a weight has no more directions than its rank."""
    layer = "blocks.0.attention.query"
    before = encoder.model.get_submodule(layer).weight.detach().clone()
    train(encoder, PAIRS, 3, 1e-2, batch=6, trainable="lora", rank=3)
    added = encoder.model.get_submodule(layer).weight.detach() - before
    assert torch.linalg.matrix_rank(added, rtol=1e-3) == 3


def test_its_own_loss_is_used(encoder):
    assert train(encoder, PAIRS, 2, 0.0, loss=lambda a, b: (a * 0).sum() + 7.0) == [7.0, 7.0]


def test_wrong_pairs_are_refused(encoder):
    for rows in ([], [("a",)], [("a", "b"), ("a", "b", "c")]):
        with pytest.raises(ValueError, match="pairs are two texts each"):
            train(encoder, rows, 1, 1e-3)
    other = replace(encoder, model=copy.deepcopy(encoder.model))
    with pytest.raises(ValueError, match="a model of its own"):
        train(encoder, PAIRS, 1, 1e-3, second=other)
