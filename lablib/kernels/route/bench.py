"""What `route` is timed on."""

import torch

from lablib.kernels import route
from lablib.kernels.cases import Case, compiled, naive


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    """The router of OLMoE: 64 experts, 8 a token."""
    logits = torch.randn(4096, 64, device=device)
    plain = naive("route").route
    fast = compiled(plain)
    ways = {
        "ours": lambda: route(logits, 8),
        "naive": lambda: plain(logits, 8),
        "torch.compile of naive": lambda: fast(logits, 8),
    }
    return [Case("route, 4,096 tokens, 64 experts, top 8, forward", ways)]
