"""What the peft library computes, recorded, beside what ours do with the same weights.

A Llama of two layers, on its queries and values. `tests/peft/record_merge.py` wrote the logits of
four methods of lab 714 before and after `merge_and_unload`; `tests/peft/record_peft.py` those of
all leaves of the catalogue that peft has, too, for lab 713. QLoRA is not among them: peft leaves
the four bits to another library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.paths import data_dir
from lablib.peft.adapter import adapters, merge_
from lablib.peft.kronecker import krona_
from lablib.peft.lora import lora_
from lablib.peft.lora_variants import VeRALinear, adalora_, dora_, lora_fa_, vera_
from lablib.peft.p_tuning import p_tuning_
from lablib.peft.prefix import prefix_, prompt_
from lablib.peft.rescale import ia3_
from lablib.peft.subset import norms_

ROLES = ("query", "value")
METHODS: dict[str, Callable[[nn.Module], None]] = {  # at the sizes that were recorded
    "LoRA": partial(lora_, roles=ROLES, rank=3, alpha=6),
    "DoRA": partial(dora_, roles=ROLES, rank=3, alpha=6),
    "VeRA": partial(vera_, roles=ROLES, rank=5),
    "KronA": partial(krona_, roles=ROLES, shape=(4, 4)),
}

LEAVES = METHODS | {
    "LoRA-FA": partial(lora_fa_, roles=ROLES, rank=3, alpha=6),
    "AdaLoRA": partial(adalora_, roles=ROLES, rank=3, alpha=6),
    "(IA)3": ia3_,
    "norms": norms_,
    "prompt": partial(prompt_, length=3),
    "prefix": partial(prefix_, length=3),
    "P-tuning": partial(p_tuning_, length=3, hidden=5),
}
MERGED, PLAIN = "merge", "peft"  # the files of record


@lru_cache(maxsize=2)
def recorded(file: str = MERGED) -> tuple[dict, dict[str, Tensor]]:
    """Versions and the model's configuration; tensors by name. Of `PLAIN`, also counts."""
    path = data_dir() / "published" / f"{file}.safetensors"
    with safe_open(path, "pt") as opened:
        header = {key: json.loads(value) for key, value in opened.metadata().items()}
    return header, load_file(path)


def version(file: str = PLAIN) -> str:
    """Of the peft that was run."""
    return recorded(file)[0]["versions"]["peft"]


def recorded_of(mark: str, file: str = MERGED) -> dict[str, Tensor]:
    """Recorded tensors whose name starts so, without the start."""
    return {key[len(mark) :]: t for key, t in recorded(file)[1].items() if key.startswith(mark)}


@torch.no_grad()
def with_its_weights(kind: str, file: str = MERGED) -> nn.Module:
    """The recorded model with a method of `LEAVES`, which has the recorded weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**recorded(file)[0]["config"]))
    model.load_state_dict(recorded_of("base:", file))
    given = recorded_of(f"{kind}:", file)
    LEAVES[kind](model)
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


@torch.no_grad()
def compare_leaves() -> dict[str, tuple[Tensor, Tensor]]:
    """Method -> logits, (texts, length, vocabulary): ours with peft's weights, and peft's."""
    tokens, found = recorded(PLAIN)[1]["tokens"], {}
    for kind in LEAVES:
        ours = with_its_weights(kind, PLAIN)(tokens).logits
        found[kind] = ours, recorded_of(f"{kind}:", PLAIN)["output"]
    return found


def compare_norms() -> tuple[Tensor, Tensor]:
    """LN tuning, ours and peft's, in a row: how many numbers train, logits, every gradient.

    Gradients are of the mean loss of the next tokens, of every norm of the blocks and the last one.
    """
    header, tensors = recorded(PLAIN)
    model, tokens = with_its_weights("norms", PLAIN), tensors["tokens"]
    own = {f"{place}:{n}": p for place, a in adapters(model).items() for n, p in a.own().items()}
    loss = F.cross_entropy(model(tokens[:, :-1]).logits.transpose(1, 2), tokens[:, 1:])
    slopes = torch.autograd.grad(loss, list(own.values()))
    theirs = recorded_of("norms:", PLAIN)
    count = sum(parameter.numel() for parameter in own.values())
    both = [
        (count, model(tokens).logits, *slopes),
        (
            header["counts"]["norms"],
            theirs["output"],
            *(theirs[f"slope of {name}"] for name in own),
        ),
    ]
    first, second = (torch.cat([torch.as_tensor(t).flatten() for t in row]) for row in both)
    return first.detach(), second.detach()
