"""What makes a result stale, tried on a copy of lablib."""

import json
import shutil

import pytest

from lablib.evidence.fingerprints import (
    Code,
    bare,
    claim_statements,
    code_hash,
    constants,
    dump,
    notebook_hash,
)
from lablib.paths import PACKAGE

STUDY = '''"""A study."""
from lablib.experts.moe import MoE
from lablib.data import load
from lablib.models import GPT, GPTConfig
from lablib.training import fit
from lablib.kernels import route

SCALE = 2

def run(seed):
    text = load("shakespeare")
    return {"loss": SCALE * fit(GPT(GPTConfig()), text, seed=seed).losses[-1], "r": route(MoE)}
'''


@pytest.fixture
def copy(tmp_path):
    """A copy of lablib with one small study in it."""
    package = tmp_path / "lablib"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "_data"))
    (package / "studies" / "mine.py").write_text(STUDY)
    return package


def hash_of(package):
    from lablib.evidence import fingerprints

    fingerprints._code.cache_clear()
    fingerprints._state.cache_clear()
    return code_hash("studies.mine:run", package=package)


def edit(path, old, new):
    text = path.read_text("utf-8")
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new, 1), "utf-8")


def test_what_changes_no_result_changes_no_hash(copy):
    before = hash_of(copy)
    edit(copy / "models" / "gpt.py", '"""One readable decoder', '"""A decoder')  # a docstring
    edit(copy / "models" / "gpt.py", '"""Causal grouped-query', '"""Grouped-query')
    edit(copy / "models" / "gpt.py", "vocab_size: int = 4096", "vocab_size: float = 4096")
    with (copy / "kernels" / "route" / "__init__.py").open("a") as file:
        file.write("# a comment\n")
    edit(
        copy / "data" / "corpora.py",
        "def _shakespeare",
        "def _new_corpus(corpus):\n    yield 1\n\n\ndef _shakespeare",
    )
    edit(copy / "models" / "__init__.py", '"GPT": "gpt",', '"New": "newer",\n    "GPT": "gpt",')
    edit(copy / "lab" / "figures.py", "def figure(", "TITLE = 1\n\n\ndef figure(")
    (copy / "kernels" / "another").mkdir()
    (copy / "kernels" / "another" / "__init__.py").write_text("def another():\n    return 1\n")
    edit(
        copy / "kernels" / "__init__.py",
        "from lablib",
        "from lablib.kernels.another import another\nfrom lablib",
    )
    assert hash_of(copy) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("studies/mine.py", "SCALE = 2", "SCALE = 3"),
        ("models/gpt.py", "norm_eps: float = 1e-5", "norm_eps: float = 1e-6"),
        ("models/gpt.py", "8 * self.dim / 3 / 16", "9 * self.dim / 3 / 16"),
        ("kernels/route/naive.py", "", "X = 1\n"),
    ],
)
def test_what_changes_a_result_changes_its_hash(copy, file, old, new):
    before = hash_of(copy)
    path = copy.joinpath(*file.split("/"))
    edit(path, old, new)
    # A new name in a module that the study reaches is no change by itself.
    assert (hash_of(copy) != before) == bool(old)


def test_a_constant_three_calls_away_counts(copy):
    (copy / "data" / "chain.py").write_text(
        "FACTOR = 1\n\ndef third():\n    return FACTOR\n\ndef second():\n    return third()\n\n"
        "def first():\n    return second()\n"
    )
    edit(
        copy / "studies" / "mine.py",
        "SCALE = 2",
        "from lablib.data.chain import first\nSCALE = first()",
    )
    before = hash_of(copy)
    edit(copy / "data" / "chain.py", "FACTOR = 1", "FACTOR = 2")
    assert hash_of(copy) != before


def test_the_constants_that_a_run_reaches_are_told_apart_by_name(copy):
    from lablib.evidence import fingerprints

    def told(scale="2", more=""):
        text = STUDY.replace("SCALE = 2", f"SCALE = {scale}{more}")
        (copy / "studies" / "mine.py").write_text(text)
        fingerprints._code.cache_clear()
        return constants("studies.mine:run", package=copy)

    assert list(told()) == ["mine.SCALE"] and told() == told(more="  # a comment")
    assert told("3") != told() and told(more="\nOTHER = 1") == told()
    rates = told("{'dense': 1e-2, 'sparse': {'few': 2e-2}}")
    assert list(rates) == ["mine.SCALE['dense']", "mine.SCALE['sparse']['few']"]
    other = told("{'sparse': {'few': 4e-2}, 'dense': 1e-2}")
    assert [name for name in rates if rates[name] != other[name]] == ["mine.SCALE['sparse']['few']"]


def test_what_is_registered_with_a_definition_belongs_to_it(copy):
    module = copy / "data" / "registered.py"
    module.write_text(
        "def table():\n    return table.rows\n\n@table.add\ndef _(x):\n    return x + 1\n\n"
        "table.register(lambda x: 2)\n"
    )
    code = Code(copy)
    text = code.module("data.registered").dump("table")
    assert text.count("FunctionDef(") == 2 and "register" in text


def test_a_package_may_import_its_own_module_by_name(copy):
    (copy / "data" / "nested").mkdir()
    init, inner = copy / "data/nested/__init__.py", copy / "data/nested/inner.py"
    init.write_text(
        "from lablib.data.nested import inner\n\ndef outer():\n    return inner.value()\n"
    )
    inner.write_text("def value():\n    return 1\n")
    code = Code(copy)
    assert ("data.nested.inner", "value") in code.reached({("data.nested", "outer")})


def test_the_dump_says_the_same_for_the_same_tree():
    one = "def f(x: int) -> str:\n    '''doc'''\n    # comment\n    return f'{x!r:>4} and' + 'b'\n"
    two = 'def f(x):\n    return (f"{x!r:>4} and"\n        + "b")\n'
    assert dump(bare(one)) == dump(bare(two))
    assert dump(bare(one)) != dump(bare(two.replace("and", "or")))


NOTEBOOK = """
from lablib.theory import markov_chains as mc
from lablib.lab import Lab, figures
lab = Lab("markov-chains")
size = 3
fig = figures.figure("a title")
values = []
for n in range(size):
    values.append(mc.n_states(2, n + 1))
figures.show(fig.add_scatter(y=values), alt="a picture")
lab.claim("states", (values, [2, 6, 14]))
lab.say(f"{size} sizes")
"""


def write_notebook(path, source):
    cells = [{"cell_type": "code", "source": source}, {"cell_type": "markdown", "source": "words"}]
    path.write_text(json.dumps({"cells": cells}))
    return path


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ('"a title"', '"another title"', False),
        ('alt="a picture"', 'alt="words"', False),
        ('f"{size} sizes"', 'f"{size}"', False),
        ("size = 3", "size = 4", True),
        ("n + 1", "n + 2", True),
    ],
)
def test_a_notebook_is_what_its_claims_are_computed_from(tmp_path, old, new, changes):
    before = notebook_hash(write_notebook(tmp_path / "a.ipynb", NOTEBOOK))
    after = notebook_hash(write_notebook(tmp_path / "b.ipynb", NOTEBOOK.replace(old, new)))
    assert (before != after) == changes


def test_a_claim_judged_on_the_study_needs_nothing_of_the_notebook():
    body = bare("x = 1\nlab.claim('a')\nlab.claim('b', x)\ny = 2\n").body
    assert [type(node).__name__ for node in claim_statements(body)] == ["Assign", "Expr"]


def test_an_unknown_root_is_refused():
    with pytest.raises(KeyError, match="defines no missing"):
        code_hash("models.gpt:missing")
