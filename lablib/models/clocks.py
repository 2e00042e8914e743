"""How long a model takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lablib.models.gpt import GPT, KVCache
from lablib.resources import measure


@torch.inference_mode()
def decoding_seconds(
    model: GPT, ways: Sequence[Sequence[nn.Module]], prompt: Tensor, steps: int
) -> list[float]:
    """Median seconds of a decoding step, one number for each of several lists of blocks.

    ways: lists of blocks that stand in for the model's own, which are put back at the end. They
    take turns, step by step, so that other programs slow all of them alike.
    prompt: (batch, length) int64, read before the clock starts. Each step then feeds its last
    column again: time depends on how many tokens there are, not on which.
    steps: how many are timed, after a first one that is not.
    Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps have no median: time one or more")
    own, new, turns = model.blocks, prompt[:, -1:], {}

    def step(stack: nn.ModuleList, cache: list[KVCache]) -> None:
        model.blocks = stack
        model.head(model.hidden_states(new, cache)[:, -1])

    try:
        for place, blocks in enumerate(ways):
            stack = model.blocks = nn.ModuleList(blocks)
            cache = model.new_cache(prompt.shape[1] + steps + 1)
            model.hidden_states(prompt, cache)
            turns[place] = partial(step, stack, cache)
        spent = measure(turns, steps + 1)
    finally:
        model.blocks = own
    return [statistics.median(seconds[1:]) for seconds in spent.values()]
