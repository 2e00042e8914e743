import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from lablib.data import Batches, TokenData
from lablib.models import GPT, GPTConfig
from lablib.training import (
    NonFiniteLoss,
    adamw,
    evaluate,
    fit,
    learning_rate_factor,
    next_token_loss,
)

TOKENS = torch.arange(600) ** 2 % 31


def model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(31, 16, 1, 2, max_length=16))


def batches() -> Batches:
    return Batches(TOKENS, 4, 8)


def train(net=None, data=None, **options):
    options = {"steps": 6, "progress": False} | options
    return fit(net or model(), data or batches(), **options)


def by_hand(steps: int, lr: float, accumulate: int = 1) -> tuple[GPT, list[float]]:
    """The same training written out, for comparison."""
    net, data, losses = model(), batches(), []
    groups = [
        {"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_factor(step, steps, "cosine", 2)
        parts = [next_token_loss(net, next(data)) for _ in range(accumulate)]
        (sum(parts) / accumulate).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(part.item() for part in parts) / accumulate)
    return net, losses


@pytest.mark.parametrize("accumulate", [1, 3])
def test_fit_is_the_loop_that_it_says(accumulate):
    expected, losses = by_hand(6, 0.01, accumulate)
    net = model()
    history = train(net, lr=0.01, warmup=2, clip=0.5, accumulate=accumulate)
    assert history.losses == pytest.approx(losses, abs=1e-5)
    for found, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert history.tokens == 6 * accumulate * 4 * 8


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_with_clipping(precision):
    net = model()
    losses = train(net, steps=40, lr=1e-2, precision=precision, clip=0.5).losses
    assert losses[-1] < losses[0] - 0.5


def test_it_learns():
    assert train(steps=60, lr=0.02).losses[-1] < 0.6 * train().losses[0]


def test_the_seed_decides_what_is_random():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.drop = model(), nn.Dropout(0.5)

        def forward(self, tokens):
            return self.drop(self.net(tokens))

    first, again, other = (train(Dropped(), seed=seed).losses for seed in (1, 1, 2))
    assert first == again and first != other


def test_fit_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    net = model()
    torch.manual_seed(3)
    train(net)
    assert torch.rand(1) == expected


def test_auxiliary_losses_are_added_to_what_is_minimized():
    class Pushed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.extra = model(), nn.Parameter(torch.ones(1, 1))

        def forward(self, tokens):
            self.auxiliary_loss = (self.extra**2).sum()
            return self.net(tokens)

    net, plain = Pushed(), model()
    history = train(net, steps=20, optimizer=adamw(0.01, weight_decay=0.0))
    assert net.extra.item() < 0.95
    assert history.losses[0] == pytest.approx(train(plain).losses[0], abs=1e-6)


def test_any_loss_and_any_iterable():
    net = nn.Linear(3, 1)
    x = torch.randn(16, 3)
    data = [(x, x.sum(1, keepdim=True))]  # begun again at its end

    def squared(module, batch):
        return (module(batch[0]) - batch[1]).pow(2).mean()

    optimizer = adamw(0.05, weight_decay=0.0)
    history = train(net, data, loss=squared, steps=150, optimizer=optimizer)
    assert history.losses[-1] < 1e-2
    torch.testing.assert_close(net.weight, torch.ones(1, 3), atol=0.1, rtol=0)


def test_a_data_module_brings_its_held_out_batches():
    module = TokenData(TOKENS[:500], TOKENS[500:], 4, 8)
    net = model()
    history = train(net, module, steps=6, held_out_every=4)
    assert [step for step, _ in history.held_out] == [4, 6]
    assert history.held_out[-1][1] == pytest.approx(evaluate(net, module.held_out))


def test_evaluate_weighs_rows_and_restores_the_mode():
    net = model().train()
    rows = TOKENS[:90].view(10, 9)
    whole = evaluate(net, [rows])
    assert evaluate(net, rows.split([7, 3])) == pytest.approx(whole, abs=1e-5) and net.training
    with pytest.raises(ValueError, match="no batch"):
        evaluate(net, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": [], "steps": 3}, "no more batches after 0 of 3"),
        ({"schedule": "linear"}, "'linear' is none of cosine, wsd, constant"),
        ({"steps": -1}, "steps is -1: give 0 or more"),
        ({"accumulate": 0}, "accumulate is 0: give 1"),
        ({"clip": -1}, "clip is -1: give a norm above 0"),
        ({"warmup": -2}, "warmup is -2"),
        ({"held_out_every": 2}, "held_out_every is 2, but there are no held_out batches"),
        ({"held_out": [], "held_out_every": 2}, "held_out is empty"),
        ({"held_out": Batches(TOKENS, 4, 8)}, "held_out is a Batches, which has no end"),
        ({"lr": 0.1, "optimizer": adamw()}, "lr is given beside an optimizer"),
        ({"data": ["words"]}, "a batch is a tensor, or a tuple, list or mapping"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(model(), **{"data": batches(), "steps": 3, "progress": False} | options)


def broken(after: int):
    """The next-token loss, infinite once `after` batches have been seen."""
    seen = 0

    def loss(net, batch):
        nonlocal seen
        seen += 1
        return next_token_loss(net, batch) * (1.0 if seen <= after else float("inf"))

    return loss


def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(tmp_path):
    net, good = model(), model()
    with pytest.raises(NonFiniteLoss) as caught:
        train(net, steps=10, loss=broken(7), warmup=0, schedule="constant", lr=0.01,
              checkpoint=tmp_path, every=3)  # fmt: skip
    text = str(caught.value)
    assert "step 8" in text and "batch 8" in text and "learning rate 0.01" in text
    assert "step-00000006" in text
    train(good, steps=7, warmup=0, schedule="constant", lr=0.01)
    for found, wanted in zip(net.parameters(), good.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, accumulate):
    options = {"steps": 10, "accumulate": accumulate}
    held_out = {"held_out": [TOKENS[:90].view(10, 9)], "held_out_every": 2}
    whole, resumed = model(), model()
    expected = train(whole, **options, **held_out)
    with pytest.raises(NonFiniteLoss):
        train(resumed, **options, loss=broken(7 * accumulate),
              checkpoint=tmp_path, every=3)  # fmt: skip
    again = model(seed=9)
    history = train(again, **options, **held_out, checkpoint=tmp_path, every=3)
    assert history.resumed_from == 6
    assert history.losses == expected.losses and history.held_out[-1] == expected.held_out[-1]
    for found, wanted in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert train(model(4), **options, checkpoint=tmp_path).losses == expected.losses


def test_data_without_state_is_drawn_again(tmp_path):
    data = list(TOKENS[:576].view(16, 4, 9))
    expected = train(data=data, steps=20).losses
    with pytest.raises(NonFiniteLoss):
        train(data=data, steps=20, loss=broken(18), checkpoint=tmp_path, every=17)
    assert train(data=data, steps=20, checkpoint=tmp_path, every=17).losses == expected


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from lablib.data import Batches
from lablib.models import GPT, GPTConfig
from lablib.training import fit

torch.manual_seed(0)
net = torch.nn.Sequential(GPT(GPTConfig(31, 16, 1, 2, max_length=16)), torch.nn.Dropout(0.2))
data = Batches(torch.arange(600) ** 2 % 31, 4, 8)
history = fit(net, data, steps=int(sys.argv[2]), checkpoint=sys.argv[1] or None, every=30,
              progress=False)
Path(sys.argv[3]).write_text(json.dumps([history.resumed_from, history.losses]))
"""


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    folder, steps = tmp_path / "checkpoints", 150
    uninterrupted = start("", steps, tmp_path / "whole.json")
    killed = start(folder, steps, tmp_path / "killed.json")
    deadline = time.monotonic() + 120
    while not list(folder.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed.json").exists(), "it ended before it could be killed"
    assert start(folder, steps, tmp_path / "resumed.json").wait(120) == 0
    assert uninterrupted.wait(120) == 0
    resumed_from, resumed = json.loads((tmp_path / "resumed.json").read_text())
    _, whole = json.loads((tmp_path / "whole.json").read_text())
    assert 0 < resumed_from < steps and resumed == whole
