"""What a notebook talks to: tier, header, claims, figures, widgets."""

from importlib import import_module

_HOME = {
    "Lab": "runtime",
    "explore": "widgets",
    "predict": "widgets",
    "source": "code",
    "check": "grading",
    "figures": "figures",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name == "figures":
        return import_module(f"{__name__}.figures")
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
