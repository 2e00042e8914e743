"""Any optimizer of torch, and what a checkpoint folder knows of it."""

import pytest
import torch

from lablib.training import adamw, fit, next_token_loss
from lablib.training.optimizers import describe

NAMES = ["SGD", "Adagrad", "RMSprop", "Adadelta", "NAdam", "Adafactor"]


@pytest.mark.parametrize("name", NAMES)
def test_any_optimizer_of_torch_trains(name, model, batches):
    kind = getattr(torch.optim, name)
    lr = 1.0 if name in ("Adadelta", "SGD") else 0.01
    history = fit(
        model(), batches(), steps=8, optimizer=lambda net: kind(net.parameters(), lr=lr),
        progress=False,
    )  # fmt: skip
    assert len(history.losses) == 8 and history.losses[-1] < history.losses[0]


MAKERS = {
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9),
    "L-BFGS": lambda net: torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_it_equals_the_loop_written_out(name, model, batches):
    net, data, losses = model(), batches(), []
    optimizer = MAKERS[name](net)
    for _, batch in zip(range(4), data):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = next_token_loss(net, batch)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    options = {"schedule": "constant", "warmup": 0, "clip": None, "progress": False}
    found = fit(model(), batches(), steps=4, optimizer=MAKERS[name], **options)
    assert found.losses == pytest.approx(losses, abs=1e-5)


def test_only_matrices_decay(model):
    net = model()
    made = adamw(0.02, betas=(0.8, 0.9), weight_decay=0.3)(net)
    for group in made.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}
        assert group["lr"] == 0.02 and group["betas"] == (0.8, 0.9)
    assert sum(len(group["params"]) for group in made.param_groups) == len([*net.parameters()])


def test_settings_are_told_as_text(model):
    told = describe(adamw(0.02, weight_decay=0.3)(model()))
    assert told["optimizer"] == "AdamW" and told["lr"] == "0.02"
    assert told["weight_decay"] == "0.3 and 0.0"


def test_a_frozen_model_is_refused(model, batches):
    with pytest.raises(ValueError, match="no parameter of the model needs a gradient"):
        fit(model().requires_grad_(False), batches(), steps=1, progress=False)
