"""A checkpoint folder: whose it is, what is damaged in it, and exact resumption of loaders."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler

from lablib.training import adamw, fit, next_token_loss

ROWS = (torch.arange(108) ** 2 % 31).view(12, 9)


class Stop(Exception):
    """Ends a training from within."""


def stopping(after: int):
    """The next-token loss until `after` batches have been seen."""
    seen = 0

    def loss(net, batch):
        nonlocal seen
        seen += 1
        if seen > after:
            raise Stop
        return next_token_loss(net, batch)

    return loss


@pytest.fixture
def options(tmp_path):
    return {"steps": 10, "checkpoint": tmp_path / "run", "every": 2, "progress": False}


@pytest.fixture
def stopped(options, model, batches):
    """A folder with checkpoints of steps 4 and 6."""
    with pytest.raises(Stop):
        fit(model(), batches(), loss=stopping(7), **options)
    return options["checkpoint"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"lr": 0.1}, "lr 0.003 there, 0.1 here"),
        ({"schedule": "wsd"}, "schedule cosine there, wsd here"),
        ({"steps": 12, "warmup": 1}, "steps 10 there, 12 here"),
        ({"accumulate": 2}, "accumulate 1 there, 2 here"),
        ({"clip": None}, "clip 1.0 there, None here"),
        ({"optimizer": adamw(weight_decay=0)}, "weight_decay 0.1 and 0.0 there, 0 and 0.0 here"),
        ({"optimizer": lambda net: torch.optim.SGD(net.parameters())}, "optimizer AdamW there"),
        ({"data": {"batch_size": 2}}, "batch size 4 there, 2 here"),
        ({"data": {"seed": 5}}, "data's seed 0 there, 5 here"),
        ({"data": {"length": 7}}, "length 8 there, 7 here"),
    ],
)
def test_another_call_is_refused(change, words, stopped, options, model, batches):
    data = batches(**change.pop("data", {}))
    with pytest.raises(ValueError, match=f"belongs to another training .*{words}"):
        fit(model(), data, **options | change)


def test_a_finished_folder_refuses_another_call_too(options, model, batches):
    fit(model(), batches(), **options)
    with pytest.raises(ValueError, match="lr 0.003 there, 0.002 here"):
        fit(model(), batches(), **options, lr=0.002)


def _cut(file):
    file.write_bytes(file.read_bytes()[:100])


DAMAGE = {
    "weights cut": lambda path: _cut(path / "model.safetensors"),
    "state cut": lambda path: _cut(path / "state.pt"),
    "numbers cut": lambda path: _cut(path / "state.json"),
    "empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_falls_back(how, stopped, options, model, batches):
    expected = fit(model(), batches(), steps=10, progress=False).losses
    DAMAGE[how](stopped / "step-00000006")
    (stopped / "step-stray").write_text("")
    (stopped / "step-00000009").write_text("a file")
    with pytest.warns(UserWarning, match="step-00000006 is damaged .*goes on from step-00000004"):
        history = fit(model(5), batches(), **options)
    assert history.resumed_from == 4 and history.losses == expected


def test_all_damaged_begins_anew_and_says_so(stopped, options, model, batches):
    for path in stopped.iterdir():
        _cut(path / "state.pt")
    with pytest.warns(UserWarning, match="training begins anew"):
        assert fit(model(), batches(), **options).resumed_from == 0


class Noisy(nn.Module):
    """A model that draws from torch's, NumPy's and Python's generators as it trains."""

    def __init__(self, net):
        super().__init__()
        self.net, self.drop = net, nn.Dropout(0.2)

    def forward(self, tokens):
        noise = 1 + 0.01 * np.random.rand() + 0.01 * random.random()
        return self.drop(self.net(tokens)) * noise


def _seeded(generator_seed=None):
    random.seed(0)
    np.random.seed(0)
    own = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
    return DataLoader(ROWS, batch_size=4, shuffle=True, generator=own)


@pytest.mark.parametrize("own", [None, 3], ids=["global generator", "a generator of its own"])
@pytest.mark.parametrize("after", [5, 7, 9], ids=["mid-epoch", "at an epoch's end", "third epoch"])
def test_a_shuffling_loader_resumes_exactly(own, after, options, model):
    plain = {key: value for key, value in options.items() if key != "checkpoint"}
    expected = fit(Noisy(model()), _seeded(own), **plain).losses
    options["every"] = after - 1
    with pytest.raises(Stop):
        fit(Noisy(model()), _seeded(own), loss=stopping(after), **options)
    loader = _seeded(own)
    random.seed(8), np.random.seed(8)
    history = fit(Noisy(model(4)), loader, **options)
    assert history.resumed_from == after - 1
    assert history.losses == expected


class Lines(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Odd(Sampler):
    def __iter__(self):
        return iter([1, 3, 5, 7])

    def __len__(self):
        return 4


class Drawn:
    """Batches that NumPy's global generator chooses."""

    def __iter__(self):
        for _ in range(3):
            yield ROWS[np.random.permutation(12)[:4]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataLoader(Lines(), batch_size=4), "an IterableDataset can't be resumed exactly"),
        (DataLoader(ROWS, batch_size=4, sampler=Odd()), "Odd can't be resumed exactly"),
        (Drawn(), "Drawn draws from a global random generator and has no state_dict"),
    ],
)
def test_what_cannot_be_resumed_exactly_is_refused(data, words, options, model):
    with pytest.raises(ValueError, match=words):
        fit(model(), data, **options)
    del options["checkpoint"]
    assert len(fit(model(), data, **options).losses) == 10


def test_a_sampler_of_ours_is_known():
    from lablib.training.feed import refuse_inexact

    refuse_inexact(DataLoader(ROWS, batch_size=4, sampler=RandomSampler(ROWS)))
    refuse_inexact([ROWS])
