"""Where each family keeps its blocks, projections, norms and embeddings.

The one place that knows the names, so that a technique written against it works on `GPT` and
on transformers' Llama, Mistral, Qwen2, Qwen3 and GPT-2 alike. Works on what a model contains,
not on its class, so subclasses and bare backbones are found too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Dotted names below the model (first group) and below a block (second group)."""

    name: str
    blocks: str
    embedding: str
    final_norm: str
    head: str

    attention: str
    mlp: str
    attention_norm: str
    mlp_norm: str
    projections: dict[str, str]  # role -> name below the block


_OURS = Family(
    name="GPT",
    blocks="blocks",
    embedding="embedding",
    final_norm="norm",
    head="head",
    attention="attention",
    mlp="mlp",
    attention_norm="attention_norm",
    mlp_norm="mlp_norm",
    projections={
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "output": "attention.output",
        "gate": "mlp.gate",
        "up": "mlp.up",
        "down": "mlp.down",
    },
)
_LLAMA = Family(
    name="Llama",
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention="self_attn",
    mlp="mlp",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    projections={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
)
_GPT2 = Family(
    name="GPT-2",
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    head="lm_head",
    attention="attn",
    mlp="mlp",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    # transformers stores these as Conv1D: weight (in, out), the transpose of nn.Linear's.
    projections={
        "query_key_value": "attn.c_attn",
        "output": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
)
FAMILIES = (_OURS, _LLAMA, _GPT2)


def family(model: nn.Module) -> Family:
    """Which family's names the model uses.

    Raises ValueError that names the model's class when it is none of FAMILIES.
    """
    for candidate in FAMILIES:
        if all(_has(model, name) for name in (candidate.blocks, candidate.embedding)):
            return candidate
    known = ", ".join(f.name for f in FAMILIES)
    raise ValueError(f"{type(model).__name__} has the layout of none of these families: {known}")


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's decoder blocks, first to last; assign an item to replace a block."""
    return model.get_submodule(family(model).blocks)


def embedding(model: nn.Module) -> nn.Embedding:
    """The token embedding."""
    return model.get_submodule(family(model).embedding)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head."""
    return model.get_submodule(family(model).final_norm)


def head(model: nn.Module) -> nn.Module:
    """The projection to logits."""
    return model.get_submodule(family(model).head)


def part(model: nn.Module, block: int, role: str) -> nn.Module:
    """A block's "attention", "mlp", "attention_norm" or "mlp_norm"."""
    return model.get_submodule(_part_name(model, block, role))


def replace_part(model: nn.Module, block: int, role: str, module: nn.Module) -> None:
    """Put module where `part` found the old one."""
    replace(model, _part_name(model, block, role), module)


def _part_name(model: nn.Module, block: int, role: str) -> str:
    names = family(model)
    if role not in ("attention", "mlp", "attention_norm", "mlp_norm"):
        raise ValueError(
            f"{role!r} is no part of a block: attention, mlp, attention_norm, mlp_norm"
        )
    return f"{names.blocks}.{range(len(blocks(model)))[block]}.{getattr(names, role)}"


def projections(model: nn.Module, *roles: str) -> dict[str, nn.Module]:
    """Full dotted name -> projection, of all blocks in order.

    roles: "query", "key", "value", "output", "gate", "up", "down" ("query_key_value" in
    GPT-2); none means all. Replaced blocks show the ones they still have.
    Raises ValueError for a role that the family doesn't have.
    """
    names = family(model)
    for role in roles:
        _check_role(names, role)
    by_name = {}
    for i in range(len(blocks(model))):
        for role in roles or names.projections:
            name = f"{names.blocks}.{i}.{names.projections[role]}"
            if _has(model, name):
                by_name[name] = model.get_submodule(name)
    return by_name


def projection(model: nn.Module, block: int, role: str) -> nn.Module:
    """One block's projection; roles as in `projections`.

    Raises ValueError for a role that the family doesn't have, AttributeError when the block's part
    was replaced by one without it.
    """
    names = family(model)
    _check_role(names, role)
    place = range(len(blocks(model)))[block]
    return model.get_submodule(f"{names.blocks}.{place}.{names.projections[role]}")


def _check_role(names: Family, role: str) -> None:
    if role not in names.projections:
        known = ", ".join(names.projections)
        raise ValueError(f"{names.name} has no projection {role!r}; it has {known}")


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Full dotted name -> norm: two a block, then the final one."""
    names = family(model)
    by_name = {}
    for i in range(len(blocks(model))):
        for name in (names.attention_norm, names.mlp_norm):
            full = f"{names.blocks}.{i}.{name}"
            if _has(model, full):
                by_name[full] = model.get_submodule(full)
    return by_name | {names.final_norm: final_norm(model)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put module in the place of the submodule with this dotted name.

    Raises AttributeError when there is no such place.
    """
    model.get_submodule(name)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def logits(model: nn.Module, tokens):
    """(batch, length) -> (batch, length, vocab), of our models and of transformers'."""
    output = model(tokens)
    return getattr(output, "logits", output)
