import json

import numpy as np
import pytest
import record_peers
from scipy.optimize import minimize_scalar

from lablib.paths import PACKAGE
from lablib.scaling import laws
from lablib.scaling.laws import allocate, published

PEERS = json.loads((PACKAGE / "scaling" / "peers.json").read_text("utf-8"))
ALL = [value for value in vars(laws).values() if isinstance(value, laws.Law)]
GENERALIZED = {"e": 1.2, "a": 30.0, "b": 300.0, "c": 4.0, "alpha": 0.4, "beta": 0.45, "gamma": 0.02}

REPEATED = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353}
REPEATED |= {"R_D": 15.4, "R_N": 5.3}


@pytest.mark.parametrize("peer", PEERS["laws"], ids=lambda peer: str(peer["values"]["E"]))
def test_hoffmann_is_package_chinchillas(peer):
    n, d = np.array(PEERS["N"]), np.array(PEERS["D"])
    assert laws.hoffmann(peer["values"], N=n, D=d) == pytest.approx(peer["loss"], rel=1e-10)
    found = np.array([allocate(laws.hoffmann, peer["values"], c) for c in PEERS["C"]]).T
    assert found == pytest.approx(np.array([peer["N_opt"], peer["D_opt"]]), rel=1e-10)


def test_the_recorded_values_are_package_chinchillas():
    pytest.importorskip("chinchilla")
    again = record_peers.chinchillas()
    assert again["laws"][0]["values"] == PEERS["laws"][0]["values"]
    for name in ("N", "D", "C"):
        assert again[name] == pytest.approx(PEERS[name], rel=1e-12)
    for now, then in zip(again["laws"], PEERS["laws"], strict=True):
        for name in ("loss", "N_opt", "D_opt"):
            assert now[name] == pytest.approx(then[name], rel=1e-12)


def test_the_published_corrections_are_those_that_peers_are_recorded_with():
    stored = published("hoffmann")
    for who, values in zip(("", "corrected_"), record_peers.VALUES):
        assert {name: stored[who + name] for name in values} == values


def test_what_a_paper_prints_is_what_its_law_needs():
    for law in (laws.hoffmann, laws.frantar, laws.abnar):
        printed = published(law.name.lower())
        assert set(law.names) <= set(printed) and all(
            p.low <= printed[p.name] <= p.high for p in law.parameters
        )
        assert 0 < float(law(printed, N=1e9, D=2e10, S=0.5)) < 5
    with pytest.raises(ValueError, match="hoffmann, frantar, abnar"):
        published("nobody")


def test_laws_are_their_equations():
    x, n, d, s = 500.0, 3e4, 2e6, 0.75
    table = {
        "power": ({"a": 3.0, "b": 0.2}, 3 * x**-0.2),
        "power_plus": ({"c": 0.5, "a": 3.0, "b": 0.2}, 0.5 + 3 * x**-0.2),
        "kaplan_nd": (
            {"N_c": 1e9, "alpha_N": 0.1, "D_c": 1e8, "alpha_D": 0.2},
            ((1e9 / n) ** 0.5 + 1e8 / d) ** 0.2,
        ),
        "kaplan_ns": (
            {"N_c": 1e9, "alpha_N": 0.1, "S_c": 50.0, "alpha_S": 0.7},
            (1e9 / n) ** 0.1 + (50 / x) ** 0.7,
        ),
        "generalized": (
            GENERALIZED,
            1.2 * 0.25**0.02 + (30 * 0.25**0.4 + 4 * 0.75) / n**0.4 + 300 / d**0.45,
        ),
        "frantar": (
            {
                "a_S": 16.8,
                "b_S": 0.722,
                "c_S": 45.0,
                "b_N": 0.245,
                "a_D": 6.9e8,
                "b_D": 0.203,
                "c": 0.651,
            },
            (16.8 * 0.25**0.722 + 45) * n**-0.245 + (6.9e8 / d) ** 0.203 + 0.651,
        ),
        "abnar": (
            dict(zip("abcde", (1e4, 5e3, 0.4, 17.0, 0.9)))
            | {"alpha": 0.6, "beta": 0.4, "lambda": -0.16, "delta": 0.16, "gamma": 0.15},
            1e4 / n**0.6 + 5e3 / d**0.4 + 0.4 * 0.25**0.16 + 17 / (0.25**0.16 * n**0.15) + 0.9,
        ),
        "cpt": (
            {"E": 1.5, "A": 420.0, "B": 433.0, "alpha": 0.4, "beta": 0.2, "gamma": 0.08},
            1.5 + 420 / n**0.4 + 433 / (d**0.2 * n**0.08),
        ),
        "steps": ({"S_min": 300.0, "E_min": 9e5}, 300 + 9e5 / 64),
        "hyperparameter": ({"c": 1.79, "a": -0.713, "b": 0.307}, 1.79 * n**-0.713 * d**0.307),
    }
    for name, (values, expected) in table.items():
        got = getattr(laws, name)(values, x=x, N=n, D=d, S=x if name == "kaplan_ns" else s, B=64.0)
        assert got == pytest.approx(expected, rel=1e-12), name


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_a_law_takes_columns_that_broadcast_and_every_start_is_a_number(law):
    columns = dict.fromkeys(law.columns, np.full((3, 1), 64.0)) | {"S": np.full((1, 2), 0.5)}
    for start in law.starts()[:: max(1, len(law.starts()) // 5)]:
        values = law(dict(zip(law.names, start)), **columns)
        assert np.isfinite(values).all() and (values > 0).all()
    with pytest.raises(KeyError):
        law({}, **columns)


def test_without_sparsity_the_generalized_law_is_hoffmanns():
    values = {"E": 1.2, "A": 30.0, "B": 300.0, "alpha": 0.4, "beta": 0.45}
    n = np.logspace(3, 9, 5)
    expected = laws.hoffmann(values, N=n, D=20 * n)
    assert laws.generalized(GENERALIZED, N=n, D=20 * n, S=0.0) == pytest.approx(expected, rel=1e-12)


def test_repeated_tokens_are_worth_the_sum_of_values_that_decay():
    unique, epochs = 1e9, 6
    fine = 1000  # each pass in so many parts: a part after r passes is worth exp(-r / R*)
    parts = (np.arange((epochs - 1) * fine) + 0.5) / fine
    effective = unique * (1 + np.exp(-parts / 15.4).sum() / fine)
    seen = laws.data_constrained(REPEATED, N=1e7, D=epochs * unique, U=unique)
    assert seen == pytest.approx(laws.hoffmann(REPEATED, N=1e7, D=effective), rel=1e-7)
    new = laws.data_constrained(REPEATED, N=1e7, D=unique, U=epochs * unique)
    assert new == pytest.approx(laws.hoffmann(REPEATED, N=1e7, D=unique), rel=1e-12)


def test_spare_weights_are_worth_less():
    large = laws.data_constrained(REPEATED, N=1e12, D=1e8, U=1e8)
    assert large > laws.hoffmann(REPEATED, N=1e12, D=1e8) * 1.001


@pytest.mark.parametrize("law", [laws.hoffmann, laws.cpt, laws.kaplan_nd, laws.generalized])
def test_allocation_is_a_minimum(law):
    values = GENERALIZED | {"E": 1.2, "A": 30.0, "B": 300.0}
    values |= {"N_c": 1e9, "alpha_N": 0.1, "D_c": 1e8, "alpha_D": 0.15}
    n, d = allocate(law, values, 1e15, S=0.5)
    assert 6 * n * d == pytest.approx(1e15)

    def loss(log_n):
        return law(values, N=np.exp(log_n), D=1e15 / 6 / np.exp(log_n), S=0.5)

    best = minimize_scalar(loss, bounds=(np.log(n) - 2, np.log(n) + 2), method="bounded").x
    assert np.log(n) == pytest.approx(best, abs=1e-4)


def test_what_can_not_be_allocated_is_refused():
    with pytest.raises(ValueError, match="no N and D"):
        allocate(laws.steps, {"S_min": 1.0, "E_min": 1.0}, 1e9)
    with pytest.raises(ValueError, match="compute is 0"):
        allocate(laws.hoffmann, PEERS["laws"][0]["values"], 0)
    with pytest.raises(ValueError, match="larger is always better"):
        allocate(laws.cpt, PEERS["laws"][0]["values"] | {"gamma": 0.3}, 1e9)
