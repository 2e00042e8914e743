"""Training: `fit` (a thin layer over Lightning), schedules, checkpoints, sweeps."""

from importlib import import_module

_PLACES = {
    "fit": "trainer",
    "History": "trainer",
    "NonFiniteLoss": "trainer",
    "evaluate": "losses",
    "next_token_loss": "losses",
    "learning_rate_factor": "schedules",
    "sweep": "sweeps",
}
__all__ = list(_PLACES)


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
