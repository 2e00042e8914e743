"""What the peft library computes once a method is merged, recorded, beside what ours do.

`tests/peft/record_merge.py` wrote the record: a Llama of two layers, weights of four methods of
lab 714 on its queries and values, and the logits before and after `merge_and_unload`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lablib.paths import data_dir
from lablib.peft.adapter import adapters, merge_
from lablib.peft.kronecker import krona_
from lablib.peft.lora import lora_
from lablib.peft.lora_variants import VeRALinear, dora_, vera_

ROLES = ("query", "value")
METHODS: dict[str, Callable[[nn.Module], None]] = {  # at the sizes that were recorded
    "LoRA": partial(lora_, roles=ROLES, rank=3, alpha=6),
    "DoRA": partial(dora_, roles=ROLES, rank=3, alpha=6),
    "VeRA": partial(vera_, roles=ROLES, rank=5),
    "KronA": partial(krona_, roles=ROLES, shape=(4, 4)),
}


@lru_cache(maxsize=1)
def recorded() -> tuple[dict, dict[str, Tensor]]:
    """Versions and the model's configuration; tensors by name."""
    file = data_dir() / "published" / "merge.safetensors"
    with safe_open(file, "pt") as opened:
        header = {key: json.loads(value) for key, value in opened.metadata().items()}
    return header, load_file(file)


def recorded_of(mark: str) -> dict[str, Tensor]:
    """Recorded tensors whose name starts so, without the start."""
    return {key[len(mark) :]: t for key, t in recorded()[1].items() if key.startswith(mark)}


@torch.no_grad()
def with_its_weights(kind: str) -> nn.Module:
    """The recorded model with a method of this module, which has the recorded weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, given = LlamaForCausalLM(LlamaConfig(**recorded()[0]["config"])), recorded_of(f"{kind}:")
    model.load_state_dict(recorded_of("base:"))
    METHODS[kind](model)
    for place, adapter in adapters(model).items():
        for name, parameter in adapter.own().items():
            parameter.copy_(given[f"{place}:{name}"].view_as(parameter))
        if isinstance(adapter, VeRALinear):
            for drawn, its in zip(adapter.shared, (given["down"], given["up"])):
                drawn.copy_(its[: len(drawn), : drawn.shape[1]])
    return model.eval()


@torch.no_grad()
def compare_merged() -> dict[str, tuple[Tensor, Tensor]]:
    """Method -> logits once it is merged, (texts, length, vocabulary): ours, and peft's."""
    found = {}
    for kind in METHODS:
        model = with_its_weights(kind)
        merge_(model)
        found[kind] = model(recorded()[1]["tokens"]).logits, recorded_of(f"{kind}:")["merged"]
    return found
