"""Early exit, the rival of skipping: a token may only stop, for all layers that remain.

Source: CALM (Schuster et al., 2022): the loss that trains every layer to predict, and its softmax
response as confidence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.learning_to_skip import SkipBlock, refuse_routers
from lablib.models import anatomy
from lablib.models.gpt import GPT, Block


class ConfidenceRouter(nn.Module):
    """A token stops once its next token is predicted clearly enough.

    norm, head: the model's own; they read the state before each layer. Confidence is the gap
    between the two largest probabilities, and the token runs on while 1 - gap is above `threshold`.
    """

    def __init__(self, norm: nn.Module, head: nn.Module):
        super().__init__()
        # In a tuple they are borrowed, not owned: as submodules they would be saved once a layer.
        self.borrowed = norm, head
        self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, normed: Tensor, x: Tensor) -> Tensor:
        """normed, x: (batch, length, dim) -> gate (batch, length) float32, ones and zeros."""
        norm, head = self.borrowed
        first, second = head(norm(x)).float().softmax(-1).topk(2).values.unbind(-1)
        return (1 - (first - second) > self.threshold).float()


class ExitBlock(SkipBlock):
    """A block that a token skips, too, when it skipped `before`, the block in front."""

    def __init__(self, block: Block, router: nn.Module, before: nn.Module):
        super().__init__(block, router)
        self.before = (before,)  # in a tuple: the model owns it

    def choose(self, normed: Tensor, x: Tensor) -> Tensor:
        """Which tokens run the block: (batch, length)."""
        gate, before = self.router(normed, x), self.before[0]
        return gate * before.ran if isinstance(before, ExitBlock) else gate


def add_confidence_exits(model: GPT) -> GPT:
    """Let tokens leave after any block once they are confident, in place; returns the model.

    For models trained with `early_exit_loss`. Every token runs the first block.
    Raises ValueError for a model that has routers.
    """
    blocks = anatomy.blocks(model)
    refuse_routers(model)
    for place in range(1, len(blocks)):
        router = ConfidenceRouter(anatomy.final_norm(model), anatomy.head(model))
        blocks[place] = ExitBlock(blocks[place], router, blocks[place - 1])
    return model


def early_exit_loss(model: GPT, tokens: Tensor) -> Tensor:
    """Next-token loss of every layer's state through the one head, later layers weighing more.

    tokens: (batch, length + 1). Layer i of L has weight i / (1 + ... + L).
    Source: CALM, its average over layers.
    """
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: states.append(output))
        for block in anatomy.blocks(model)
    ]
    try:
        model.hidden_states(tokens[:, :-1])
    finally:
        for hook in hooks:
            hook.remove()
    target, total = tokens[:, 1:].flatten(), 0.0
    for depth, state in enumerate(states, start=1):
        logits = model.head(model.norm(state)).flatten(0, 1)  # (batch * length, vocab)
        total = total + depth * F.cross_entropy(logits, target)
    return total / (len(states) * (len(states) + 1) / 2)
