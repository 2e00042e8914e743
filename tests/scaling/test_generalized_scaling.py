import csv

import numpy as np
import pytest
import torch

from lablib.exercises import generalized_scaling as exercises
from lablib.models import GPT, GPTConfig
from lablib.paths import data_dir
from lablib.scaling import generalized_scaling as gs
from lablib.scaling.inference import fit as fit_law
from lablib.scaling.laws import abnar, frantar, generalized, hoffmann, published
from lablib.studies import generalized_scaling as study
from lablib.training import fit

LAWS = {"EXPERTS": gs.EXPERTS, "PRUNED": gs.PRUNED, "DENSE": gs.DENSE}


def small(**options):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "ffn_dim": 20}
    return GPT(GPTConfig(**sizes | {"init_std": 0.25, "max_length": 32} | options))


def tokens(rows=3, length=12):
    return torch.randint(50, (rows, length))


def even(n=50):
    return torch.ones(n, dtype=torch.long)


@pytest.mark.parametrize("name", LAWS)
def test_the_definition_is_the_law_that_is_fitted(name):
    N, D = np.geomspace(1e4, 1e10, 7)[:, None], np.geomspace(1e6, 1e12, 5)
    for S in (0.0, 0.5, 0.98):
        ours = gs.generalized_loss(N, D, S, **LAWS[name])
        np.testing.assert_allclose(ours, generalized(LAWS[name], N=N, D=D, S=S), rtol=1e-12)


def test_a_dense_model_is_hoffmanns_and_equals_the_chinchilla_package():
    chinchilla = pytest.importorskip("chinchilla", reason="the chinchilla package is not installed")
    theirs = chinchilla.Chinchilla.__new__(chinchilla.Chinchilla)
    for name, key in zip(("E", "A", "B", "alpha", "beta"), ("e", "a", "b", "alpha", "beta")):
        setattr(theirs, name, gs.DENSE[key])
    for N, D in ((7e10, 1.4e12), (4e8, 8e9), (1e5, 1e6)):
        ours = gs.generalized_loss(N, D, 0.0, **gs.DENSE)
        assert ours == pytest.approx(float(theirs.predict_loss(N, D)), rel=1e-12)


def test_idle_parameters_leave_a_model_between_its_two_sizes():
    values = gs.EXPERTS | {"gamma": 0.0}
    for N in (1e7, 1e9):
        for S in (0.5, 0.9):
            loss = gs.generalized_loss(N, 1e10, S, **values)
            total = gs.generalized_loss(N / (1 - S), 1e10, 0.0, **values)
            assert total < loss, "c is above 0"
            equal = gs.dense_equivalent(values, N, S)
            assert gs.generalized_loss(equal, 1e10, 0.0, **values) == pytest.approx(loss)
            worth = gs.dense_equivalent(values | {"c": 0.0}, N, S)
            assert worth == pytest.approx(N / (1 - S)), "without the idle term they count in full"


def test_below_the_dense_floor_no_dense_model_is_as_good():
    assert gs.dense_equivalent(gs.PRUNED, 1e14, 0.9) == np.inf


def test_frantars_multipliers_come_from_frantars_law():
    printed = published("frantar")
    for S in (0.0, 0.5, 0.75, 0.875):
        times = gs.frantar_equivalent(S)
        sparse = frantar(printed, N=1e8, D=1e10, S=S)
        dense = frantar(printed, N=times * 1e8, D=1e10, S=0.0)
        assert float(sparse) == pytest.approx(float(dense), rel=1e-12)
    assert gs.frantar_equivalent(0.0) == 1
    assert gs.frantar_equivalent(0.875) == pytest.approx(printed["dense_equivalent"], rel=0.01)
    assert gs.frantar_equivalent(0.5, {**printed, "a_S": 0.0}) == 1, "nothing depends on sparsity"


def test_equal_flops_and_the_best_sparsity_of_a_total_size():
    N = np.array([1e8, 1e9])
    losses = gs.isoflop(gs.EXPERTS, 6e18, 0.5, N)
    by_hand = [gs.generalized_loss(n, 1e18 / n, 0.5, **gs.EXPERTS) for n in N]
    np.testing.assert_allclose(losses, by_hand)
    best = gs.best_sparsity(gs.EXPERTS, 1e10, 1e20)
    around = gs.at_total(gs.EXPERTS, 1e10, 1e20, np.linspace(0, 0.999, 20_001))
    assert gs.at_total(gs.EXPERTS, 1e10, 1e20, best) <= around.min() + 1e-6
    assert 0 < best < 0.999


def test_experts_have_one_of_n_active():
    dense = gs.sizes(small())
    mixed = gs.sizes(gs.hash_experts_(small(), 4, even()))
    feed_forward = 2 * 3 * 16 * 20
    assert dense == (mixed.active, mixed.active) and dense.sparsity == 0
    assert mixed.total == dense.total + 3 * feed_forward
    assert mixed.sparsity == pytest.approx(1 - dense.total / mixed.total)


def test_experts_are_chosen_by_the_byte_and_begin_as_the_dense_layer_does():
    model = gs.hash_experts_(small(), 4, even())
    text = tokens()
    model(text)
    layer = model.blocks[0].mlp
    assigned = layer.router(torch.randn(text.numel(), 16))
    expert = torch.repeat_interleave(torch.arange(4), assigned.counts)
    assert torch.equal(layer.router.table[text.flatten()[assigned.token], 0], expert)
    assert torch.equal(layer.router.table[:, 0].bincount(), torch.tensor([13, 13, 12, 12]))
    dense = small().blocks[0].mlp
    stds = [layer.experts.gate_up.std().item(), layer.experts.down.std().item()]
    assert stds == pytest.approx(
        [dense.gate.weight.std().item(), dense.down.weight.std().item()], rel=0.15
    )


def test_masks_stay_through_training_and_outputs_begin_as_large():
    torch.manual_seed(0)
    wide = small(dim=64, n_heads=4, ffn_dim=256)
    x = torch.randn(50, 64)
    before = wide.blocks[0].mlp.up(x).std().item()
    gs.mask_(wide, 0.75)
    assert wide.blocks[0].mlp.up(x).std().item() == pytest.approx(before, rel=0.1)
    zero = wide.blocks[1].attention.query.weight == 0
    fit(wide, [tokens(4, 13)], steps=3, lr=1e-2, progress=False)
    assert torch.equal(wide.blocks[1].attention.query.weight == 0, zero)
    assert gs.sizes(wide).sparsity == pytest.approx(0.75, abs=0.01)


def test_sizes_count_masks_as_the_layers_see_them():
    model = gs.mask_(small(), 0.5)
    matrices = sum(p.numel() for p in small().blocks.parameters() if p.ndim == 2)
    norms = sum(p.numel() for p in small().blocks.parameters() if p.ndim == 1)
    size = gs.sizes(model)
    assert size.total == matrices + norms
    assert size.active == pytest.approx(norms + matrices / 2, rel=0.05)


def test_pruning_takes_the_smallest_of_each_matrix():
    model, before = gs.prune_(small(), 0.25), small()
    for part in ("gate", "down"):
        now = getattr(model.blocks[1].mlp, part).weight
        then = getattr(before.blocks[1].mlp, part).weight
        assert int((now == 0).sum()) == 80
        assert then[now == 0].abs().max() <= then[now != 0].abs().min()
    untouched = gs.prune_(small(), 0.0)
    assert gs.sizes(untouched).sparsity == 0


def test_it_prunes_transformers_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    model = gs.prune_(transformers.LlamaForCausalLM(config), 0.5)
    assert gs.sizes(model).sparsity == pytest.approx(0.5, abs=0.02)


def drawn(values, noise=0.0):
    N, D, S = (c.ravel() for c in np.meshgrid((3e3, 1e4, 3e4, 6e4), (2e5, 6e5, 2e6), (0, 0.4, 0.8)))
    loss = gs.generalized_loss(N, D, S, **values)
    loss = loss * np.exp(noise * np.random.default_rng(0).normal(size=len(loss)))
    return {"N": N, "D": D, "S": S, "loss": loss}


TRUE = {"e": 0.7, "a": 15.0, "b": 90.0, "c": 4.0, "alpha": 0.3, "beta": 0.35, "gamma": 0.05}


def test_the_fit_finds_the_parameters_again():
    assert gs.fit_generalized(drawn(TRUE)) == pytest.approx(TRUE, rel=0.02)


def huber(table, values, delta=1e-3):
    predicted = gs.generalized_loss(table["N"], table["D"], table["S"], **values)
    off = np.abs(np.log(predicted / table["loss"]))
    return np.where(off < delta, off**2 / 2, delta * (off - delta / 2)).sum()


@pytest.mark.parametrize("sparse", [True, False])
def test_it_is_as_good_as_the_general_fit(sparse):
    table = drawn(TRUE, 0.01)
    if not sparse:
        table["S"] = 0 * table["S"]
    ours = gs.fit_generalized(table)
    law = generalized if sparse else hoffmann
    assert huber(table, ours) == pytest.approx(fit_law(law, table, "loss").objective, rel=1e-4)
    assert sparse or ours["c"] == ours["gamma"] == 0


def first_seeds_rows():
    from lablib.evidence.studies import matching
    from lablib.evidence.studies import study as find

    runs = matching(find("generalized-scaling").runs(), seed=0)
    return study.rows_of(next(run for run in runs if "error_told" in run))


def test_wider_bounds_find_the_same_law_and_on_few_rows_a_lower_one():
    wide = gs.fit_widely(drawn(TRUE))
    assert wide.values == pytest.approx(TRUE, rel=0.02) and not wide.warning
    table = study.columns(first_seeds_rows())
    few = gs.fit_widely(table)
    assert few.objective == pytest.approx(huber(table, few.values), rel=1e-6)
    assert few.objective < huber(table, gs.fit_generalized(table))


def test_on_a_seeds_few_rows_the_sign_of_c_depends_on_a_floor_that_may_move():
    rows = first_seeds_rows()
    free = study.fitted(rows)
    still = fit_law(generalized, study.columns(rows), "loss", fixed={"gamma": 0.0}, starts=[free])
    assert still.values["c"] < 0 < free["c"]


def test_a_black_box_search_predicts_what_the_fit_does_and_need_not_find_its_parameters():
    table = drawn(TRUE)
    bounds = {"e": (0.1, 1.5), "a": (1, 60), "b": (1, 400), "c": (-20, 20), "alpha": (0.05, 1)}
    bounds |= {"beta": (0.05, 1), "gamma": (-1, 1)}
    values = gs.search(table, bounds)
    predicted = gs.generalized_loss(table["N"], table["D"], table["S"], **values)
    assert np.abs(np.log(predicted / table["loss"])).max() < 0.02
    assert all(low <= values[name] <= high for name, (low, high) in bounds.items())


def one_seeds_rows(values):
    active = dict(zip(study.SIZES, (3360, 13376, 26752)))
    cells = [(size, n, study.MOST) for size in study.SIZES for n in study.COUNTS]
    cells += [(size, n, study.LESS) for size in study.SIZES[:2] for n in (1, 4)]
    rows = []
    for size, n, seen in cells:
        N = active[size]
        total = N * (1 + 0.69 * (n - 1))
        loss = float(gs.generalized_loss(N, seen, 1 - N / total, **values))
        rows.append(dict(zip(study.COLUMNS, (*size, n, seen, N, total, loss))))
    return rows


def test_the_study_tells_a_law_that_holds_from_laws_that_do_not():
    made = study.laws(one_seeds_rows(TRUE))
    assert made["error_told"] < 0.01 < made["error_untold"]
    assert made["error_untold"] == min(made["error_active"], made["error_total"])
    dense_on_total = study.laws(one_seeds_rows(TRUE | {"c": 0.0, "gamma": 0.0}))
    assert dense_on_total["error_total"] < 1e-3 < dense_on_total["error_active"]


def test_what_is_left_out_is_sparse_and_larger_or_sparser():
    rows = one_seeds_rows(TRUE)
    out = [row for row in rows if study.left_out(row)]
    assert len(out) == 5 and all(row["n_experts"] > 1 for row in out)
    assert all(row["n_experts"] == 8 or row["n_layers"] == 2 for row in out)


def test_constants_are_those_of_the_published_table():
    path = data_dir() / "published" / "generalized-scaling.csv"
    rows = csv.DictReader(path.open(encoding="utf-8"))
    printed = {row["name"]: float(row["value"]) for row in rows}
    for kind, values in {"dense": gs.DENSE, "pruned": gs.PRUNED, "experts": gs.EXPERTS}.items():
        assert values == {name: printed[f"{kind} {name}"] for name in values}
    dense = {name: gs.DENSE[name.lower()] for name in hoffmann.names}
    assert dense == {name: published("hoffmann")[name] for name in dense}, (
        "fitted to Hoffmann's law"
    )


def test_printed_laws_follow_those_that_they_were_fitted_to():
    # Frantar et al. count what is left, Abnar et al. count all, this law what is active.
    for N, D, S in ((1e9, 2e10, 0.0), (1e9, 1e11, 0.9), (1.88e10, 1.102e11, 0.98)):
        ours = gs.generalized_loss(N * (1 - S), D, S, **gs.EXPERTS)
        assert ours == pytest.approx(float(abnar(published("abnar"), N=N, D=D, S=S)), rel=0.05)
    for S in (0.0, 0.5, 0.75):
        ours = gs.generalized_loss(4e7, 6e10, S, **gs.PRUNED)
        assert ours == pytest.approx(
            float(frantar(published("frantar"), N=4e7, D=6e10, S=S)), rel=0.05
        )


def with_both(total, D, S, e, a, b, c, alpha, beta, gamma):
    return gs.generalized_loss(total, D, S, e, a, b, c, alpha, beta, gamma)


def idle_over_total(total, D, S, e, a, b, c, alpha, beta, gamma):
    return e * (1 - S) ** gamma + (a + c * S) / total**alpha + b / D**beta


def fixed_floor(total, D, S, e, a, b, c, alpha, beta, gamma):
    return exercises._from_total(total, D, S, e, a, b, c, alpha, beta, 0.0)


def with_floor(N, S, e, a, c, alpha, gamma):
    sparse = e * (1 - S) ** gamma + (a * (1 - S) ** alpha + c * S) / N**alpha
    return (a / sparse) ** (1 / alpha)


def all_count(N, S, e, a, c, alpha, gamma):
    return N / (1 - S)


def own_floor(N, S, e, a, c, alpha, gamma):
    return (a / ((a * (1 - S) ** alpha + c * S) / N**alpha)) ** (1 / alpha)


def no_floor(N, e, a, c, alpha, gamma):
    return (c - alpha * a) / N**alpha


def undivided(N, e, a, c, alpha, gamma):
    return -gamma * e + c - alpha * a


def wrong_power(N, e, a, c, alpha, gamma):
    return -gamma * e + (c - a) / N**alpha


def moving_floor(N, D, S, loss, alpha, beta):
    columns = [1 - S, (1 - S) ** alpha / N**alpha, D**-beta, S / N**alpha]
    return np.linalg.lstsq(np.stack(columns, 1), loss, rcond=None)[0]


def logarithms(N, D, S, loss, alpha, beta):
    columns = [np.ones_like(N), (1 - S) ** alpha / N**alpha, D**-beta, S / N**alpha]
    return np.linalg.lstsq(np.stack(columns, 1), np.log(loss), rcond=None)[0]


def dense_alone(N, D, S, loss, alpha, beta):
    kept = S == 0
    law = exercises._still_floor(N[kept], D[kept], S[kept], loss[kept], alpha, beta)
    return np.array([*law[:3], law[1] * alpha])


WRONG = {
    "still_floor": [moving_floor, logarithms, dense_alone],
    "from_total": [with_both, idle_over_total, fixed_floor],
    "equivalent": [with_floor, all_count, own_floor],
    "slope": [no_floor, undivided, wrong_power],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])
