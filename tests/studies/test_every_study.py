"""What every study must be: whole, tuned on other seeds, current, and with verdicts that react."""

import inspect
import math

import pytest

from lablib.evidence.claims import REPRODUCED, judge
from lablib.evidence.studies import Shared, Study, exchanged, matching, replaced
from lablib.papers import papers
from lablib.paths import PACKAGE

STUDIES = [study for study in map(Study, papers()) if study.exists]
NAMES = {study.paper.name for study in STUDIES}
FILES = {path.stem for path in (PACKAGE / "studies").glob("*.py")} - {"__init__"}
SHARED = [Study(Shared(name.replace("_", "-"))) for name in sorted(FILES - NAMES)]
each = pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.paper.slug)
ROLES = [(study, id) for study in STUDIES for id in study.module.ROLES]
each_role = pytest.mark.parametrize(
    ("study", "id"), ROLES, ids=lambda value: getattr(value, "paper", value) and str(value)[:40]
)

each_of_all = pytest.mark.parametrize(
    "study", [*STUDIES, *SHARED], ids=lambda study: study.paper.slug
)


@each_of_all
def test_its_runs_are_whole_and_its_canary_lives(study):
    assert study.problems() == []


@each_of_all
def test_its_constants_are_stored(study):
    if study.has_own:
        assert study.read()[0].get("constants") == study.constants() | study.defaults()


@pytest.mark.parametrize("study", SHARED, ids=lambda study: study.paper.slug)
def test_a_shared_study_is_read(study):
    assert any(study in [one for one, _ in reader.reads] for reader in STUDIES)


@each_of_all
def test_it_is_plain_code(study):
    module = study.module
    assert module.__doc__ and (study in SHARED or callable(module.values))
    if not study.has_own:
        return
    names = set(inspect.signature(module.run).parameters)
    for point in [*module.POINTS, *module.TUNING, module.CANARY]:
        assert set(point) <= names
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    assert not [kind for kind in classes if kind.__module__ == module.__name__]


@each
def test_method_and_baseline_were_tuned_with_as_many_tries(study):
    roles = next((r for r in study.module.ROLES.values() if not isinstance(r["method"], str)), None)
    if roles is None:
        pytest.skip("what is compared are results of one run")
    tuning = [row["point"] for row in study.rows("TUNING")]
    kinds = [shared(roles[side], tuning) for side in ("method", "baseline")]
    tries = [len(matching(tuning, **kind)) for kind in kinds]
    assert tries[0] == tries[1] > 1


def shared(role, tuning):
    """What of a role names its kind in the tuning points, tuned values left out."""
    named = {k: v for k, v in role.items() if k != "lr"}
    return {k: v for k, v in named.items() if any(point.get(k) == v for point in tuning)}


@each
def test_every_direction_claim_is_judged_on_it(study):
    directions = {claim.id for claim in study.paper.claims if claim.kind == "direction"}
    values = study.module.values(study.runs())
    assert directions <= set(values) and directions == set(study.module.ROLES)
    for roles in study.module.ROLES.values():
        assert set(roles) == {"method", "baseline", "control"}, "None where no control is stored"


@each_role
def test_a_verdict_turns_when_method_and_baseline_are_exchanged(study, id):
    before = verdict(study, id, study.runs())
    roles = study.module.ROLES[id]
    after = verdict(study, id, exchanged(study.runs(), roles["method"], roles["baseline"]))
    assert not (before.verdict == after.verdict == REPRODUCED)
    neutral = math.log(before.measured) if effect(study, id) == "ratio" else before.measured
    turned = math.log(after.measured) if effect(study, id) == "ratio" else after.measured
    level = neutral == 0 != turned  # a tie to the last digit has no sign that could turn
    assert level or neutral * turned < 0, "the effect has the other sign"


@each_role
def test_a_control_in_the_methods_place_is_not_reproduced(study, id):
    roles = study.module.ROLES[id]
    if roles["control"] is None:
        pytest.skip("none is stored; the study says why")
    assert roles["control"] not in (roles["method"], roles["baseline"])
    instead = replaced(study.runs(), roles["method"], roles["control"])
    assert not reproduced(study, id, instead)


def reproduced(study, id, runs):
    """Whether the claim is; not when a control that is the baseline itself has no effect at all."""
    try:
        return verdict(study, id, runs).verdict == REPRODUCED
    except ValueError as error:
        if "one and the same effect" in str(error):
            return False
        raise


def verdict(study, id, runs):
    return judge(study.paper.claim(id), study.module.values(runs)[id])


def effect(study, id):
    return study.paper.claim(id).effect
