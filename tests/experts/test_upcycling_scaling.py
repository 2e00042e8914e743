"""Scaling laws of upcycling: the printed laws, the break-even, and shared dense trainings."""

import math

import numpy as np
import pytest
import torch

from lablib.evidence.studies import Study
from lablib.exercises import upcycling_scaling as exercises
from lablib.experts import upcycling_scaling as us
from lablib.models import GPT, GPTConfig
from lablib.papers import paper
from lablib.scaling.fits import JointLaw, PowerLaw, fit_joint_law
from lablib.studies import upcycling_scaling as study
from lablib.training import fit


def test_the_law_with_sizes_is_the_joint_law_above_its_floor():
    for n in (1e8, 7e9):
        law = us.published("upcycled", n)
        for d1, d2 in ((1e9, 1e11), (2e12, 3e10)):
            assert law(d1, d2) == pytest.approx(us.upcycled_loss(d1, d2, n))
    assert us.published("dense", 1e9)(1e11) == pytest.approx(
        8.83 * 1e11**-0.088 + 12.3 * 1e9**-0.116 + 0.165
    )
    with pytest.raises(ValueError, match="'sparse' is none of dense, scratch, upcycled"):
        us.published("sparse", 1e9)


def test_more_dense_tokens_take_from_what_upcycled_ones_do():
    law = us.published("upcycled", 1e9)
    gains = [law(d1, 1e10) - law(d1, 2e10) for d1 in (1e9, 1e10, 1e11, 1e12)]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert law.exponent(1e12) == pytest.approx(0.085 - 7.98e-4 * math.log(1e12))


def test_the_printed_law_is_found_again_from_its_own_values():
    law = us.published("upcycled", 1e9)
    d1, d2 = (axis.ravel() for axis in np.meshgrid(*[np.geomspace(1e9, 1e12, 5)] * 2))
    made = fit_joint_law(d1, d2, law(d1, d2), floor=law.floor)
    assert made.interaction == pytest.approx(7.98e-4, rel=1e-4)
    assert (made.alpha, made.beta) == pytest.approx((0.043, 0.085), rel=1e-4)


def test_break_even_is_where_the_two_laws_meet_first():
    upcycled, scratch = JointLaw(5.0, 0.2, 0.1, 0.0, 1.0), PowerLaw(20.0, -0.5, 1.0)
    for d1 in (1e2, 1e4):
        at = us.break_even(upcycled, scratch, d1)
        assert scratch(at) == pytest.approx(float(upcycled(d1, at)))
        # 20 d^-0.5 = 5 d1^-0.2 d^-0.1
        assert at == pytest.approx((4 * d1**0.2) ** (1 / 0.4), rel=1e-6)
    assert us.break_even(upcycled, PowerLaw(20.0, -0.5, 9.0), 10) == math.inf
    assert us.break_even(upcycled, PowerLaw(0.1, -0.5, 1.0), 10) == 0


def test_by_the_printed_laws_break_even_grows_but_less_than_the_dense_tokens():
    laws = us.published("upcycled", 7e9), us.published("scratch", 7e9)
    places = [us.break_even(*laws, d1, 1e6) for d1 in (1e9, 1e10, 1e11, 1e12)]
    assert places == sorted(places)
    shares = np.array(places) / [1e9, 1e10, 1e11, 1e12]
    assert (np.diff(shares) < 0).all()


def test_snapshots_are_what_shorter_trainings_end_at():
    config = GPTConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, max_length=16)
    torch.manual_seed(0)
    batches = [torch.randint(20, (2, 9)) for _ in range(6)]
    options = {"lr": 1e-2, "schedule": "inverse-sqrt", "warmup": 2, "progress": False}

    def start():
        torch.manual_seed(1)
        return GPT(config)

    kept = {}
    fit(start(), batches, steps=6, loss=us.snapshots({2, 4}, kept), **options)
    assert sorted(kept) == [2, 4]
    for steps, copy in kept.items():
        short = start()
        fit(short, batches[:steps], steps=steps, **options)
        for mine, other in zip(copy.parameters(), short.parameters()):
            torch.testing.assert_close(mine, other)


def runs_of(law, scratch, seed=0, noise=0.0):
    """What the study's runs of one seed would store, were losses those of the two laws."""
    random, made = np.random.default_rng(seed), []
    for part in study.PARTS:
        dense = np.array(part["dense"])
        losses = law(dense[:, None], np.array(study.FURTHER))
        losses = losses * np.exp(random.normal(0, noise, losses.shape))
        run = {"seed": seed, "dim": 32, **part, "losses": losses.tolist()}
        run["tokens"] = (dense * study.BATCH * study.LENGTH).tolist()
        if part["scratch"]:
            run["scratch_losses"] = scratch(np.array(part["scratch"])).tolist()
        made.append(run)
    return made


def test_a_row_is_the_same_alone_and_beside_others(monkeypatch):
    monkeypatch.setattr(study, "WARMUP", 1)
    options = {"further": (2,), "rows": 16, "seed": 200}
    both, alone = study.run(dense=(2, 4), **options), study.run(dense=(4,), **options)
    assert both["losses"][1] == pytest.approx(alone["losses"][0], abs=1e-4)
    assert alone["tokens"] == [4 * 16 * 64] and both["dense_losses"][1:] == alone["dense_losses"]


LAW, FROM_SCRATCH = JointLaw(6.0, 0.12, 0.2, 0.01, 1.5), PowerLaw(30.0, -0.45, 1.5)


def test_runs_of_a_seed_make_one_grid_whatever_their_order():
    runs = runs_of(LAW, FROM_SCRATCH)
    short = runs[0] | {"dense": [50], "further": [50, 100], "losses": [[6.0, 5.0]]}
    (grid,) = study.grids([*runs[::-1], short])
    assert grid["dense"] == (100, 200, 400, 800, 1600) and grid["further"] == study.FURTHER
    np.testing.assert_allclose(
        grid["losses"], LAW(np.array(grid["dense"])[:, None], np.array(study.FURTHER))
    )
    assert study.grids(runs, dim=64) == []


def test_fits_of_one_grid_say_what_was_put_in():
    (grid,) = study.grids(runs_of(LAW, FROM_SCRATCH))
    made = study.fits(grid)
    ends = {"short": grid["dense"][0], "long": grid["dense"][-1]}
    assert made["exponent_short"] - made["exponent_long"] == pytest.approx(
        0.01 * math.log(ends["long"] / ends["short"]), rel=0.05
    )
    assert made["error_with"] < 1e-3 < made["error_without"]
    for name, steps in ends.items():
        level = LAW(steps, study.AT)
        brute = (30 / (level - 1.5)) ** (1 / 0.45) - study.AT
        assert made[f"head_start_{name}"] == pytest.approx(brute, rel=0.1, abs=20)
        assert made[f"per_step_{name}"] == pytest.approx(made[f"head_start_{name}"] / steps)


def huber(law, grid):
    """What `fit_joint_law` makes small, by the definition of Huber's loss."""
    off = np.log(law(np.array(grid["dense"])[:, None], np.array(grid["further"])))
    off = abs(off - np.log(grid["losses"])) / study.DELTA
    return float(np.where(off <= 1, off**2, 2 * off - 1).sum())


@pytest.mark.parametrize("place", range(5))
def test_other_starts_end_at_the_same_fit_of_the_stored_losses(place):
    from scipy.optimize import minimize

    grid = study.grids(Study(paper("upcycling-scaling")).runs())[place]
    d1, d2 = (axis.ravel() for axis in np.meshgrid(grid["dense"], grid["further"], indexing="ij"))
    law = study.LAWS["with"](d1, d2, np.ravel(grid["losses"]))
    random = np.random.default_rng(place)

    def cost(theta):
        coefficient, floor = np.exp(np.clip(theta[[0, 4]], -20, 20))
        return huber(JointLaw(coefficient, *theta[1:4], floor), grid)

    scale = {"maxiter": 6000, "maxfev": 6000, "xatol": 1e-8, "fatol": 1e-8, "adaptive": True}
    for floor in (0.01, 1.0, 2.5):
        powers = random.uniform([0.02, 0.1, 0.0], [0.2, 0.3, 0.05])
        start = np.array([2.0, *powers, math.log(floor)])
        for _ in range(4):  # the simplex is begun anew, or it stays in a corner
            end = minimize(cost, start, method="Nelder-Mead", options=scale)
            start = end.x
        assert end.fun == pytest.approx(huber(law, grid), abs=1e-3)
        assert end.x[3] == pytest.approx(law.interaction, abs=1e-4)


def test_scratch_has_caught_up_where_the_exercise_says():
    random = np.random.default_rng(0)
    steps = np.array([100.0, 200, 400, 800])
    for _ in range(50):
        upcycled = np.sort(random.uniform(3, 5, 4))[::-1]
        scratch = upcycled + random.uniform(-0.5, 1.0, 4)
        wanted = exercises._catches_up(steps, upcycled, scratch)
        made = study.caught_up(steps, upcycled, scratch)
        assert made == pytest.approx(min(wanted, steps[-1]))


def test_steps_to_a_loss_are_read_between_points_in_log_steps():
    steps, losses = [100, 200, 400], [3.0, 2.0, 1.5]
    assert study.steps_to(steps, losses, 2.5) == pytest.approx(100 * 2**0.5)
    assert study.steps_to(steps, losses, 9.0) == pytest.approx(100)
    assert study.steps_to(steps, losses, 1.0) == pytest.approx(400)


def forgets_interaction(d1, alpha2, alpha3):
    return 2**-alpha2


def adds_interaction(d1, alpha2, alpha3):
    return 2 ** -(alpha2 + alpha3 * math.log(d1))


def without_logarithms(losses, a, b):
    return exercises._interaction(np.exp(losses), a, b)


def undivided(losses, a, b):
    logs = np.log(losses)
    return logs[0, 0] - logs[0, 1] - logs[1, 0] + logs[1, 1]


def next_point(steps, upcycled, scratch):
    ahead = np.flatnonzero(scratch <= upcycled)
    return float(steps[ahead[0]]) if len(ahead) else math.inf


def along_steps(steps, upcycled, scratch):
    gap = scratch - upcycled
    ahead = np.flatnonzero(gap <= 0)
    if not len(ahead) or not ahead[0]:
        return math.inf if not len(ahead) else float(steps[0])
    at = ahead[0]
    share = gap[at - 1] / (gap[at - 1] - gap[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


WRONG = {
    "shrinks_to": [forgets_interaction, adds_interaction],
    "interaction": [without_logarithms, undivided],
    "catches_up": [next_point, along_steps],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
