import math

import pytest
import torch

from lablib.experts import statistics

EXPERTS = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]])


def test_load_and_its_entropy():
    torch.testing.assert_close(statistics.load(EXPERTS, 5), torch.tensor([3, 3, 1, 1, 0]) / 8)
    even = torch.arange(8).view(4, 2)
    assert statistics.load_entropy(even, 8).item() == pytest.approx(math.log(8))
    assert statistics.load_entropy(torch.zeros(5, 1, dtype=torch.long), 8).item() == 0


def test_router_entropy():
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert statistics.router_entropy(probs).item() == pytest.approx(math.log(2) / 2)


def test_dropped_share():
    assert statistics.dropped_share(8, torch.tensor([3, 3])) == pytest.approx(0.25)
    assert statistics.dropped_share(0, torch.tensor([0, 0])) == 0


def test_co_activation_by_hand():
    together = statistics.co_activation(EXPERTS, 5)
    assert together[0].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    assert together[3].tolist() == [0, 1, 0, 1, 0]
    assert together[4].tolist() == [0] * 5


def test_saturation_counts_common_experts_in_any_order():
    assert statistics.saturation(EXPERTS, EXPERTS.flip(1)) == 1
    late = torch.tensor([[0, 2], [1, 3], [1, 0], [1, 2]])
    assert statistics.saturation(EXPERTS, late) == pytest.approx((1 + 0 + 2 + 1) / 8)
    with pytest.raises(ValueError, match="same tokens"):
        statistics.saturation(EXPERTS, EXPERTS[:2])


def test_specialization_by_group():
    share = statistics.specialization(EXPERTS, torch.tensor([0, 1, 0, 1]), 5, 3)
    assert share[0].tolist() == [1, 1, 0, 0, 0]
    assert share[1].tolist() == [0.5, 0.5, 0.5, 0.5, 0]
    assert share[2].tolist() == [0] * 5
    with pytest.raises(ValueError, match="3 groups for 4"):
        statistics.specialization(EXPERTS, torch.tensor([0, 1, 0]), 5, 2)
