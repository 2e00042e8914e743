import numpy as np
import pytest

from lablib.lab import figures, predict
from lablib.lab.veil import is_veiled

PLOTLY = "application/vnd.plotly.v1+json"
VIEW = "application/vnd.jupyter.widget-view+json"
LEARNING = "A wide gap means that context matters."


def test_no_answer_before_a_guess(shown):
    guess = predict("How many?", low=0, high=10, unit="nats")
    assert guess.value is None, "where the slider starts is no guess"
    guess.reveal(3.14159, LEARNING, figures.figure("3.14159"))
    assert "3.14" not in str(shown) and LEARNING not in str(shown) and PLOTLY not in shown.kinds()
    guess.picker.value = 4
    assert guess.value is None and "3.14" not in shown.page
    guess.button.click()
    assert guess.value == 4 and guess.picker.disabled and guess.button.disabled
    assert "You guessed 4 nats; measured: 3.142 nats (0.8584 nats lower)" in shown.page
    assert LEARNING in shown.page and PLOTLY in shown.kinds() and guess.show_me is None


def test_the_answer_can_be_asked_for(shown):
    guess = predict("Which?", options=["one", "two"])
    assert guess.picker.value is None and guess.button.disabled
    guess.reveal("two", LEARNING)
    assert "two" not in shown.page
    guess.show_me.click()
    assert f"Measured: two. {LEARNING}" in shown.page and guess.value is None


def test_a_guess_is_answered_at_once(shown):
    guess = predict("Which <b>?", options=["one", "two"])
    guess.picker.value = "two"
    assert guess.value is None and not guess.button.disabled
    guess.button.click()
    assert "Your guess: two" in shown.page and "Which &lt;b&gt;" in shown.page
    guess.reveal("two")
    assert "You guessed two; measured: two (right)." in shown.page and guess.show_me is None
    guess.reveal("one")
    assert "You guessed two; measured: one." in shown.page


def test_where_a_slider_stands_is_no_guess(shown):
    guess = predict("How many?", low=0, high=10)
    assert guess.button.disabled
    guess.picker.value = 4
    assert not guess.button.disabled
    guess.picker.value = 0
    guess.button.click()
    assert guess.value == 0 and "Your guess: 0" in shown.page


def test_numbers_of_numpy_count_as_numbers(shown):
    guess = predict("How many?", low=0, high=10)
    guess.button.click()
    guess.reveal(np.int64(7))
    assert "measured: 7 (7 higher)" in shown.page


def test_only_the_picker_is_a_widget(shown):
    predict("How many?", low=0, high=10).reveal(3)
    views = [data for data in shown.data.values() if VIEW in data]
    assert len(views) == 2 and all("Run this cell" in data["text/plain"] for data in views)
    assert "How many?" in shown.page


def test_stored_the_question_has_no_answer_and_the_answer_is_folded(shown, stored):
    guess = predict("How many?", low=0, high=10, unit="nats")
    assert "0 to 10 nats" in str(shown) and VIEW not in str(shown)
    guess.reveal(3.14159, LEARNING, figures.figure("t"))
    asked, answer, picture = shown.data.values()
    assert "3.14" not in str(asked) and is_veiled(picture[PLOTLY])
    page = answer["text/html"]
    assert page.index("<details>") < page.index("Measured: 3.142") < page.index("</details>")
    assert page.index("</summary>") < page.index("Measured: 3.142")
    choice = predict("Which?", options=["<one>", "two"])
    assert "&lt;one&gt;; two" in shown.page and choice.value is None


def test_a_rehearsal_makes_every_guess(shown, tested):
    for asked in ({"options": ["one", "two"]}, {"low": 0, "high": 10}):
        guess = predict("Which?", **asked)
        assert guess.value is None, "and none in the end"
    guess = predict("Which?", options=["one", "two"])
    guess.button.on_click(guess._commit, remove=True)
    with pytest.raises(AssertionError, match="Which"):
        guess.rehearse()


def test_a_question_needs_answers():
    with pytest.raises(ValueError, match="needs options, or low and high"):
        predict("?")
