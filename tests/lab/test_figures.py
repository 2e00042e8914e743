import pytest

from lablib.lab import figures


def test_painted_text_is_escaped_and_keeps_its_pieces():
    made = figures.painted(["<b>", " a"], ["#ffffff", "rgba(0,0,0,.5)"], ['"x"', ""])
    assert "<b>" not in made and "&lt;b&gt;" in made and "&quot;x&quot;" in made
    assert made.count("color:black") == 1  # the transparent one keeps the theme's letters
    with pytest.raises(ValueError, match="shorter"):
        figures.painted(["a", "b"], ["#ffffff"])
