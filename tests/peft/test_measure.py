import pytest
import torch
from torch import nn

from lablib.compression.recover import language_loss
from lablib.models import GPT, GPTConfig, anatomy
from lablib.peft import measure as m
from lablib.peft.adapter import adapters
from lablib.peft.lora import lora_

ROWS = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    return GPT(GPTConfig(50, 32, 2, 4, 2, init_std=0.2))


def loss(model):
    return language_loss(model, ROWS)


def outputs(model):
    return anatomy.logits(model, ROWS)


def test_an_account_by_hand():
    """One layer on frozen input: its input is saved for the weight, and a square's argument."""
    layer, x = nn.Linear(8, 3, bias=False), torch.randn(5, 8)
    made = m.account(layer, lambda model: model(x).square().sum())
    expected = {"parameters": 96, "gradients": 96, "optimizer": 192, "saved": 5 * 8 * 4 + 5 * 3 * 4}
    assert made == expected | {"total": sum(expected.values())}


def test_a_tensor_saved_twice_counts_once():
    w = nn.Parameter(torch.randn(6))
    holder = nn.Module()
    holder.w = w
    x = torch.randn(6)
    assert (
        m.account(holder, lambda model: (model.w * x + model.w * x.view(2, 3).view(6)).sum())[
            "saved"
        ]
        == 24
    )


def test_lora_saves_gradients_and_optimizer_but_few_activations():
    model = build()
    rows = {
        name: m.measure_method(model, method, loss, outputs)
        for name, method in {"full": m.full, "lora": lambda model: lora_(model, rank=2)}.items()
    }
    full, lora = rows["full"], rows["lora"]
    assert full["n_trainable"] == model.n_parameters() and full["share"] == 1
    assert lora["gradients"] == 4 * lora["n_trainable"] < full["gradients"] / 4
    assert lora["optimizer"] == 2 * lora["gradients"]
    assert lora["parameters"] == full["parameters"] + 4 * lora["n_trainable"]
    assert lora["total"] < full["total"]
    assert lora["merge_error"] < 1e-5 and full["merge_error"] is None
    assert 4 * lora["n_trainable"] < lora["file_bytes"] < 4 * lora["n_trainable"] + 4000


def test_the_model_is_given_back_as_it_was():
    model = build()
    model.embedding.weight.requires_grad_(False)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    m.measure_method(model, lora_, loss, outputs)
    m.times(model, {"full": m.full, "lora": lora_}, loss, outputs, repeats=1)
    after = dict(model.named_parameters())
    assert not adapters(model) and list(after) == list(before)
    for name, (bits, asks) in before.items():
        assert torch.equal(after[name], bits) and after[name].requires_grad == asks
        assert after[name].grad is None


def test_an_account_is_the_same_twice_and_grows_with_the_text():
    model = build()
    first, again = m.account(model, loss), m.account(model, loss)
    longer = m.account(model, lambda model: language_loss(model, ROWS.repeat(2, 1)))
    assert first == again and longer["saved"] > 1.9 * first["saved"]


def test_times_are_of_every_method_and_positive():
    made = m.times(build(), {"full": m.full, "lora": lora_}, loss, outputs, repeats=2)
    assert set(made) == {"full", "lora"}
    assert all(v > 0 for row in made.values() for v in row.values())


def test_a_failing_loss_leaves_no_adapter():
    model = build()

    def fails(model):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        m.measure_method(model, lora_, fails)
    assert not adapters(model)
