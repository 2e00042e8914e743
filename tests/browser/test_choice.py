import subprocess

import pytest
from choice import START, choose, chosen

from lablib.papers import papers
from lablib.paths import project_dir

LABS = {f"labs/{n:03}.ipynb": [f"lablib/{n:03}.py", f"data/{n:03}.json"] for n in range(120)}


def test_all_are_driven_when_asked():
    assert choose(LABS, {"ALL": "1"}) == [START, *LABS]


def test_each_commit_drives_a_tenth_and_ten_kinds_of_commit_all():
    picked = [choose(LABS, {}, commit=f"ab{digit}") for digit in "0123456789"]
    assert all(len(labs) == 13 and labs[0] == START for labs in picked)
    assert {lab for labs in picked for lab in labs} == {START, *LABS}
    assert choose(LABS, {}, commit="ab1") == picked[1]
    assert choose(LABS, {}) == choose(LABS, {}, commit="0") != picked[1], "without git the first"


def test_few_labs_are_never_all_left_out():
    few = dict(list(LABS.items())[:4])
    seen = {lab for commit in "0123456789" for lab in choose(few, {}, commit=commit)}
    assert seen == {START, *few} and choose(few, {}, commit="9") == [START]


@pytest.mark.parametrize(
    ("changed", "picked"),
    [
        (["labs/003.ipynb"], ["labs/003.ipynb"]),
        (["lablib/007.py", "README.md", "data/005.json"], ["labs/005.ipynb", "labs/007.ipynb"]),
        (["lablib/lab/figures.py"], []),
        ([], []),
    ],
)
def test_with_a_base_those_that_changed_are_driven(changed, picked):
    environment = {"LABLIB_BASE": "main", "ALL": "1"}
    assert choose(LABS, environment, changed, "ab1") == [START, *picked]
    assert choose(LABS, {"LABLIB_BASE": ""}, changed) == choose(LABS, {}), "an empty base is none"


def test_this_checkout():
    present = [row.paths["lab"] for row in papers() if row.present]
    assert chosen({"ALL": "1"}) == [project_dir() / START, *present]
    assert set(chosen({})) <= set(chosen({"ALL": "1"}))


def test_changed_files_are_gits(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    from choice import _changed, _commit

    assert _commit(tmp_path / "nowhere") == ""
    git("init", "-b", "main")
    for number, name in enumerate(("old", "changed", "edited")):
        (tmp_path / name).write_text(str(number))
    git("add", "."), git("commit", "-m", "one"), git("checkout", "-b", "work")
    (tmp_path / "changed").write_text("x")
    git("commit", "-am", "two")
    (tmp_path / "edited").write_text("x")
    (tmp_path / "new").write_text("x")
    assert sorted(_changed(tmp_path, "main")) == ["changed", "edited", "new"]
    assert len(_commit(tmp_path)) == 40
    with pytest.raises(subprocess.CalledProcessError):
        _changed(tmp_path, "nonsense")
