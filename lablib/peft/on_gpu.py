"""Parts of labs that need a GPU and the Hugging Face hub: they say so where these are missing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch

from lablib.data.packages import DataError


class Speaker(Protocol):
    """A lab: which tier it is on, and how it says a sentence."""

    tier: str

    def say(self, text: str) -> None: ...


def on_gpu(otherwise: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function (lab, device, ...) that runs at the gpu tier into one of (lab, ...).

    At other tiers the lab says `otherwise`; where data can't be had, for want of the hub or a
    package, it says which.
    """

    def decorate(part: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(part)
        def say(lab: Speaker, *args, **options) -> None:
            if lab.tier != "gpu":
                return lab.say(otherwise)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            try:
                part(lab, device, *args, **options)
            except DataError as error:
                lab.say(str(error))

        return say

    return decorate
