import ast
import re
import subprocess
import sys

import pytest

from lablib.cli import main
from lablib.papers import Claim, UnknownPaper, nearest, paper, papers, themes
from lablib.paths import PACKAGE, notebooks, project_dir

PRESENT = [row for row in papers() if row.present]


def test_the_catalogue_is_whole():
    found = papers()
    assert len(found) == 120
    assert len({row.slug for row in found}) == len({row.lab for row in found}) == 120
    assert sorted(row.entry for row in found) == list(range(1, 121))
    assert {row.part for row in found} == {about["number"] for about in themes().values()}
    assert all(row.lab // 100 == row.part for row in found)
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", row.date) for row in found)


def test_every_path_follows_from_the_slug():
    root = project_dir()
    found = {key: path.relative_to(root).as_posix() for key, path in paper(302).paths.items()}
    assert found == {
        "catalogue": "lablib/papers/switch-transformers.toml",
        "technique": "lablib/experts/switch_transformers.py",
        "study": "lablib/studies/switch_transformers.py",
        "exercises": "lablib/exercises/switch_transformers.py",
        "lab": "labs/03-experts/302-switch-transformers.ipynb",
        "tests": "tests/experts/test_switch_transformers.py",
        "runs": "data/studies/switch-transformers.jsonl",
        "result": "data/results/switch-transformers.json",
    }


@pytest.mark.parametrize("row", PRESENT, ids=lambda row: row.slug)
def test_a_present_paper_lacks_no_place(row):
    directions = any(claim.kind == "direction" for claim in row.claims)
    optional = () if directions else ("study", "runs")
    missing = [what for what, path in row.paths.items() if not path.exists()]
    assert [what for what in missing if what not in optional] == []
    assert row.claims, "a lab measures at least one claim"
    assert len({claim.id for claim in row.claims}) == len(row.claims)


def test_no_file_belongs_to_no_paper():
    root = project_dir()
    expected = {path for row in PRESENT for path in row.paths.values()}
    own = ("technique", "study", "exercises", "tests")
    sources = {row.paths[what] for row in PRESENT for what in own if row.paths[what].exists()}
    sources |= {path for row in PRESENT for path in row.paths["tests"].parent.glob("*.py")}
    sources.add(PACKAGE / "exercises" / "start_here.py")
    shared = {PACKAGE / path for path in imported_by(sources)}
    places = [PACKAGE / theme for theme in themes()] + [PACKAGE / "studies", PACKAGE / "exercises"]
    files = [path for place in places for path in place.glob("*.py")]
    files += [
        *(path for path in notebooks() if path.parent != root / "labs"),
        *(root / "data/results").glob("*.json"),
    ]
    files += (root / "data/studies").glob("*.jsonl")
    commons = [path for path in shared if path.parent == PACKAGE / "studies"]
    expected |= {root / f"data/studies/{path.stem.replace('_', '-')}.jsonl" for path in commons}
    allowed = {"__init__.py", "start_here.py"}
    strays = [p for p in files if p not in expected | shared and p.name not in allowed]
    assert strays == [], "a theme's other modules are imported by what a present paper has"


def imported_by(paths):
    """Modules of lablib that these files, the present labs, or what they import, import."""
    waiting, done = [path.read_text("utf-8") for path in paths], set()
    waiting += [notebook_code(path) for path in notebooks()]
    while waiting:
        for name in imports(waiting.pop()):
            path = name.replace(".", "/").removeprefix("lablib/") + ".py"
            if path not in done and (PACKAGE / path).is_file():
                done.add(path)
                waiting.append((PACKAGE / path).read_text("utf-8"))
    return done


def imports(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def notebook_code(path):
    import json

    cells = json.loads(path.read_text("utf-8"))["cells"]
    lines = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").splitlines()
    return "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)


def test_themes_do_not_import_what_stands_above_them():
    above = ("lablib.lab", "lablib.evidence", "lablib.studies", "lablib.exercises")
    below = ["kernels", "data", "models", "training", *themes()]
    for path in (path for name in below for path in (PACKAGE / name).rglob("*.py")):
        names = [name for name in imports(path.read_text("utf-8")) if name.startswith(above)]
        assert names == [], path
    for path in (PACKAGE / "evidence").glob("*.py"):
        names = [
            n for n in imports(path.read_text("utf-8")) if n.split(".")[1:2] in map(list, themes())
        ]
        assert names == [], path


def test_unknown_papers_are_answered_with_the_nearest():
    assert nearest("swich-transformer")[0] == "switch-transformers"
    assert nearest("markov")[0] == "markov-chains"
    with pytest.raises(UnknownPaper, match="no paper is called 'lorra'; did you mean"):
        paper("lorra")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"kind": "guess"}, "none of number, formula, direction"),
        ({"kind": "number", "value": 1.0}, "a number needs tolerance"),
        ({"kind": "number", "value": 0.0, "tolerance": 0.1}, "relative to 0 allows nothing"),
        ({"kind": "formula"}, "a formula needs tolerance"),
        ({"kind": "formula", "tolerance": float("inf")}, "not zero or more"),
        ({"kind": "direction", "better": "smaller"}, "better = 'lower' or 'higher'"),
        ({"kind": "direction", "better": "lower", "effect": "size"}, "effect 'size'"),
    ],
)
def test_a_malformed_claim_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        Claim(id="x", text="t", paper="p", **row)


def test_a_file_that_cant_be_read_is_named(tmp_path):
    from lablib.papers import _paper

    broken = tmp_path / "broken.toml"
    broken.write_text("entry = = 3")
    with pytest.raises(ValueError, match=r"broken\.toml can't be read"):
        _paper(broken)
    broken.write_text('theme = "experts"\ndate = 2020-01-01\nunknown = 1')
    with pytest.raises(ValueError, match=r"broken\.toml: .*unknown"):
        _paper(broken)


def test_commands_print_what_they_should(capsys):
    assert main(["papers", "--theme", "theory"]) == 0
    out = capsys.readouterr().out
    assert "201  markov-chains" in out and out.rstrip().endswith("6 papers")
    assert main(["where", "markov-chains"]) == 0
    assert "lablib/theory/markov_chains.py" in capsys.readouterr().out
    assert main(["where", "markof-chains"]) == 2
    assert "did you mean markov-chains" in capsys.readouterr().err
    planned = next(row for row in papers() if not row.present)
    assert main(["verify", planned.slug]) == 2
    assert f"{planned.slug} has no lab yet" in capsys.readouterr().err
    assert main(["study", planned.slug]) == 2
    assert f"{planned.slug} has no study" in capsys.readouterr().err


LIGHT = """
import sys, time
start = time.process_time()
import lablib
print(time.process_time() - start)
import lablib.data, lablib.evidence, lablib.lab, lablib.models, lablib.papers, lablib.training
print("torch" in sys.modules)
"""


def test_importing_lablib_is_light():
    ran = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    seconds, torch = ran.stdout.split()
    assert float(seconds) < 0.3 and torch == "False"


def test_what_jupyter_keeps_beside_a_lab_is_no_lab(tmp_path, monkeypatch):
    monkeypatch.setattr("lablib.paths.project_dir", lambda: tmp_path)
    kept = [tmp_path / "labs" / place for place in ("00-a.ipynb", "03-b/301-c.ipynb")]
    for path in kept:
        for file in (path, path.parent / ".ipynb_checkpoints" / f"{path.stem}-checkpoint.ipynb"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
    assert notebooks() == kept
