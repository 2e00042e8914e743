"""Training: `fit` (a thin layer over Lightning), schedules, checkpoints, sweeps."""

from lablib.lazy import lazy

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
__getattr__ = lazy(__name__, _PLACES)
