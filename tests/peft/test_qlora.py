import pytest
import torch
from families_for_tests import MODELS, TOKENS, moved

from lablib.models import anatomy
from lablib.peft.adapter import disabled, freeze_base_, merge_, n_trainable, remove_, trainable
from lablib.peft.lora import lora_
from lablib.peft.qlora import NF4Linear, levels, nf4_, qlora_

# Appendix E of Dettmers et al. (2023), to seven digits.
PRINTED = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def test_the_levels_are_those_that_the_paper_prints():
    torch.testing.assert_close(levels(), torch.tensor(PRINTED), atol=1e-6, rtol=0)


def test_every_weight_goes_to_its_nearest_level():
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 6)
    small = NF4Linear(layer)
    weight = layer.weight.detach().view(12, 64)
    absmax = weight.abs().amax(1, keepdim=True)
    nearest = levels()[(weight[..., None] / absmax[..., None] - levels()).abs().argmin(-1)]
    torch.testing.assert_close(small.weight.view(12, 64), nearest * absmax, atol=2e-3, rtol=2e-3)


def test_bits_a_weight_are_the_papers():
    assert NF4Linear(torch.nn.Linear(1024, 1024)).bits_per_weight() == pytest.approx(
        4.127, abs=1e-3
    )


def test_a_size_that_no_block_divides_is_filled_up():
    layer = torch.nn.Linear(10, 7)
    small = NF4Linear(layer)
    assert small.weight.shape == (7, 10)
    assert (small.weight - layer.weight).abs().max() < 0.2 * layer.weight.abs().max()


def test_lora_over_it_trains_and_goes_again(model):
    nf4_(model)
    before = anatomy.logits(model, TOKENS)
    qlora_(model, rank=3)
    torch.testing.assert_close(anatomy.logits(model, TOKENS), before)
    freeze_base_(model)
    anatomy.logits(model, TOKENS).square().mean().backward()
    assert all(p.grad is not None for p in trainable(model).values())
    changed = anatomy.logits(moved(model), TOKENS)
    assert (changed - before).abs().max() > 1e-3
    with disabled(model):
        assert torch.equal(anatomy.logits(model, TOKENS), before)
    with pytest.raises(ValueError, match="can't hold the change"):
        merge_(model)
    remove_(model)
    assert torch.equal(anatomy.logits(model, TOKENS), before)


def test_gradients_are_those_over_the_same_weight_in_full():
    torch.manual_seed(0)
    model, full = MODELS["llama"](), MODELS["llama"]()
    full.load_state_dict(model.state_dict())
    nf4_(model)
    with torch.no_grad():
        for name, layer in anatomy.projections(full).items():
            layer.weight.copy_(model.get_submodule(name).weight)
    for one, put in ((model, qlora_), (full, lora_)):
        torch.manual_seed(2)
        put(one, rank=2, alpha=4)
        freeze_base_(moved(one))
        anatomy.logits(one, TOKENS).square().mean().backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, trainable(full)[name].grad, atol=1e-6, rtol=1e-4)
    assert n_trainable(model) == n_trainable(full)


def test_a_base_in_full_is_refused():
    with pytest.raises(ValueError, match="call nf4_ on the model first"):
        qlora_(MODELS["gpt"]())
