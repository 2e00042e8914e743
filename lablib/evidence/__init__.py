"""Evidence: claims and their verdicts, studies and sweeps, fingerprints, verification, tables.

Imports no theme: what a study or a lab computes is its own business.
"""

from lablib.lazy import lazy

_PLACES = {
    "Pair": "claims",
    "grid": "sweeps",
    "interval": "intervals",
    "judge": "claims",
    "matching": "studies",
    "paired": "studies",
    "sweep": "sweeps",
}
__all__ = list(_PLACES)
__getattr__, __dir__ = lazy(__name__, _PLACES)
