"""Hooks of a model that belong to one owner, and how they are taken out again."""

from __future__ import annotations

from torch import nn


def drop_hooks_(model: nn.Module, owner: object) -> None:
    """Take out every forward hook and pre-hook of the model that is a method of `owner`."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
