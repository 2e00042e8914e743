import pytest
import torch

from lablib.training import fit
from lablib.training.rates import OwnSchedule
from lablib.training.schedules import learning_rate_factor


def test_an_own_schedule_takes_the_place_of_fits():
    """Plain gradient descent on a constant gradient: the weights say which rates were used."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)

    def factor(step):
        return learning_rate_factor(step, 6, "cosine", warmup=2, floor=0.01)

    fit(
        net,
        [torch.ones(1, 1)],
        steps=6,
        loss=lambda net, batch: net(batch).mean(),
        optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.5),
        schedule="constant",
        clip=None,
        progress=False,
        callbacks=[OwnSchedule(factor)],
    )
    assert -net.weight.item() == pytest.approx(0.5 * sum(map(factor, range(6))), rel=1e-6)
