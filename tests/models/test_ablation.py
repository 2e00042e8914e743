import pytest
import torch

from lablib.models import GPT, GPTConfig
from lablib.models.ablation import leave_one_out_losses
from lablib.training import next_token_loss


def test_leaving_out_a_block_is_the_model_without_it():
    torch.manual_seed(0)
    model = GPT(GPTConfig(40, 32, 3, 4, 2, init_std=0.2))
    tokens = torch.randint(40, (2, 9))
    whole, losses = leave_one_out_losses(model, tokens)
    blocks = list(model.blocks)
    assert whole == pytest.approx(next_token_loss(model, tokens).item(), rel=1e-5)
    for place, loss in enumerate(losses):
        model.blocks = torch.nn.ModuleList(blocks[:place] + blocks[place + 1 :])
        assert loss == pytest.approx(next_token_loss(model, tokens).item(), rel=1e-5)
    assert len({round(loss, 4) for loss in (whole, *losses)}) == len(blocks) + 1
