"""Tables, and what `coverage --check` finds: on stored results, and on forged ones."""

import copy
import json
import time

import pytest

from lablib.evidence import coverage
from lablib.evidence.coverage import State, problems_of, states
from lablib.evidence.studies import Study, StudyError
from lablib.papers import Paper, paper, papers
from lablib.paths import project_dir

PRESENT = [row for row in states() if row.present]


def test_every_stored_result_is_current_and_follows_from_its_values():
    assert [problem for row in PRESENT for problem in problems_of(row)] == []


def test_every_table_is_as_generated():
    wrong = [str(p) for p, text in coverage.tables().items() if p.read_text("utf-8") != text]
    assert wrong == [], "run `python -m lablib coverage`"


def test_tables_say_what_was_measured():
    made = {path.relative_to(project_dir()).as_posix(): t for path, t in coverage.tables().items()}
    row = next(row for row in PRESENT if row.paper.slug == "markov-chains")
    theme = made["labs/02-theory/README.md"]
    assert all(claim.text in theme for claim in row.paper.claims)
    assert (
        "| 4. Scaling laws | 0 of 10 |  |" in made["README.md"] or "04-scaling" in made["README.md"]
    )
    assert f"[201](02-theory/{row.paper.lab_name})" in made["labs/README.md"]


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lacks"):
        coverage.between_markers("no markers", "table")


def test_papers_without_a_lab_say_so():
    assert (
        State(paper("phi-3")).line == "planned"
        if any(p.slug == "phi-3" for p in papers())
        else True
    )
    assert {row.line for row in states() if not row.present} == {"planned"}


@pytest.fixture
def forged(tmp_path, monkeypatch):
    """A paper's stored result, to be changed by hand: edit(function) gives what is found then."""

    def edit(slug, change, whole=False):
        row = State(paper(slug))
        result = copy.deepcopy(row.result)
        change(result if whole else result["claims"])
        made = State(paper(slug))
        made.__dict__["result"] = result  # what reading a forged file would give
        return problems_of(made)

    return edit


def formula_of(claims):
    return next(claim for claim in claims if claim["kind"] == "formula")


def test_forged_results_are_found(forged):
    slug = "markov-chains"
    assert forged(slug, lambda claims: None) == []

    def larger(claims):
        formula_of(claims)["summary"] = "largest difference 3 over 36 values (1e-05 allowed)"

    def moved(claims):
        formula_of(claims)["values"]["ours"] += 3

    def twice(claims):
        claims.append(copy.deepcopy(claims[0]))

    def unknown(claims):
        claims.append({**claims[0], "claim": "another"})

    def fewer(claims):
        del claims[0]

    def turned(claims):
        claims[0]["verdict"] = "not reproduced at this scale"

    def measured(claims):
        claims[0]["measured"] += 0.1

    def narrower(claims):
        claim = next(claim for claim in claims if claim["interval"])
        claim["interval"] = [claim["measured"] - 1e-3, claim["measured"] + 1e-3]

    def kind(claims):
        formula_of(claims)["kind"] = "number"

    def nowhere(claims):
        del claims[0]["source"]

    def relabelled(claims):
        claim = next(claim for claim in claims if claim["claim"] == "in-context-exponent")
        claim |= {"source": "lab", "values": [-0.5], "measured": -0.5, "interval": None}
        claim |= {"verdict": "reproduced", "summary": "-0.5 beside -0.5 (off by 0%; 20% allowed)"}

    for change, message in [
        (measured, "as its measured"),
        (narrower, "as its interval"),
        (kind, "as its kind"),
        (nowhere, "its source is None"),
        (relabelled, "the lab's were taken"),
        (larger, "its values give"),
        (moved, "is not the largest"),
        (twice, "2 entries for"),
        (unknown, "no claim of its"),
        (fewer, "has no entry for"),
        (turned, "its values give"),
    ]:
        found = forged(slug, change)
        assert any(message in problem for problem in found), (change.__name__, found)


def test_what_was_measured_with_what_is_asked_for(forged):
    slug = "markov-chains"
    tier = forged(slug, lambda result: result.update(tier="smoke"), whole=True)
    assert any("smoke tier" in text for text in tier)
    content = forged(slug, lambda result: result.update(content={}), whole=True)
    assert any("names no corpus" in text for text in content)


def test_an_unfinished_study_hides_nothing_else(forged, monkeypatch):
    def lacking(study):
        raise StudyError("markov-chains.jsonl lacks 4 runs")

    monkeypatch.setattr(Study, "runs", lacking)
    found = forged("markov-chains", lambda claims: claims.append({**claims[0], "claim": "another"}))
    assert "markov-chains.jsonl lacks 4 runs" in found
    assert any("no claim of its" in text for text in found)


def test_a_direction_must_come_from_a_study(forged):
    def live(claims):
        for claim in claims:
            claim["source"] = "lab"

    assert any("judged on a study's runs" in text for text in forged("switch-transformers", live))


def test_a_result_that_cant_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("lablib.papers.data_dir", lambda: tmp_path)
    path = paper("glam").paths["result"]
    path.parent.mkdir(parents=True)
    path.write_text("{broken")
    with pytest.raises(ValueError, match=r"glam\.json can't be read"):
        _ = State(paper("glam")).result


def test_catalogue_and_map_answer_within_a_second_with_120_labs(tmp_path, monkeypatch, capsys):
    from lablib.cli import main
    from lablib.lab.map import paper_map
    from lablib.prepare import remember_labs

    fabricate(tmp_path)
    monkeypatch.setattr("lablib.papers.data_dir", lambda: tmp_path / "data")
    monkeypatch.setattr(
        Paper, "paths", property(lambda self: fabricated_paths(self, tmp_path)), raising=True
    )
    remember_labs()  # as set-up does
    assert all(row.present and not row.stale for row in states())
    start = time.process_time()
    paper_map()
    drawn = time.process_time()
    main(["papers"])
    listed = time.process_time()
    assert capsys.readouterr().out.count(" reproduced ") == 120
    assert drawn - start < 1 and listed - drawn < 1


def fabricated_paths(row, folder):
    names = {"lab": f"{row.lab}-{row.slug}.ipynb", "result": f"{row.slug}.json"}
    return {what: folder / name for what, name in names.items()}


def fabricate(folder):
    """120 labs and results as large as real ones."""
    from lablib.evidence.fingerprints import notebook_hash

    model = next(row for row in PRESENT if row.paper.slug == "markov-chains")
    book = model.paper.paths["lab"].read_text("utf-8")
    shared = {"code": notebook_hash(model.paper.paths["lab"])}
    for row in papers():
        lab = folder / f"{row.lab}-{row.slug}.ipynb"
        lab.write_text(book, "utf-8")
        result = {**model.result, **shared, "slug": row.slug}
        (folder / f"{row.slug}.json").write_text(json.dumps(result), "utf-8")
