"""Models: GPT, generation, and weights to start from.

Names are loaded when they are first used, so importing this costs no torch.
"""

from importlib import import_module

_PLACES = {
    "GPT": "gpt",
    "GPTConfig": "gpt",
    "RMSNorm": "gpt",
    "SwiGLU": "gpt",
    "generate": "generation",
    "next_token_probabilities": "generation",
    "from_hf": "hub",
    "to_hf": "hub",
    "pretrained": "weights",
    "pretrained_path": "weights",
}
__all__ = list(_PLACES)


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
