import ipywidgets
import pytest

from lablib.lab.widgets import TEXTS, Panel, control, moves, rehearsed, view

VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.mark.parametrize(
    ("value", "kind", "start"),
    [
        ((1, 5), ipywidgets.IntSlider, 1),
        ((1, 5, 2, 3), ipywidgets.IntSlider, 3),
        ((0.0, 1.0), ipywidgets.FloatSlider, 0.0),
        ((0.1, 1.0, 0.1, 0.5), ipywidgets.FloatSlider, 0.5),
        (["a", "b"], ipywidgets.Dropdown, "a"),
        (True, ipywidgets.Checkbox, True),
        ("the king", ipywidgets.Text, "the king"),
    ],
)
def test_controls(value, kind, start):
    made = control("some_name", value)
    assert type(made) is kind and made.value == start and made.description == "some name"
    assert control("some_name", value, "in words, %").description == "in words, %"


def test_an_unknown_control_is_refused():
    with pytest.raises(TypeError, match="3j is no"):
        control("x", 3j)


@pytest.mark.parametrize(
    ("widget", "values"),
    [
        (control("x", (1, 5)), [1, 5]),
        (control("x", (0.5, 2.0)), [0.5, 2.0]),
        (ipywidgets.FloatLogSlider(min=-2, max=1, base=10), [0.01, 10]),
        (control("x", True), [False, True]),
        (control("x", {"one": 1, "two": 2}), [1, 2]),
        (control("x", range(3)), [0, 1, 2]),
        (ipywidgets.RadioButtons(options=["a", "b"], value=None), ["a", "b"]),
        (control("x", "the king"), list(TEXTS)),
        (ipywidgets.IntText(3), []),
    ],
)
def test_moves_are_all_that_a_reader_can_do(widget, values):
    seen = []
    for trait, value in moves(widget):
        setattr(widget, trait, value)
        seen.append(widget.value)
    assert seen == pytest.approx(values) if values and values[0] == 0.01 else seen == values


def test_odd_texts_are_odd():
    assert "" in TEXTS and any(len(text) == 5000 for text in TEXTS)
    assert any(ord(letter) > 0xFFFF for text in TEXTS for letter in text)
    assert "<img src=x onerror=alert(1)>" in TEXTS


def test_a_widget_has_words_for_a_page_without_its_kernel():
    data = view(ipywidgets.Checkbox())
    assert data[VIEW]["model_id"] and "Run this cell" in data["text/plain"]
    assert "Run this cell" in data["text/html"] and "Checkbox" not in str(data)


def test_a_page_loaded_again_is_told_to_run_the_cell_again():
    panel = Panel([ipywidgets.Checkbox()], "lablib-explore")
    advice = panel.children[-1]
    panel.children[0].value = True
    panel.send_state("children")
    assert advice.value == ""
    panel.send_state()  # a page asks for all of it
    assert "run this cell again" in advice.value


@pytest.mark.parametrize(
    ("tier", "static", "expected"),
    [("smoke", "1", True), ("smoke", "0", False), ("cpu", "1", False)],
)
def test_a_rehearsal_is_for_tests_only(tier, static, expected, monkeypatch):
    monkeypatch.setenv("LABLIB_TIER", tier)
    monkeypatch.setenv("LABLIB_STATIC", static)
    assert rehearsed() is expected
