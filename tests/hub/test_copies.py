"""A student's copy of the labs without a hub: published, copied clean, merged."""

import json
import subprocess
import sys

import pytest

from lablib.hub.clean import clean_copy
from lablib.hub.publish import git, publish
from lablib.paths import project_dir


def book(*sources, outputs=(), **metadata):
    """A notebook's text with these code cells."""
    cells = [
        {"cell_type": "code", "source": [s], "outputs": list(outputs), "metadata": {}}
        for s in sources
    ]
    return json.dumps({"cells": cells, "metadata": metadata}, indent=1)


@pytest.fixture
def course(tmp_path):
    """Labs, the repository they are published to, and a student's copy of it."""
    labs, repository, copy = (tmp_path / name for name in ("labs", "labs.git", "copy"))
    (labs / "03-experts").mkdir(parents=True)
    (labs / "03-experts" / "302.ipynb").write_text(book("1"))
    assert publish(labs, repository)
    git("clone", "--quiet", "--depth", "1", f"file://{repository}", str(copy))
    return labs, repository, copy


def test_labs_are_published_once_a_change_without_what_git_ignores(course, tmp_path):
    labs, repository, _ = course
    ignored = project_dir() / ".gitignore"
    (labs / ".ipynb_checkpoints").mkdir()
    (labs / ".ipynb_checkpoints" / "302.ipynb").write_text("{}")
    assert not publish(labs, repository, ignored)
    (labs / "README.md").write_text("new")
    (labs / "03-experts" / "302.ipynb").unlink()
    assert publish(labs, repository, ignored) and not publish(labs, repository, ignored)
    assert git("ls-tree", "-r", "--name-only", "main", GIT_DIR=str(repository)) == "README.md\n"


def test_a_clean_copy_is_the_newest_and_stands_beside_the_edited_one(course):
    labs, repository, copy = course
    mine = copy / "03-experts" / "302.ipynb"
    mine.write_text(book("my work"))
    (labs / "03-experts" / "302.ipynb").write_text(book("2"))
    publish(labs, repository)
    made = [clean_copy(mine), clean_copy(mine)]
    made.append(clean_copy(made[0]))
    assert [path.name for path in made] == [
        "302-clean.ipynb",
        "302-clean-2.ipynb",
        "302-clean-3.ipynb",
    ]
    assert {path.read_text() for path in made} == {book("2")}
    assert mine.read_text() == book("my work")


def test_without_the_course_its_last_version_is_copied(course):
    _, repository, copy = course
    repository.rename(repository.with_name("gone"))
    (copy / "03-experts" / "302.ipynb").unlink()
    assert clean_copy(copy / "03-experts" / "302.ipynb").read_text() == book("1")


@pytest.mark.parametrize("place", ["copy/own.ipynb", "elsewhere/302.ipynb"])
def test_what_is_no_lab_has_no_clean_copy(place, course, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / place
    path.write_text(book("1"))
    with pytest.raises(FileNotFoundError, match=f"{path.name} is no lab of this course"):
        clean_copy(path)
    assert len(list(path.parent.glob("*.ipynb"))) == 1


OUTPUT = {"output_type": "stream", "name": "stdout", "text": "3"}


@pytest.mark.parametrize(
    ("mine", "kept"),
    [
        (book("1", kernelspec={"name": "python3"}), False),
        (book("1", "mine"), True),
        (book("1 + 2"), True),
        (book("1", outputs=[OUTPUT]), True),
        ("no notebook", True),
        ("[]", True),
    ],
    ids=["opened", "a cell added", "edited", "run", "broken", "something else"],
)
def test_what_was_edited_or_run_stays_and_what_was_only_opened_is_updated(mine, kept, tmp_path):
    places = [tmp_path / name for name in ("base", "mine", "theirs")]
    for place, text in zip(places, (book("1"), mine, book("2"))):
        place.write_text(text)
    subprocess.run([sys.executable, "-m", "lablib.hub.merge", *places], check=True)
    assert places[1].read_text() == (mine if kept else book("2"))
