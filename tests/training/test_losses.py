"""Means over counted tokens, and which batches are taken."""

from typing import NamedTuple

import pytest
import torch
from lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lablib.training import evaluate, fit, next_token_loss, padded_next_token_loss

ROWS = (torch.arange(108) ** 2 % 31).view(12, 9)


def padded(lengths, rows=ROWS):
    """The first tokens of each row, padded: (tokens, mask)."""
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    return rows[: len(lengths)].where(mask, 7), mask


def by_rows(net, rows, lengths):
    """Sum and number over rows cut to their lengths, one by one."""
    losses = [next_token_loss(net, row[None, :n]) * (n - 1) for row, n in zip(rows, lengths)]
    return sum(losses), sum(lengths) - len(lengths)


def test_padding_does_not_count(model):
    net = model()
    first, second = padded([9, 3, 2]), padded([2], ROWS[3:])
    total, count = by_rows(net, ROWS, [9, 3, 2, 2])
    expected = pytest.approx(total.item() / count, abs=1e-5)
    assert evaluate(net, [first, second], padded_next_token_loss) == expected
    plain = evaluate(net, [ROWS[:3]])
    whole = [(ROWS[:3], torch.ones(3, 9, dtype=torch.bool))]
    assert evaluate(net, whole, padded_next_token_loss) == pytest.approx(plain, abs=1e-5)


def test_accumulated_batches_count_by_their_tokens(model):
    batches = [padded([9, 3, 2]), padded([2], ROWS[3:])]
    net, expected = model(), model()
    total, count = by_rows(expected, ROWS, [9, 3, 2, 2])
    (total / count).backward()
    torch.optim.SGD(expected.parameters(), lr=0.5).step()
    history = fit(
        net, batches, steps=1, accumulate=2, loss=padded_next_token_loss, clip=None, warmup=0,
        schedule="constant", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
        progress=False,
    )  # fmt: skip
    assert history.losses == pytest.approx([total.item() / count], abs=1e-5)
    for found, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_nothing_counted_is_said(model):
    nothing = [padded([1, 1])]
    with pytest.raises(ValueError, match="nothing counted"):
        evaluate(model(), nothing, padded_next_token_loss)
    with pytest.raises(ValueError, match="step 1 has nothing counted in it"):
        fit(model(), nothing, steps=1, loss=padded_next_token_loss, progress=False)


class Pair(NamedTuple):
    name: str
    tokens: torch.Tensor


def _encoding():
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": ROWS})


BATCHES = {
    "named tuple": (Pair("x", ROWS), lambda batch: batch.tokens),
    "dict with None, a number and a string": (
        {"note": "x", "none": None, "n": 3, "ids": ROWS},
        lambda batch: batch["ids"],
    ),
    "BatchEncoding": (_encoding(), lambda batch: batch["input_ids"]),
    "list with a scalar first": ([torch.tensor(2.0), ROWS], lambda batch: batch[1]),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_kind(kind, model):
    batch, tokens = BATCHES[kind]

    def loss(net, batch):
        return next_token_loss(net, tokens(batch))

    assert evaluate(model(), [batch], loss) == evaluate(model(), [ROWS])
    expected = fit(model(), [ROWS], steps=2, progress=False).losses
    assert fit(model(), [batch], steps=2, loss=loss, progress=False).losses == expected


def test_a_batch_without_a_tensor_is_refused(model):
    with pytest.raises(ValueError, match="a batch is a tensor, or a tuple, list or mapping"):
        evaluate(model(), [["words", None, 3]], lambda net, batch: torch.tensor(1.0))


def test_a_model_without_parameters_is_evaluated():
    class Uniform(nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, 31)

    assert evaluate(Uniform(), [ROWS]) == pytest.approx(torch.log(torch.tensor(31.0)).item())


def test_held_out_batches_may_come_but_once(model, batches):
    def stream():
        yield from ROWS.split(6)

    options = {"steps": 4, "held_out_every": 2, "progress": False}
    expected = fit(model(), batches(), held_out=list(stream()), **options)
    history = fit(model(), batches(), held_out=stream(), **options)
    assert history.held_out == expected.held_out and history.losses == expected.losses


def test_a_data_module_is_set_up(model):
    class Module(LightningDataModule):
        def setup(self, stage):
            assert stage == "fit"
            self.rows = ROWS

        def train_dataloader(self):
            return DataLoader(self.rows, batch_size=4)

    assert len(fit(model(), Module(), steps=4, progress=False).losses) == 4


def test_an_interrupt_stays_one(model, batches):
    import signal

    def loss(net, batch):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(model(), batches(), steps=2, loss=loss, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
