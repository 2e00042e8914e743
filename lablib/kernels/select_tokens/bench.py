"""What `select_tokens` and `merge_tokens` are timed on."""

import torch

from lablib.kernels import merge_tokens, select_tokens
from lablib.kernels.cases import Case, compiled, naive, step
from lablib.models import GPTConfig, SwiGLU


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    """Both ops one after the other, and what they save around a feed-forward layer."""
    return [both(device, dtype), skip(device, dtype)]


def both(device: str, dtype: torch.dtype) -> Case:
    """Half the tokens taken out and added back."""
    x = torch.randn(4096, 512, device=device, dtype=dtype, requires_grad=True)
    mask = torch.rand(4096, device=device) < 0.5
    definition = naive("select_tokens")

    def through(select, merge):
        def run(x):
            rows, index = select(x, mask)
            return merge(x, rows, index)

        return run

    ours = through(select_tokens, merge_tokens)
    plain = through(definition.select_tokens, definition.merge_tokens)
    ways = {"ours": ours, "naive": plain, "torch.compile of naive": compiled(plain)}
    return Case(
        "select_tokens and merge_tokens, 4,096 tokens, d 512, half kept, forward and backward",
        {key: step(way, x) for key, way in ways.items()},
        moved=8 * x.nbytes,
    )


def skip(device: str, dtype: torch.dtype) -> Case:
    """What skipping half the tokens of a layer leaves of its cost."""
    layer = SwiGLU(GPTConfig(dim=512, n_heads=8, ffn_dim=1376)).to(device, dtype)
    x = torch.randn(4096, 512, device=device, dtype=dtype, requires_grad=True)
    mask = torch.arange(4096, device=device) % 2 == 0

    def half(x):
        rows, index = select_tokens(x, mask)
        return merge_tokens(x, layer(rows), index)

    return Case(
        "feed-forward layer at 4,096 tokens, d 512: half the tokens skipped, and all computed",
        {"half skipped": step(half, x), "all computed": step(lambda x: x + layer(x), x)},
    )
