"""The table of what a hub takes says what was measured."""

import pytest

from lablib.hub import figures
from lablib.paths import project_dir

README = project_dir() / "binder" / "README.md"


def test_the_readme_has_the_table_of_the_stored_figures():
    text = README.read_text("utf-8")
    assert figures.between_markers(text, figures.table(figures.stored())) == text


def test_times_are_a_median_with_their_spread():
    assert figures._times([3.0, 1.0, 2.0]) == "2.0 s (1.0 to 3.0)"


def test_a_page_without_the_markers_is_refused():
    with pytest.raises(ValueError, match="lacks <!-- hub: begin -->"):
        figures.between_markers("nothing", "table")
