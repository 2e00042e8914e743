"""What N, D and C mean: parameters and FLOPs, counted as the scaling-law papers count them.

Source: Kaplan et al. (2020), Table 1. N leaves out embedding and head; the forward pass takes
2 N + 2 n_layer n_ctx d_attn FLOPs a token, and training three times that, which 6 N D rounds to.
The attention row counts the half of the scores that a causal mask leaves: a counter that sees full
products of matrices, such as torch's, finds twice as much there.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from lablib.models import anatomy
from lablib.models.gpt import GPTConfig


class Count(NamedTuple):
    """One row of the table: parameters, and forward FLOPs a token."""

    parameters: int
    flops: float


ROWS = ("embed", "query-key-value", "attention", "project", "feed-forward", "de-embed")


def classic(
    d_model: int,
    n_layer: int,
    n_vocab: int,
    n_ctx: int,
    d_attn: int | None = None,
    d_ff: int | None = None,
) -> dict[str, Count]:
    """Table 1 of Kaplan et al. for a decoder with learned positions and two-matrix feed-forward.

    d_attn: None gives d_model; d_ff: None gives 4 d_model. Norms and biases are not counted.
    """
    d_attn, d_ff = d_attn or d_model, d_ff or 4 * d_model
    return {
        "embed": Count((n_vocab + n_ctx) * d_model, 4 * d_model),
        "query-key-value": _product(n_layer * d_model * 3 * d_attn),
        "attention": Count(0, 2 * n_layer * n_ctx * d_attn),
        "project": _product(n_layer * d_attn * d_model),
        "feed-forward": _product(n_layer * 2 * d_model * d_ff),
        "de-embed": Count(0, 2 * d_model * n_vocab),
    }


def counts(config: GPTConfig, length: int) -> dict[str, Count]:
    """The same table for `GPT`: rotary positions, grouped queries, three matrices of SwiGLU.

    length: of the context. Norms, biases and rotations are not counted; a head that is not tied to
    the embedding has parameters of its own.
    """
    inner, kv_inner = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    embedding = config.vocab_size * config.dim
    n = config.n_layers
    return {
        "embed": Count(embedding, 0.0),  # rows are looked up, no position is added
        "query-key-value": _product(n * config.dim * (inner + 2 * kv_inner)),
        "attention": Count(0, 2.0 * n * length * inner),
        "project": _product(n * inner * config.dim),
        "feed-forward": _product(n * 3 * config.dim * config.ffn_dim),
        "de-embed": Count(0 if config.tied else embedding, 2.0 * embedding),
    }


def counts_of(model: nn.Module, length: int) -> dict[str, Count]:
    """The same table from a model's own matrices: `GPT`'s, or one of transformers' families.

    Works on the meta device. Raises ValueError for a family that `lablib.models.anatomy` does not
    know.
    """
    names = anatomy.family(model).projections
    roles: dict[str, list[int]] = {role: [] for role in names}
    for role in names:
        found = anatomy.projections(model, role).values()
        roles[role] = [module.weight.numel() for module in found]
    embedding = anatomy.embedding(model).weight
    head = anatomy.head(model).weight
    inner = sum(_width(model, i) for i in range(len(anatomy.blocks(model))))
    attend = ("query", "key", "value", "query_key_value")
    return {
        "embed": Count(embedding.numel(), 0.0),
        "query-key-value": _product(_total(roles, attend)),
        "attention": Count(0, 2.0 * length * inner),
        "project": _product(_total(roles, ("output",))),
        "feed-forward": _product(_total(roles, ("gate", "up", "down"))),
        "de-embed": Count(0 if head is embedding else head.numel(), 2.0 * head.numel()),
    }


def non_embedding(table: dict[str, Count]) -> int:
    """N: the parameters of all rows but embed and de-embed."""
    return sum(count.parameters for name, count in table.items() if name not in ENDS)


ENDS = ("embed", "de-embed")


def forward_flops(table: dict[str, Count], head: bool = False) -> float:
    """C_forward = 2 N + 2 n_layer n_ctx d_attn FLOPs a token; with the two ends if asked."""
    return sum(count.flops for name, count in table.items() if head or name not in ENDS)


def training_flops(N: float, D: float, head: float = 0.0) -> float:
    """6 N D: two FLOPs a weight and token forward, four backward.

    N: non-embedding parameters, D: tokens; head: the de-embedding's parameters, to count it too.
    """
    return 6.0 * (N + head) * D


def classic_size(d_model: int, n_layer: int) -> int:
    """N = 12 n_layer d_model^2, where d_attn = d_model and d_ff = 4 d_model."""
    return 12 * n_layer * d_model**2


def _product(parameters: int) -> Count:
    return Count(parameters, 2.0 * parameters)


def _total(roles: dict[str, list[int]], names: tuple[str, ...]) -> int:
    return sum(sum(roles.get(name, [])) for name in names)


def _width(model: nn.Module, block: int) -> int:
    """d_attn of a block: the inputs of its output projection."""
    weight = anatomy.projection(model, block, "output").weight
    return weight.numel() // anatomy.embedding(model).weight.shape[1]
