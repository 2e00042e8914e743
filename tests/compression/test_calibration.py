import pytest
import torch
from torch.nn import functional as F

from lablib.compression import calibration as c
from lablib.compression import importance
from lablib.models import GPT, GPTConfig, anatomy, to_hf
from lablib.models.weights import weight_grid


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, max_length=16))


@pytest.fixture(params=["ours", "transformers"])
def model(request, tmp_path):
    if request.param == "ours":
        return small_model()
    from transformers import AutoModelForCausalLM

    to_hf(small_model(), tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def rows():
    torch.manual_seed(3)
    return torch.randint(50, (5, 9))


class Letters:
    def encode(self, text):
        return [ord(letter) % 50 for letter in text]


def test_calibration_rows_follow_from_their_seed_alone():
    corpora = ("shakespeare", "bible")
    one, again = (c.calibration_tokens(corpora, Letters(), 6, 20, seed=4) for _ in range(2))
    assert one.shape == (6, 21) and torch.equal(one, again)
    assert not torch.equal(one, c.calibration_tokens(corpora, Letters(), 6, 20, seed=5))
    assert len({tuple(row.tolist()) for row in one}) == 6


def test_token_losses_are_cross_entropies(model, rows):
    losses = c.token_losses(model, rows, batch=2)
    logits = anatomy.logits(model, rows[:, :-1])
    expected = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected.detach())


def test_second_moments_and_norms_are_those_of_what_is_read(model, rows):
    seen = {}
    layers = anatomy.projections(model)
    handles = [
        layer.register_forward_pre_hook(lambda m, g, n=name: seen.update({n: g[0].detach()}))
        for name, layer in layers.items()
    ]
    anatomy.logits(model, rows[:, :-1])
    [handle.remove() for handle in handles]
    moments, norms = c.second_moments(model, rows), c.input_norms(model, rows)
    for name, x in seen.items():
        flat = x.flatten(0, 1)
        torch.testing.assert_close(moments[name], flat.t() @ flat / len(flat), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norms[name] ** 2, moments[name].diagonal(), atol=1e-5, rtol=1e-4)
    assert set(c.input_norms(model, rows, "up")) < set(norms)


def test_gradients_are_squared_row_by_row(model, rows):
    found = c.gradients(model, rows, "down", "query")
    name = next(iter(found))
    weight = anatomy.projections(model)[name].weight
    each = []
    for row in rows:
        loss = F.cross_entropy(anatomy.logits(model, row[None, :-1])[0], row[1:])
        each.append(torch.autograd.grad(loss, weight)[0])
    each = torch.stack(each)
    torch.testing.assert_close(found[name][0], each.mean(0), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(found[name][1], each.square().mean(0), atol=1e-8, rtol=1e-4)
    assert not torch.allclose(found[name][1], each.mean(0).square(), rtol=0.1)


def test_gradients_leave_the_model_as_it_was(model, rows):
    embedding = anatomy.embedding(model).weight
    embedding.requires_grad_(False)
    head = anatomy.final_norm(model).weight
    head.grad = torch.ones_like(head)
    model.train()
    c.gradients(model, rows)
    assert model.training and not embedding.requires_grad
    assert torch.equal(head.grad, torch.ones_like(head))
    assert all(layer.weight.grad is None for layer in anatomy.projections(model).values())


def test_hooks_are_gone_after_an_error(model, rows):
    for function in (c.second_moments, c.input_norms, c.gradients):
        with pytest.raises((IndexError, RuntimeError)):
            function(model, rows + 100)  # no such tokens
    layers = anatomy.projections(model).values()
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert not any(getattr(layer.weight, "_post_accumulate_grad_hooks", None) for layer in layers)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_scores_by_hand():
    weight, gradient = torch.tensor([[2.0, -3.0]]), torch.tensor([[-1.0, 0.5]])
    assert importance.magnitude(weight).tolist() == [[2.0, 3.0]]
    norm = torch.tensor([3.0, 1.0])
    assert importance.activation_weighted(weight, norm).tolist() == [[6.0, 3.0]]
    assert importance.first_order(weight, gradient).tolist() == [[2.0, 1.5]]
    assert importance.fisher(weight, gradient**2).tolist() == [[2.0, 1.125]]


def test_a_grid_shows_what_was_quantized_before():
    from lablib.compression.quantize import quantize

    weight = torch.randn(4, 64)
    assert (weight_grid(weight) == 32).all()
    assert weight_grid(quantize(weight, 2, group=32).dequantize()).max() <= 4
    with pytest.raises(ValueError, match="multiple of 32"):
        weight_grid(torch.zeros(4, 40))
