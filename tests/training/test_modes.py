"""Training and evaluation mode, module by module."""

import pytest
import torch
from torch import nn

from lablib.training import evaluate, fit

TOKENS = torch.arange(90).view(10, 9) % 31


class Seen(nn.Module):
    """Passes its input on and remembers the modes that it ran in."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return x


@pytest.fixture
def net(model):
    return nn.Sequential(model(), Seen(), Seen())


def test_a_model_in_evaluation_mode_trains_and_comes_back(net, batches):
    net.eval()
    fit(net, batches(), steps=4, held_out=[TOKENS], held_out_every=2, progress=False)
    assert net[1].modes == [True, True, False] * 2
    assert not any(module.training for module in net.modules())


def test_a_part_in_evaluation_mode_stays_so(net, batches):
    net.train()
    net[1].eval()
    fit(net, batches(), steps=2, held_out=[TOKENS], held_out_every=1, progress=False)
    assert net[1].modes == [False] * 4 and net[2].modes == [True, False] * 2
    assert net.training and net[2].training and not net[1].training


def test_a_trained_part_of_a_model_in_evaluation_mode_stays_so(net):
    net.eval()
    net[2].train()
    evaluate(net, [TOKENS])
    assert net[2].modes == [False] and net[2].training and not net.training


def test_modes_come_back_after_an_error(net):
    net.eval()
    with pytest.raises(ValueError, match="no more batches"):
        fit(net, [], steps=1, progress=False)
    assert not net[1].training
    with pytest.raises(IndexError):
        evaluate(net.train(), [TOKENS + 100])
    assert net[1].training


def test_generation_keeps_modes(model):
    net = model().eval()
    net.blocks[0].train()
    net.generate([1, 2], 2, greedy=True)
    assert net.blocks[0].training and not net.training
