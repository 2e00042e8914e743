"""Where each family keeps its blocks, projections, norms and embeddings.

The one place that knows the names, so that a technique written against it works on `GPT` and
on transformers' Llama, Mistral, Qwen2, Qwen3, GPT-2, BERT, RoBERTa and T5 (its encoder) alike.
Works on what a model contains, not on its class, so subclasses are found too, and so are encoders
without a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Family:
    """Dotted names below the model (first group) and below a block (second group).

    first_norm: over the embeddings, where no norm comes after the last block. mlp: empty where it
    is no module of its own. sign: a name that tells it from a family with the same blocks.
    """

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

    first_norm: str = ""
    sign: str = ""


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


def _bert(name: str, prefix: str, head: str) -> Family:
    return Family(
        name=name,
        blocks=f"{prefix}encoder.layer",
        embedding=f"{prefix}embeddings.word_embeddings",
        first_norm=f"{prefix}embeddings.LayerNorm",
        final_norm="",
        head=head,
        attention="attention",
        mlp="",
        attention_norm="attention.output.LayerNorm",
        mlp_norm="output.LayerNorm",
        projections={
            "query": "attention.self.query",
            "key": "attention.self.key",
            "value": "attention.self.value",
            "output": "attention.output.dense",
            "up": "intermediate.dense",
            "down": "output.dense",
        },
    )


def _t5(name: str, sign: str, **inner: str) -> Family:
    projections = {"query": "q", "key": "k", "value": "v", "output": "o"}
    return Family(
        name=name,
        sign=f"encoder.block.0.layer.1.DenseReluDense.{sign}",
        blocks="encoder.block",
        embedding="shared",
        final_norm="encoder.final_layer_norm",
        head="lm_head",
        attention="layer.0.SelfAttention",
        mlp="layer.1.DenseReluDense",
        attention_norm="layer.0.layer_norm",
        mlp_norm="layer.1.layer_norm",
        projections={role: f"layer.0.SelfAttention.{n}" for role, n in projections.items()}
        | {role: f"layer.1.DenseReluDense.{n}" for role, n in inner.items()},
    )


FAMILIES = (
    _OURS,
    _LLAMA,
    _GPT2,
    _bert("BERT", "", ""),
    _bert("BERT", "bert.", "cls.predictions.decoder"),
    _bert("RoBERTa", "roberta.", "lm_head.decoder"),
    _t5("T5", "wi", up="wi", down="wo"),
    _t5("T5 1.1", "wi_1", gate="wi_0", up="wi_1", down="wo"),
)


def family(model: nn.Module) -> Family:
    """Which family's names the model uses.

    Raises ValueError that names the model's class when it is none of FAMILIES.
    """
    for candidate in FAMILIES:
        names = (candidate.blocks, candidate.embedding, candidate.sign)
        if all(_has(model, name) for name in names if name):
            return candidate
    known = ", ".join(dict.fromkeys(f.name for f in FAMILIES))
    raise ValueError(f"{type(model).__name__} has the layout of none of these families: {known}")


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def blocks(model: nn.Module) -> nn.ModuleList:
    """The model's blocks, first to last; assign an item to replace a block."""
    return model.get_submodule(family(model).blocks)


def embedding(model: nn.Module) -> nn.Embedding:
    """The token embedding. T5's holds the weight that its encoder and decoder run modules over."""
    return model.get_submodule(family(model).embedding)


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head.

    Raises ValueError for BERT and RoBERTa, whose blocks end with a norm.
    """
    return model.get_submodule(_there(family(model), "final_norm"))


def head(model: nn.Module) -> nn.Module:
    """The projection to logits. Raises ValueError for an encoder without one."""
    return model.get_submodule(_there(family(model), "head"))


def _there(names: Family, what: str) -> str:
    if not getattr(names, what):
        raise ValueError(f"{names.name} has no {what.replace('_', ' ')} here")
    return getattr(names, what)


def part(model: nn.Module, block: int, role: str) -> nn.Module:
    """A block's "attention", "mlp", "attention_norm" or "mlp_norm".

    Raises ValueError for BERT's "mlp": it is two modules, which `sublayers` hides.
    """
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
    return f"{names.blocks}.{range(len(blocks(model)))[block]}.{_there(names, role)}"


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
    """Full dotted name -> norm, in their order: two a block and the final one, or the first."""
    names = family(model)
    by_name = {names.first_norm: model.get_submodule(names.first_norm)} if names.first_norm else {}
    for i in range(len(blocks(model))):
        for name in (names.attention_norm, names.mlp_norm):
            full = f"{names.blocks}.{i}.{name}"
            if _has(model, full):
                by_name[full] = model.get_submodule(full)
    return by_name | ({names.final_norm: final_norm(model)} if names.final_norm else {})


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
