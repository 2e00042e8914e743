"""Training: `fit` (a thin layer over Lightning), optimizers, losses, schedules, checkpoints."""

from lablib.lazy import lazy

_PLACES = {
    "fit": "trainer",
    "History": "history",
    "NonFiniteLoss": "history",
    "adamw": "optimizers",
    "evaluate": "losses",
    "next_token_loss": "losses",
    "padded_next_token_loss": "losses",
    "learning_rate_factor": "schedules",
}
__all__ = list(_PLACES)
__getattr__, __dir__ = lazy(__name__, _PLACES)
