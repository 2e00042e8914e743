import pytest
import torch
from torch import nn

from lablib.modes import kept_modes, kept_requires_grad


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_each_modules_mode_comes_back():
    model = two().train()
    model[0].eval()
    with kept_modes(model):
        model.eval()
    assert [part.training for part in model] == [False, True]


@pytest.mark.parametrize("fails", [False, True])
def test_each_parameter_asks_again_as_it_did(fails):
    model = two()
    model[0].weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        with kept_requires_grad(model):
            model.requires_grad_(not before["0.bias"])
            model.register_parameter("new", nn.Parameter(torch.zeros(2), requires_grad=False))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert after == before | {"new": False}
