"""Run a block of `GPT` for some tokens only: gather them, compute, add the result back.

Keys and values are made for all tokens, so that those computed attend to the whole text and a
cache misses nothing; queries, scores, output and feed-forward layer cost only the kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.kernels import merge_tokens, select_tokens
from lablib.models.gpt import Attention, Block, KVCache, rotate

Rotary = tuple[Tensor, Tensor]


def run_kept(
    block: Block,
    x: Tensor,
    normed: Tensor,
    gate: Tensor,
    rotary: Rotary,
    cache: KVCache | None = None,
) -> Tensor:
    """gate * block(x) + (1 - gate) * x, where rows of gate 0 are never computed.

    x, normed: (batch, length, dim), the second after the block's attention_norm; gate: (batch,
    length), zeros and ones. Returns (batch, length, dim).
    Gradients are those of the formula but one: a gate of 0 gets none, for want of its row.
    """
    keys, values = keys_and_values(block.attention, normed, rotary, cache)
    mask = gate.detach() > 0.5
    rows, index = select_tokens(x, mask)  # (kept, dim), (kept,)
    if not len(index):
        return x
    attended = attend_kept(block.attention, normed, mask, index, rotary, keys, values)
    added = attended + block.mlp(block.mlp_norm(rows + attended))  # (kept, dim): block(x) - x
    # Autocast's products are in bfloat16, the stream is not.
    return merge_tokens(x, added.to(x.dtype), index, gate.flatten()[index])


def keys_and_values(
    attention: Attention, normed: Tensor, rotary: Rotary, cache: KVCache | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens, kept or not, after those in the cache.

    normed: (batch, length, dim). Returns two (batch, heads, seen, head_dim).
    """
    shape = *normed.shape[:2], -1, attention.head_dim
    keys = rotate(attention.key_norm(attention.key(normed).view(shape)).transpose(1, 2), *rotary)
    values = attention.value(normed).view(shape).transpose(1, 2)
    return (keys, values) if cache is None else cache.append(keys, values)


def attend_kept(
    attention: Attention,
    normed: Tensor,
    mask: Tensor,
    index: Tensor,
    rotary: Rotary,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Causal attention for the kept tokens' queries, over everybody's keys: (kept, dim).

    normed: (batch, length, dim); mask: (batch, length); index: (kept,), where the mask holds.
    Rows of a batch keep different numbers, so queries are padded to the largest of them.
    """
    batch, length = mask.shape
    row, position = index // length, index % length
    q = attention.query(normed.flatten(0, 1)[index])  # (kept, heads * head_dim)
    q = q.unflatten(-1, (-1, attention.head_dim))  # (kept, heads, head_dim)
    q = rotate(attention.query_norm(q), *(table[position, None] for table in rotary))
    slot = mask.cumsum(1)[row, position] - 1
    width = int(slot.max()) + 1
    padded = q.new_zeros(batch, width, *q.shape[1:]).index_put((row, slot), q)
    # A query sees its own position and all before it, those in the cache included.
    last = index.new_zeros(batch, width).index_put((row, slot), keys.shape[2] - length + position)
    seen = torch.arange(keys.shape[2], device=index.device) <= last[:, None, :, None]
    y = F.scaled_dot_product_attention(
        padded.transpose(1, 2),
        keys,
        values,
        attn_mask=None if length == 1 else seen,
        enable_gqa=attention.n_heads != attention.n_kv_heads,
    )  # (batch, heads, width, head_dim)
    return attention.output(y.transpose(1, 2)[row, slot].flatten(1))  # (kept, dim)
