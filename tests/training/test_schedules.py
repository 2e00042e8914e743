import pytest

from lablib.training import learning_rate_factor


def factors(schedule, **options):
    return [learning_rate_factor(step, 100, schedule, 10, **options) for step in range(100)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_peak(schedule):
    found = factors(schedule)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(found) == pytest.approx(1.0)


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    found = factors("cosine", floor=0.2)
    assert found[55] == pytest.approx(0.6)
    assert found[99] == pytest.approx(0.2, abs=1e-3)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_wsd_stays_then_falls_linearly():
    found = factors("wsd", floor=0.0, decay=0.2)
    assert found[10:81] == [1.0] * 71
    assert found[90] == pytest.approx(0.5) and found[99] == pytest.approx(0.05)


def test_constant_stays():
    assert factors("constant")[10:] == [1.0] * 90


def test_inverse_square_root_halves_when_steps_grow_fourfold():
    found = factors("inverse-sqrt")
    assert found[9] == 1 and max(found) == 1
    assert found[79] == pytest.approx(found[19] / 2)
    longer = [learning_rate_factor(step, 1000, "inverse-sqrt", 10) for step in range(100)]
    assert longer == found
