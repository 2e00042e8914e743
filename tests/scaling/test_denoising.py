"""Span corruption: nothing is lost, and shares, lengths and places are as asked."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from lablib.data import Batches, byte_text
from lablib.scaling import denoising as dn
from lablib.training import padded_next_token_loss

KINDS = {*dn.T5, *dn.UL2}


@pytest.mark.parametrize("denoiser", KINDS)
@pytest.mark.parametrize("length", [7, 64, 95])
def test_what_is_taken_apart_can_be_put_together(denoiser, length):
    random = np.random.default_rng(length)
    for _ in range(50):
        text = random.integers(32, 127, length).tolist()
        spans = dn.draw_spans(length, denoiser, random)
        given, target = dn.corrupt(text, spans)
        assert dn.restore(given, target) == text
        assert len(given) + len(target) == length + 2 * len(spans) + 1


@pytest.mark.parametrize("denoiser", KINDS)
def test_share_and_number_of_spans_are_as_asked(denoiser):
    random, length = np.random.default_rng(1), 400
    for _ in range(20):
        spans = dn.draw_spans(length, denoiser, random)
        gone = sum(stop - start for start, stop in spans)
        assert gone == round(length * denoiser.rate)
        n = 1 if denoiser.prefix else max(1, round(gone / denoiser.mean))
        assert len(spans) == n, "so the mean length is as asked"
        assert all(one[1] < other[0] for one, other in pairwise(spans)), "no two touch"


def test_small_texts_have_every_corruption_equally_often():
    random, n = np.random.default_rng(2), 12000
    made = Counter(tuple(dn.draw_spans(6, dn.Denoiser(0.5, 1.5), random)) for _ in range(n))
    # 3 of 6 go in 2 spans: 2 ways to divide them, 4 places of 3 kept ones to choose 2 from
    assert len(made) == 2 * 6
    assert max(abs(count - n / 12) for count in made.values()) < 5 * (n / 12) ** 0.5


def test_an_example_by_hand():
    text = list(b"Thank you for inviting me")
    given, target = dn.corrupt(text, [(6, 9), (23, 25)], sentinels=(1, 2, 3))
    assert bytes(given) == b"Thank \x01 for inviting \x02"
    assert bytes(target) == b"\x01you\x02me\x03"
    with pytest.raises(ValueError, match="2 spans need 3 sentinels, not 2"):
        dn.corrupt(text, [(6, 9), (23, 25)], sentinels=(1, 2))
    with pytest.raises(ValueError, match="takes 0 of 3"):
        dn.draw_spans(3, dn.Denoiser(0.1), np.random.default_rng(0))


def test_a_prefix_is_kept_and_the_rest_is_to_be_told():
    assert dn.draw_spans(8, dn.Denoiser(0.25, prefix=True), np.random.default_rng(0)) == [(6, 8)]


def test_sentinels_and_modes_never_come_in_the_text():
    marks = [*dn.SENTINELS, *dn.MODES]
    assert len(set(marks)) == len(marks)
    assert not np.isin(byte_text().train, marks).any()


def test_rows_of_a_decoder():
    text = np.random.default_rng(0).integers(32, 127, 5000)
    rows = dn.Denoising(Batches(text, 16, 95, seed=3), dn.UL2, seed=3)
    tokens, counted = next(rows)
    plain = next(Batches(text, 16, 95, seed=3))
    for row, where, whole in zip(tokens.tolist(), counted.numpy(), plain[:, :-1].tolist()):
        (places,) = where.nonzero()
        first, last = places[0], places[-1]
        assert row[0] in dn.MODES and where[first : last + 1].all() and not any(row[last + 1 :])
        assert dn.restore(row[1:first], row[first : last + 1]) == whole
    assert tokens.shape[1] <= 129
    again = dn.Denoising(Batches(text, 16, 95, seed=3), dn.UL2, seed=3)
    assert torch.equal(next(again)[0], tokens)


def test_only_the_target_counts():
    tokens, counted = torch.tensor([[0, 65, 245, 245, 66, 246]]), torch.zeros(1, 6, dtype=bool)
    counted[0, 3:] = True
    logits = torch.randn(1, 5, 256)
    model = torch.nn.Module()
    model.forward = lambda given: logits
    total, n = padded_next_token_loss(model, (tokens, counted))
    log_p = logits.log_softmax(-1)[0]
    assert n == 3
    torch.testing.assert_close(total, -(log_p[2, 245] + log_p[3, 66] + log_p[4, 246]))
