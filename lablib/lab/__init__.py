"""What a notebook talks to: header, figures, widgets, checks."""

from lablib.lazy import lazy

_PLACES = {
    "Lab": "runtime",
    "explore": "explorer",
    "predict": "guesses",
    "source": "code",
}

__all__ = [*_PLACES, "figures"]
__getattr__, __dir__ = lazy(__name__, _PLACES)
