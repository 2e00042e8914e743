"""What `grouped_linear` is timed on, beside torch's own."""

import torch
from torch.nn import functional as F

from lablib.kernels import grouped_linear
from lablib.kernels.cases import Case, compiled, naive, step


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    """Rows of 64 experts that 4,096 tokens chose, 8 each, at random."""
    torch.manual_seed(0)
    counts = torch.rand(4096, 64).topk(8).indices.flatten().bincount(minlength=64).to(device)
    x = torch.randn(4096 * 8, 256, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(64, 256, 256, device=device, dtype=dtype, requires_grad=True)
    plain = naive("grouped_linear").grouped_linear
    fast = compiled(plain)
    offsets = counts.cumsum(0).to(torch.int32)
    ways = {
        "ours": lambda x, w: grouped_linear(x, w, counts),
        "naive": lambda x, w: plain(x, w, counts),
        "torch.compile of naive": lambda x, w: fast(x, w, counts),
        f"torch {torch.__version__} grouped_mm": lambda x, w: F.grouped_mm(
            x, w.transpose(1, 2), offs=offsets
        ),
    }
    steps = {key: step(way, x, weight) for key, way in ways.items()}
    title = "grouped_linear, 32,768 rows in 64 uneven groups, 256 to 256, forward and backward"
    return [Case(title, steps, flops=6 * x.shape[0] * 256 * 256)]
