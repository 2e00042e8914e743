import pytest
import torch
from torch import nn

from lablib.training.clipping import clip_gradients


@pytest.mark.parametrize("largest", [0.1, 100.0])
def test_clips_as_torch_does(largest):
    norms, grads = [], []
    for clip in (clip_gradients, nn.utils.clip_grad_norm_):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
        net[:2](torch.randn(5, 3)).square().sum().backward()  # the last layer gets no gradient
        norms.append(clip(net.parameters(), largest))
        grads.append([p.grad for p in net[:2].parameters()])
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(*grads)
