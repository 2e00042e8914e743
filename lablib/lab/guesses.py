"""Guesses: the reader commits to one before the answer is shown."""

import html
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import ipywidgets
import plotly.graph_objects as go
from IPython.display import display

from lablib.evidence import tiers
from lablib.lab import figures
from lablib.lab.place import place
from lablib.lab.veil import answer, veiled
from lablib.lab.widgets import STYLE, WIDE, Panel, moves, rehearsed, slider, view

HIDDEN = "Hidden until you have committed to a guess above, or ask."


class Guess:
    """A guess that the reader commits to before the answer. `value` is None until then.

    picker: a widget with a `value`. It is no guess before the button below it is pressed.
    """

    def __init__(
        self, question: str, picker: ipywidgets.Widget, unit: str = "", options: Sequence[str] = ()
    ):
        self.question, self.picker, self.unit = question, picker, unit
        self.options = tuple(options)
        self.value: Any = None
        self.button = ipywidgets.Button(description="This is my guess")
        # Until the reader has chosen: where a slider stands is no guess.
        self.button.disabled = True
        self.show_me: ipywidgets.Button | None = None
        self._reply, self._answer, self._below = place(), place(), place()
        picker.observe(self._picked, names="value")
        self.button.on_click(self._commit)

    def ask(self) -> None:
        """Show the question and, where a reader is there, what to answer with."""
        if tiers.static():
            low, high = (getattr(self.picker, end, None) for end in ("min", "max"))
            choices = "; ".join(self.options) or f"{low:g} to {high:g} {self.unit}".strip()
            display(_line(f"{self.question} ({choices})", "Your guess?"), raw=True)
            return
        asked = _line(self.question, "Your guess?")
        display({**asked, "text/html": STYLE + asked["text/html"]}, raw=True)
        box = Panel([self.picker, self.button], "lablib-predict")
        display(view(box), raw=True)
        self._reply.put(_line("The answer stays hidden until you guess."))

    def _picked(self, change: Any) -> None:
        self.button.disabled = change["new"] is None

    def _commit(self, button: Any) -> None:
        self.value = self.picker.value
        self.picker.disabled = self.button.disabled = True
        self._reply.change(_line(f"Your guess: {self._number(self.value)}. Now run on."))
        if self.show_me:
            self._open(button)

    def reveal(self, actual: Any, meaning: str = "", figure: go.Figure | None = None) -> None:
        """Show the answer once the reader has guessed or asks for it; folded where it is stored.

        meaning: one line on what a gap between guess and answer tells. figure: shown with it.
        """
        self.actual, self.meaning = actual, meaning
        self._picture = None if figure is None else figures.bundle(figure)
        if tiers.static():
            answer()
            self._picture = self._picture and veiled(self._picture)
        self._answer, self._below = place(), place()
        hidden = self.value is None and not tiers.static()
        told = self._folded() if tiers.static() else self._told(self.value)
        self._answer.put(self._offer() if hidden else told)
        if self._picture:
            self._below.put(_line("") if hidden else self._picture)

    def _offer(self) -> dict[str, Any]:
        """What stands where the answer will: a button. Being one output, it leaves no trace."""
        self.show_me = ipywidgets.Button(description="Show me")
        self.show_me.on_click(self._open)
        return view(Panel([ipywidgets.Label(HIDDEN), self.show_me], "lablib-show-me"))

    def _open(self, button: Any) -> None:
        self.show_me = None
        self._answer.change(self._told(self.value))
        if self._picture:
            self._below.change(self._picture)

    def _told(self, guess: Any) -> dict[str, str]:
        """The guess beside the answer."""
        actual, meaning = self._number(self.actual), f" {self.meaning}" if self.meaning else ""
        if guess is None:
            return _line(f"Measured: {actual}.{meaning}")
        gap = self._gap(guess)
        return _line(f"You guessed {self._number(guess)}; measured: {actual}{gap}.{meaning}")

    def _folded(self) -> dict[str, str]:
        told = self._told(None)
        head = f"<summary>{html.escape(self.question)} <b>Show me.</b></summary>"
        return {**told, "text/html": f"<details>{head}{told['text/html']}</details>"}

    def _number(self, value: Any) -> str:
        if not isinstance(value, Real):
            return str(value)
        number = f"{value:,}" if isinstance(value, Integral) else f"{value:.4g}"
        return f"{number} {self.unit}".strip()

    def _gap(self, guess: Any) -> str:
        if self._number(guess) == self._number(self.actual):
            return " (right)"
        if not (isinstance(guess, Real) and isinstance(self.actual, Real)):
            return ""
        gap = self.actual - guess
        return f" ({self._number(abs(gap))} {'higher' if gap > 0 else 'lower'})"

    def rehearse(self) -> None:
        """Commit to each answer in turn, then to none. Raises AssertionError if one isn't taken."""
        start = self.picker.value
        for trait, value in moves(self.picker):
            setattr(self.picker, trait, value)
            self.button.click()
            assert self.value is not None and self.value == self.picker.value, self.question
        self.picker.value, self.value = start, None


def _line(text: str, head: str = "") -> dict[str, str]:
    start = f"<b>{html.escape(head)}</b> " if head else ""
    plain = f"{head} {text}".strip()
    return {"text/html": f"<p>{start}{html.escape(text)}</p>", "text/plain": plain}


def predict(
    question: str,
    options: Sequence[str] | None = None,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
) -> Guess:
    """Ask the reader to commit to a guess: one of `options`, or a number from low to high.

    Shows the question and returns the guess; call its `reveal(actual, meaning="...")` where the
    result is shown. Under test each answer is tried. Raises ValueError when neither options nor
    both bounds are given.
    """
    if options:
        picker = ipywidgets.RadioButtons(options=list(options), value=None, layout=WIDE)
    elif low is not None and high is not None:
        picker = slider({"description": unit or "guess"}, low, high)
    else:
        raise ValueError("predict needs options, or low and high")
    guess = Guess(question, picker, unit, options or ())
    guess.ask()
    if rehearsed():
        guess.rehearse()
    return guess
