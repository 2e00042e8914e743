"""What a notebook talks to: tier, header, claims, figures, widgets."""

from lablib.lazy import lazy

_PLACES = {
    "Lab": "runtime",
    "explore": "widgets",
    "predict": "widgets",
    "source": "code",
    "check": "grading",
}

__all__ = [*_PLACES, "figures"]
__getattr__ = lazy(__name__, _PLACES)
