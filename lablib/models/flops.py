"""FLOPs of a model's forward pass: two for each multiply-add."""

from __future__ import annotations

from typing import NamedTuple

from lablib.models.gpt import GPTConfig


class BlockFlops(NamedTuple):
    """FLOPs a token of one block: of its keys and values, and of all else."""

    keys_values: float
    rest: float


def block_flops(config: GPTConfig, length: int) -> BlockFlops:
    """Of a block of `GPT`, averaged over the positions of a text of `length`.

    The rest is queries, scores, output and feed-forward layer. Norms, rotary positions and softmax,
    which are no products of matrices, are left out.
    """
    inner, kv_inner = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    scores = 2 * inner * (length + 1) / 2  # with half of the text, for products with keys, values
    rest = 2 * config.dim * inner + scores + 3 * config.dim * config.ffn_dim
    return BlockFlops(2 * 2 * config.dim * kv_inner, 2 * rest)


def head_flops(config: GPTConfig) -> float:
    """Of the projection to logits, a token."""
    return 2 * config.dim * config.vocab_size


def flops_per_token(config: GPTConfig, length: int) -> float:
    """Of a whole `GPT`, averaged over the positions of a text of `length`."""
    return config.n_layers * sum(block_flops(config, length)) + head_flops(config)
