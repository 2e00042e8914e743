"""Models: GPT, generation, and weights to start from.

Names are loaded when they are first used, so importing this costs no torch.
"""

from lablib.lazy import lazy

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
__getattr__, __dir__ = lazy(__name__, _PLACES)
