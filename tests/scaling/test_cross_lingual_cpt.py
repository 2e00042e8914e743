"""Continual pre-training: the law, its allocation, what is saved, and replay."""

import csv
import itertools
from copy import deepcopy

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lablib.evidence.studies import Study
from lablib.exercises import cross_lingual_cpt as exercises
from lablib.lab.grading import outcome
from lablib.papers import paper
from lablib.paths import data_dir
from lablib.scaling import cross_lingual_cpt as cpt
from lablib.scaling import laws
from lablib.studies import cross_lingual_cpt as study
from lablib.training import evaluate

SCRATCH, CONTINUED = cpt.published("scratch"), cpt.published("continued")
BOTH = {"scratch": SCRATCH, "continued": CONTINUED}


def test_every_published_value_says_where_it_is_printed():
    path = data_dir() / "published" / "cross-lingual-cpt.csv"
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["source"] and float(row["value"]) for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
    assert {name: SCRATCH[name] for name in cpt.KEPT} == {n: CONTINUED[n] for n in cpt.KEPT}


@pytest.mark.parametrize("kind", BOTH)
def test_printed_allocations_follow_from_the_printed_values(kind):
    for name, value in cpt.frontier(BOTH[kind])._asdict().items():
        assert value == pytest.approx(cpt.printed(f"{kind} frontier {name}"), rel=0.01), name


@pytest.mark.parametrize("kind", BOTH)
def test_the_allocation_is_the_least_loss(kind):
    made = cpt.frontier(BOTH[kind])
    for C in (1e18, 1e21, 1e25):

        def at(log_N, C=C):
            return cpt.loss(BOTH[kind], np.exp(log_N), C / 6 / np.exp(log_N))

        found = minimize_scalar(at, bounds=(5, 40), method="bounded", options={"xatol": 1e-9})
        assert made.size * C**made.a == pytest.approx(np.exp(found.x), rel=1e-4)
        assert made.size * C**made.a * made.data * C**made.b == pytest.approx(C / 6)
        assert cpt.least_loss(BOTH[kind], C) == pytest.approx(found.fun)


def test_law_and_allocation_are_the_shared_modules():
    N, D = 10 ** np.random.default_rng(0).uniform(7, 11, (2, 20))
    for law, values in ((laws.hoffmann, SCRATCH), (laws.cpt, CONTINUED)):
        np.testing.assert_allclose(cpt.loss(values, N, D), law(values, N=N, D=D), rtol=1e-12)
        made = cpt.frontier(values)
        size, data = laws.allocate(law, values, 1e21)
        assert (made.size * 1e21**made.a, made.data * 1e21**made.b) == pytest.approx((size, data))


def test_without_gamma_it_is_hoffmanns():
    values = CONTINUED | {"gamma": 0.0}
    without = {name: value for name, value in values.items() if name != "gamma"}
    assert cpt.loss(values, 1e9, 1e10) == cpt.loss(without, 1e9, 1e10)
    assert cpt.frontier(values) == cpt.frontier(without)
    assert cpt.loss(CONTINUED, 1e9, 1e10) < cpt.loss(values, 1e9, 1e10)


def test_tokens_from_scratch_reach_the_same_loss():
    D = np.geomspace(1e7, 1e11, 9)
    needed = cpt.tokens_from_scratch(SCRATCH, CONTINUED, 1e9, D)
    reached = cpt.loss(SCRATCH, 1e9, needed)
    np.testing.assert_allclose(reached, cpt.loss(CONTINUED, 1e9, D), rtol=1e-12)
    shares = cpt.saved(D, needed)
    assert (np.diff(shares) < 0).all() and shares[0] > 0 > shares[-1]
    np.testing.assert_allclose(cpt.transferred_data(D, needed), shares * needed)


def test_what_is_forgotten_is_how_far_the_loss_rose():
    np.testing.assert_allclose(cpt.forgotten(2.4, np.array([3.68, 2.3])), [1.28, -0.1])


def test_the_laws_meet_where_continuing_stops_to_pay():
    N = np.array([1e8, 1e9, 5.5e9])
    D = cpt.pays_until(SCRATCH, CONTINUED, N)
    np.testing.assert_allclose(cpt.loss(SCRATCH, N, D), cpt.loss(CONTINUED, N, D), rtol=1e-12)
    np.testing.assert_allclose(cpt.tokens_from_scratch(SCRATCH, CONTINUED, N, D), D)
    # As printed, they meet before the tokens at which section 1 still sees 36 % saved.
    assert D[-1] < cpt.printed("example continued")


def test_table_2a_and_section_4_2_disagree_on_who_is_ahead_at_best_sizes():
    """Whatever the exponents are that round to the table's, the continued model stays behind."""
    C = np.geomspace(1e18, 1e24, 7)
    assert cpt.reported_loss("scratch", 1.0) == 33.69907
    assert (cpt.reported_loss("continued", C) < cpt.reported_loss("scratch", C)).all()
    for signs in itertools.product((-1, 0, 1), repeat=4):
        alpha, beta, new, gamma = 0.005 * np.array(signs) + (0.40, 0.30, 0.20, 0.08)
        scratch = SCRATCH | {"alpha": alpha, "beta": beta}
        continued = CONTINUED | {"alpha": alpha, "beta": new, "gamma": gamma}
        assert (cpt.least_loss(continued, C) > cpt.least_loss(scratch, C)).all()


def test_at_the_turning_point_both_have_one_size():
    C = cpt.turning_point(SCRATCH, CONTINUED)
    sizes = [cpt.frontier(values).size * C ** cpt.frontier(values).a for values in BOTH.values()]
    assert sizes[0] == pytest.approx(sizes[1])
    assert 1e26 < C < 1e27
    assert laws.allocate(laws.cpt, CONTINUED, 1e21) > laws.allocate(laws.hoffmann, SCRATCH, 1e21)


def test_tokens_to_follows_power_laws_and_goes_on_beyond_the_ends():
    tokens = np.array([1e5, 3e5, 1e6])
    goals = np.array([3.0, 2.4, 2.0, 1.5])
    exact = (goals / 10) ** (-1 / 0.12)
    assert exact[0] < tokens[0] and exact[-1] > tokens[-1]
    np.testing.assert_allclose(cpt.tokens_to(tokens, 10 * tokens**-0.12, goals), exact)
    bent = np.array([3.0, 2.2, 2.0])
    np.testing.assert_allclose(cpt.tokens_to(tokens, bent, bent), tokens)
    with pytest.raises(ValueError, match=r"losses must fall with tokens, not go \[3.0, 3.0, 2.0\]"):
        cpt.tokens_to(tokens, np.array([3.0, 3.0, 2.0]), 2.5)


def test_a_continued_fit_recovers_what_made_the_losses():
    N, D = (grid.ravel() for grid in np.meshgrid([1e8, 1e9, 5e9], np.geomspace(1e9, 1e11, 4)))
    made = cpt.fit_continued(SCRATCH, {"N": N, "D": D, "loss": cpt.loss(CONTINUED, N, D)})
    for name, value in CONTINUED.items():
        assert made.values[name] == pytest.approx(value, rel=1e-3), name


def test_replay_mixes_all_of_the_target_with_the_first_of_the_source():
    target, source = np.arange(1000, 1900), np.arange(500)
    both = cpt.replay(source, target, 0.1, piece=50, seed=1)
    assert sorted(both) == [*range(100), *target]
    assert (np.diff(np.flatnonzero(both < 500)) > 1).any(), "not in one lump"
    assert (cpt.replay(source, target, 0.1, piece=50, seed=1) == both).all()
    assert (cpt.replay(source, target, 0.1, piece=50, seed=2) != both).any()
    assert cpt.replay(source, target, 0.0) is target
    with pytest.raises(ValueError, match="900 of the source are needed; there are 500"):
        cpt.replay(source, target, 0.5)
    with pytest.raises(ValueError, match="ratio is 1: give a share"):
        cpt.replay(source, target, 1)


PARAMETERS = dict(zip(study.SIZES, (13_408, 26_784, 55_536, 150_976)))


def made_up(**changes):
    """Rows of a study whose losses are the laws', with no noise."""
    values = {"E": 1.0, "A": 6.0, "alpha": 0.3, "B": 60.0, "beta": 0.35}
    joint = values | {"B": 40.0, "beta": 0.32, "gamma": 0.03} | changes
    rows = []
    for kind in study.PLAN:
        language, layers, dim, start, tokens, replay = kind
        N = PARAMETERS[layers, dim]
        law = joint if start == "english" else values
        loss = cpt.loss(law, N, max(tokens, 1000)) + 0.01 * (language == "hebrew")
        rows.append([*kind, N, loss, 3 - replay])
    return rows


def test_the_study_finds_laws_that_made_its_rows():
    made = study.compared(made_up())
    assert made["error_joint"] < 1e-4 < made["error_plain"]
    assert made["joint_law"][-1] == pytest.approx(0.03, abs=1e-3)
    assert made["loss_continued"] < made["loss_scratch"]
    assert made["saved_early"] > made["saved_chichewa"] > 0
    assert (made["english_after"], made["english_replay"]) == (3.0, 2.9)


def test_laws_are_asked_for_the_largest_size_which_they_have_not_seen():
    rows = [
        [*row[:7], row[7] * (1.1 if row[2] == 64 and row[3] == "english" else 1), row[8]]
        for row in made_up()
    ]
    assert study.compared(rows)["error_joint"] == pytest.approx(np.log(1.1), abs=1e-3)


def test_no_language_trains_on_a_book_that_another_is_judged_on():
    names = [{book.name for book in study.load(c)} & study.BOOKS for c in study.CORPORA["english"]]
    assert names == [{"Joshua", "Esther", "Jonah", "Micah"}, set()]
    for language, word in (("english", b"Nineveh"), ("chichewa", b"Ninive"), ("hebrew", "נינוה")):
        word = word if isinstance(word, bytes) else word.encode()
        held_out = study.text(language).held_out.tobytes()
        assert held_out.count(word) >= 5, "Jonah is there"
        assert len(held_out) > 65_536 + 1, "512 windows of 128"


def test_a_run_has_a_row_for_each_kind():
    kinds = [("hebrew", 1, 16, "english", 0, 0.0), ("chichewa", 1, 16, "english", 4096, 0.5)]
    made = study.run(200, kinds=kinds, source=4096, factor=0.16, windows=4)
    rows = study.named(made["rows"])
    assert [row["language"] for row in rows] == ["hebrew", "chichewa"]
    assert made["loss"] == rows[1]["loss"] < 5.6 and rows[0]["N"] == 3376
    assert "loss_continued" not in made


def test_the_crossing_of_the_exercise_is_the_turning_point():
    one, other = cpt.frontier(SCRATCH), cpt.frontier(CONTINUED)
    made = exercises.crossing.reference((one.size, one.a), (other.size, other.a))
    assert made == pytest.approx(cpt.turning_point(SCRATCH, CONTINUED))


def test_runs_of_a_seed_are_read_together():
    kind = ("chichewa", *study.LARGE, "english", study.MIDDLE)
    parts = [
        {"seed": 3, "rows": [[*kind, ratio, 55536, 1.5 + ratio, 3 - ratio]]}
        for ratio in study.RATIOS
    ]
    other = {"seed": 3, "source": 5, "rows": [[*kind, 0.0, 55536, 9.0, 9.0]]}
    rows = study.by_seed([*parts, other])
    assert list(rows) == [3] and len(rows[3]) == len(study.RATIOS)
    np.testing.assert_allclose(study.replayed([rows[3]], "english"), [3 - np.array(study.RATIOS)])


def test_continued_and_fresh_models_were_tuned_alike():
    """Of the rates that were tried for each start, the study has the best of both seeds' mean."""
    losses = {}
    for run in Study(paper("cross-lingual-cpt")).runs("TUNING"):
        for row in study.named(run["rows"]):
            where = row["language"], row["dim"], row["start"]
            losses.setdefault(where, {}).setdefault(run["factor"], []).append(row["loss"])
    assert len(losses) == 8 and {start for *_, start in losses} == set(study.STARTS)
    for (language, _, _), tried in losses.items():
        assert len(tried) >= 4 and {len(both) for both in tried.values()} == {len(study.BOTH)}
        best = min(tried, key=lambda factor: sum(tried[factor]))
        assert min(tried) < best == study.RATES[language] < max(tried)


def read_in_all(tokens, loss, from_scratch, losses):
    return exercises._tokens_saved(tokens, loss, from_scratch, losses) + tokens


def as_a_share(tokens, loss, from_scratch, losses):
    needed = read_in_all(tokens, loss, from_scratch, losses)
    return 1 - tokens / needed


def without_logarithms(tokens, loss, from_scratch, losses):
    return float(np.interp(-loss, -losses, from_scratch)) - tokens


def upside_down(one, other):
    return 1 / exercises._crossing(one, other)


def no_root(one, other):
    (c, a), (d, b) = one, other
    return (d / c) ** (a - b)


def share_of_the_new(new, ratio):
    return new * ratio


def all_that_is_read(new, ratio):
    return new / (1 - ratio)


def by_way_of(*texts):
    """Gains of `detour` when the texts before the Hebrew are others, by the names they have."""

    def answer(model, read, loss, english, chichewa, hebrew):
        named = {"english": english, "as much": english[: len(chichewa)], "chichewa": chichewa}
        named |= {"hebrew": hebrew}
        named |= {f"{name}, hebrew": np.concatenate([named[name], hebrew]) for name in named}

        def after(names):
            reader = model
            for name in names:
                reader = read(reader, named[name])
            return loss(reader)

        direct, rival, ours = map(after, texts)
        return direct - ours, rival - ours

    return answer


DIRECT, CHICHEWA = ("hebrew",), ("chichewa", "hebrew")
all_the_english = by_way_of(DIRECT, ("english", "hebrew"), CHICHEWA)
before_the_hebrew = by_way_of((), ("as much",), ("chichewa",))
chichewa_last = by_way_of(DIRECT, ("hebrew", "as much"), ("hebrew", "chichewa"))
no_english_rival = by_way_of(DIRECT, DIRECT, CHICHEWA)
in_one_training = by_way_of(DIRECT, ("as much, hebrew",), ("chichewa, hebrew",))


def losses_turned(*given):
    return tuple(-gain for gain in exercises._detour(*given))


WRONG = {
    "tokens_saved": [read_in_all, as_a_share, without_logarithms],
    "crossing": [upside_down, no_root],
    "english_text": [share_of_the_new, all_that_is_read],
    "detour": [
        all_the_english,
        before_the_hebrew,
        chichewa_last,
        no_english_rival,
        in_one_training,
        losses_turned,
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_exercises_tell_right_from_wrong(name, tells_right_from_wrong):
    tells_right_from_wrong(getattr(exercises, name), WRONG[name])


def test_the_check_of_the_detour_says_what_is_wrong():
    said = {
        all_the_english: "and no more",
        before_the_hebrew: "before they are judged",
        chichewa_last: "the Hebrew comes last",
        no_english_rival: "reads on in English",
        in_one_training: "each has its own schedule",
        losses_turned: "above 0 where",
    }
    for answer, text in said.items():
        assert text in outcome(exercises.detour, answer)[1]


def test_the_detour_can_be_run_with_what_the_study_has():
    """Bytes of three languages and a model of the grid, read as the exercise asks."""

    def read(model, text):
        reader = deepcopy(model)
        study.read(reader, text, 0.16, seed=200)
        return reader

    def loss(model):
        return evaluate(model, study.text("hebrew").windows(study.LENGTH, 4))

    texts = [study.text(name).first(4096, study.LENGTH) for name in study.CORPORA]
    model = study.build(200, 1, 16, None)
    before = loss(model)
    gains = exercises.detour.reference(model, read, loss, *texts)
    assert len(gains) == 2 and all(np.isfinite(gains)) and loss(model) == before


def test_what_is_measured_and_saved_is_read_off_each_seeds_rows():
    rows = study.named(made_up())
    tokens, losses = study.measured([rows, rows], "chichewa", study.LARGE, "scratch")
    assert tokens.tolist() == [*study.TOKENS] and losses.shape == (2, 3)
    assert (losses[0] == losses[1]).all() and (np.diff(losses[0]) < 0).all()
    one = study.share_saved(rows, "chichewa", study.LARGE, study.MIDDLE)
    assert study.mean_saved([rows, rows], study.LARGE, study.MIDDLE) == pytest.approx(one)
