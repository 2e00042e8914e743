import math

import numpy as np
import pytest
import torch
from scipy import stats

from lablib.models import scores


@pytest.fixture
def drawn():
    torch.manual_seed(0)
    logits = 2 * torch.randn(500, 4)
    labels = torch.where(torch.rand(500) < 0.5, logits.argmax(1), torch.randint(4, (500,)))
    return logits, labels


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_is_torchmetrics(drawn, bins):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = drawn
    expected = metrics.multiclass_calibration_error(logits.softmax(1), labels, 4, n_bins=bins)
    assert scores.ece(logits.softmax(1), labels, bins) == pytest.approx(expected.item(), abs=1e-6)


def test_accuracy_and_f1_are_torchmetrics(drawn):
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = drawn
    made = scores.scored(logits, labels)
    f1 = metrics.multiclass_f1_score(logits, labels, 4, average="macro").item()
    right = metrics.multiclass_accuracy(logits, labels, 4, average="micro").item()
    assert made["macro_f1"] == pytest.approx(f1) and made["accuracy"] == pytest.approx(right)


def test_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4]])
    labels = torch.tensor([0, 1])
    assert scores.nll(p, labels) == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2, rel=1e-6)
    assert scores.brier(p, labels) == pytest.approx((0.08 + 0.72) / 2, rel=1e-6)
    assert scores.ece(p, labels) == pytest.approx((0.2 + 0.6) / 2, rel=1e-6)
    assert scores.accuracy(p, labels) == 0.5


def test_a_class_that_nobody_has_or_guesses_does_not_count():
    p = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    assert scores.macro_f1(p, torch.tensor([0, 1])) == 1


def test_bins_hold_every_row_once(drawn):
    logits, labels = drawn
    count, confidence, right = scores.reliability(logits.softmax(1), labels)
    assert count.sum() == 500
    filled = count > 0
    edges = torch.arange(1, 16, dtype=torch.float64) / 15
    assert (confidence <= edges + 1e-9)[filled].all()
    assert (confidence > edges - 1 / 15)[filled].all() and (right <= 1).all()


def test_spearman_is_that_of_ranks_and_nan_of_a_constant():
    torch.manual_seed(0)
    a, b = torch.randint(5, (40,)).float(), torch.randn(40)
    ranks = [stats.rankdata(v.numpy()) for v in (a, b)]
    assert scores.spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert math.isnan(scores.spearman(torch.ones(5), b[:5]))
    assert set(scores.scored(a[:, None], b)) == {"spearman"}
