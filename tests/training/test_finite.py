"""What is not finite stops a training before it reaches the weights or a checkpoint."""

import pytest
import torch
from torch import nn

from lablib.training import NonFiniteLoss, fit, next_token_loss, trainer
from lablib.training.state import Checkpoints

OPTIONS = {"progress": False, "lr": 0.01, "schedule": "constant", "warmup": 0}


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan")


def broken(after: int, how: str):
    """The next-token loss; once `after` batches have been seen, something about it is NaN."""
    seen = 0

    def loss(net, batch):
        nonlocal seen
        seen += 1
        value = next_token_loss(net, batch)
        if seen <= after:
            return value
        if how == "auxiliary":
            net.auxiliary_loss = value * float("nan")
        return {"loss": value * float("nan"), "gradient": _NoGradient.apply(value)}.get(how, value)

    return loss


WORDS = {"loss": "the loss is nan", "gradient": "the gradient's norm is nan",
         "auxiliary": "the loss with auxiliary losses is nan"}  # fmt: skip


@pytest.mark.parametrize("check_every", [1, 4], ids=["each step", "every fourth, as on a GPU"])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("how", WORDS)
def test_weights_are_those_before_the_step(how, clip, check_every, model, batches, monkeypatch):
    monkeypatch.setattr(trainer, "_check_every", lambda on_gpu: check_every)
    net, good = model(), model()
    fit(good, batches(), steps=6, clip=clip, **OPTIONS)
    with pytest.raises(NonFiniteLoss, match=f"{WORDS[how]} at step 7 .batch 7, learning rate 0.01"):
        fit(net, batches(), steps=12, clip=clip, loss=broken(6, how), **OPTIONS)
    for found, wanted in zip(net.parameters(), good.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_the_newest_checkpoint_is_from_before(tmp_path, model, batches):
    with pytest.raises(NonFiniteLoss, match="step-00000006"):
        fit(model(), batches(), steps=12, loss=broken(7, "gradient"), checkpoint=tmp_path, every=2,
            **OPTIONS)  # fmt: skip
    again = fit(model(3), batches(), steps=12, checkpoint=tmp_path, every=2, **OPTIONS)
    assert again.resumed_from == 6
    assert again.losses == fit(model(), batches(), steps=12, **OPTIONS).losses


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    net = nn.Linear(2, 2)
    net.weight.data[0, 0] = float("inf")
    run = type("Run", (), {"model": net, "done": 5})
    with pytest.raises(FloatingPointError, match="weight is not finite after step 5"):
        Checkpoints(tmp_path, 1, {}).save(run, None, None)
    assert not list(tmp_path.iterdir())
