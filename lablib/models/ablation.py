"""What a model is worth without one of its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models.gpt import GPT, rotary_table


@torch.no_grad()
def leave_one_out_losses(model: GPT, tokens: Tensor) -> tuple[float, list[float]]:
    """Next-token loss with all blocks, and with each block left out in turn, for all tokens.

    tokens: (batch, length + 1) int64. Nats a token. What comes before the block that is left out
    is computed once.
    """
    x, target = model.embedding(tokens[:, :-1]), tokens[:, 1:].flatten()
    rotary = rotary_table(model.config, 0, x.shape[1], x)
    blocks, losses = list(model.blocks), []

    def loss_after(x: Tensor, blocks: Sequence[nn.Module]) -> float:
        for block in blocks:
            x = block(x, rotary)
        logits = model.head(model.norm(x)).flatten(0, 1)  # (batch * length, vocab)
        return F.cross_entropy(logits, target).item()

    whole = loss_after(x, blocks)
    for place, block in enumerate(blocks):
        losses.append(loss_after(x, blocks[place + 1 :]))
        x = block(x, rotary)
    return whole, losses
