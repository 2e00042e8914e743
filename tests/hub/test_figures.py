"""The table of what a hub takes says what was measured."""

import pytest

from lablib.evidence.coverage import between_markers, states
from lablib.hub import table
from lablib.paths import project_dir

README = project_dir() / "binder" / "README.md"


def test_the_readme_has_the_table_of_the_stored_figures():
    text = README.read_text("utf-8")
    peaks = [row.result["peak_gb"] for row in states() if row.result]
    assert between_markers(text, table.table(table.stored(), peaks), "hub") == text


def test_times_are_a_median_with_their_spread():
    assert table._times([3.0, 1.0, 2.0]) == "2.0 s (1.0 to 3.0)"


def test_a_page_without_the_markers_is_refused():
    with pytest.raises(ValueError, match="lacks <!-- hub: begin -->"):
        between_markers("nothing", "table", "hub")
