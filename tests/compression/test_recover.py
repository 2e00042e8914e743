import pytest
import torch

from lablib.compression import importance, structures
from lablib.compression import recover as r
from lablib.models import GPT, GPTConfig, anatomy
from lablib.peft.lora import LoRALinear


def small_model():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=20, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, init_std=0.2)
    return GPT(config)


@pytest.fixture
def rows():
    torch.manual_seed(3)
    return torch.randint(20, (1, 9)).repeat(12, 1)  # one row that can be learned


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_training_lowers_the_loss_and_repeats_from_its_seed(rows):
    one, two = small_model(), small_model()
    losses = r.recover(one, rows, 30, 1e-2)
    assert losses[-1] < losses[0] / 2 and len(losses) == 30
    assert r.recover(two, rows, 30, 1e-2) == losses


def test_rows_are_all_seen_before_one_comes_again():
    steps = r.drawn(10, batch=4, steps=5, seed=0)
    assert [len(places) for places in steps] == [4] * 5
    order = torch.cat(steps).tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert torch.cat(r.drawn(10, batch=4, steps=4, seed=None)).tolist() == [*range(10), *range(6)]


def test_only_what_is_named_trains(rows):
    model, names = small_model(), ["blocks.1.mlp.down.weight", "norm.weight"]
    before = state(model)
    model.embedding.weight.requires_grad_(False)
    r.recover(model, rows, 3, 1e-2, trainable=names)
    assert changed(model, before) == set(names)
    asks = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert asks == {"embedding.weight"}


def test_lora_changes_projections_by_a_low_rank_and_is_gone_afterwards(rows):
    model = small_model()
    before = state(model)
    r.recover(model, rows, 3, 1e-2, trainable="lora", rank=2)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert changed(model, before) == {f"{name}.weight" for name in anatomy.projections(model)}
    for name, layer in anatomy.projections(model).items():
        change = layer.weight.detach() - before[f"{name}.weight"]
        assert torch.linalg.matrix_rank(change, atol=1e-6) == 2


def test_the_penalty_is_not_clipped(rows):
    model, seen = small_model(), []
    weight = model.blocks[0].mlp.down.weight

    def penalty(step):
        return 1e3 * weight.sum()

    def look(step, rate):
        seen.append((step, rate))

    plain = small_model()
    r.recover(plain, rows, 2, 1e-3, trainable=["blocks.0.mlp.down.weight"])
    r.recover(
        model,
        rows,
        2,
        1e-3,
        trainable=["blocks.0.mlp.down.weight"],
        penalty=penalty,
        after_step=look,
    )
    assert [step for step, _ in seen] == [0, 1] and seen[0][1] == pytest.approx(1e-3)
    fallen = state(small_model())["blocks.0.mlp.down.weight"] - weight.detach()
    assert (fallen > 1e-3).all()  # each weight by the rate of both steps
    assert not (
        state(small_model())["blocks.0.mlp.down.weight"] > plain.blocks[0].mlp.down.weight
    ).all()


def test_another_word_or_an_unknown_name_is_said(rows):
    model = small_model()
    with pytest.raises(ValueError, match='"all", "lora" or names'):
        r.recover(model, rows, 1, 1e-3, trainable="some")
    with pytest.raises(ValueError, match="no parameter head"):
        r.recover(model, rows, 1, 1e-3, trainable=["head"])
    assert all(p.requires_grad for p in model.parameters())


def test_scores_of_neurons_and_heads_are_norms_of_what_they_add(rows):
    model = small_model().eval()
    size = structures.sizes(model)
    heads, neurons = importance.of_heads(model, rows), importance.of_neurons(model, rows)
    assert [s.shape for s in heads] == [(4,)] * 2 and [len(s) for s in neurons] == [48] * 2
    seen = {}
    for name, layer in anatomy.projections(model, "output", "down").items():
        layer.register_forward_pre_hook(lambda m, x, n=name: seen.update({n: x[0].detach()}))
    model(rows[:, :-1])
    mlp, output = seen["blocks.1.mlp.down"], seen["blocks.1.attention.output"]
    weight = model.blocks[1].mlp.down.weight
    added = mlp[..., 5, None] * weight[:, 5]  # what neuron 5 adds: (rows, length, dim)
    expected = added.square().sum(-1).mean().sqrt()
    torch.testing.assert_close(neurons[1][5], expected.detach())
    part = slice(size.head_dim, 2 * size.head_dim)
    columns = model.blocks[1].attention.output.weight[:, part]
    square = (output[..., part, None] * columns.t()).square().sum((-1, -2)).mean()
    torch.testing.assert_close(heads[1][1], square.sqrt().detach())
