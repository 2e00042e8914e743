"""What a smaller model keeps of a decoder: blocks, heads, neurons, channels.

`Keep` says what stays. `masked` computes as if the rest were gone, `sliced` makes it gone; both
give the same logits. Works through `anatomy` on `GPT` and on transformers' Llama, Mistral, Qwen.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lablib.models import anatomy
from lablib.models.gpt import GPTConfig

Indices = Sequence[int]


@dataclass(frozen=True)
class Keep:
    """What stays; None is all of it, as a field or as one block's entry.

    blocks: their places. heads, neurons: an entry for each block of the whole model, also for those
    that go: query heads, and units of the feed-forward layer. A key-value head goes with the last
    of its query heads. channels: features of the residual stream, which all blocks share.
    """

    blocks: Indices | None = None
    heads: Sequence[Indices | None] | None = None
    neurons: Sequence[Indices | None] | None = None
    channels: Indices | None = None


@dataclass(frozen=True)
class Sizes:
    """Of a whole model; the same in each of its blocks."""

    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    channels: int


def sizes(model: nn.Module) -> Sizes:
    """How much of each structure a model has.

    Raises ValueError for a model without separate queries, keys and values, as GPT-2, or whose
    blocks differ.
    """
    names = anatomy.family(model)
    if "query" not in names.projections:
        raise ValueError(
            f"{names.name} has no separate queries, keys and values to take heads from"
        )
    for role in ("query", "up"):
        if len({m.weight.shape for m in anatomy.projections(model, role).values()}) > 1:
            raise ValueError(f"blocks differ in the size of {role}: slice the model they came from")
    head_dim = _head_dim(model)
    heads, kv_heads = (
        len(anatomy.projection(model, 0, role).weight) // head_dim for role in ("query", "key")
    )
    neurons = anatomy.projection(model, 0, "down").weight.shape[1]
    channels = anatomy.embedding(model).weight.shape[1]
    return Sizes(len(anatomy.blocks(model)), heads, kv_heads, head_dim, neurons, channels)


def _head_dim(model: nn.Module) -> int:
    return anatomy.part(model, 0, "attention").head_dim


def everything(model: nn.Module) -> Keep:
    """All of a model, each index written out."""
    size = sizes(model)
    heads, neurons = (tuple(range(n)) for n in (size.heads, size.neurons))
    return Keep(
        blocks=tuple(range(size.blocks)),
        heads=(heads,) * size.blocks,
        neurons=(neurons,) * size.blocks,
        channels=tuple(range(size.channels)),
    )


def full(model: nn.Module, keep: Keep) -> Keep:
    """The same, with sorted indices in the place of each None.

    Raises ValueError for an index that the model lacks, one that is there twice, or a number of
    entries that is not the number of blocks.
    """
    whole, found = everything(model), {}
    for field in ("blocks", "channels"):
        given = getattr(keep, field)
        found[field] = _checked(field, given, getattr(whole, field))
    for field in ("heads", "neurons"):
        given, all_of = getattr(keep, field), getattr(whole, field)
        given = [None] * len(all_of) if given is None else given
        if len(given) != len(all_of):
            raise ValueError(f"{field} has {len(given)} entries for {len(all_of)} blocks")
        found[field] = tuple(_checked(field, *pair) for pair in zip(given, all_of, strict=True))
    return Keep(**found)


def _checked(field: str, given: Indices | None, whole: tuple[int, ...]) -> tuple[int, ...]:
    if given is None:
        return whole
    chosen = tuple(sorted(int(place) for place in given))
    if len({*chosen}) < len(chosen) or not {*chosen} <= {*whole}:
        raise ValueError(f"{field} to keep must be different ones of 0 to {len(whole) - 1}")
    return chosen


def remaining(model: nn.Module, keep: Keep) -> dict[str, tuple[Tensor, ...]]:
    """Parameter name -> the places that stay along each of its axes; no name where a block goes.

    Of parameters that are shared, as those of embedding and head, both names are given.
    """
    keep, size, names = full(model, keep), sizes(model), anatomy.family(model)
    channels = torch.tensor(keep.channels)
    vocabulary = torch.arange(len(anatomy.embedding(model).weight))
    stays = {
        f"{names.embedding}.weight": (vocabulary, channels),
        f"{names.final_norm}.weight": (channels,),
        f"{names.head}.weight": (vocabulary, channels),
    }
    for block in keep.blocks:
        place = f"{names.blocks}.{block}."
        inner, groups = _rows_of_heads(keep.heads[block], size)
        neurons = torch.tensor(keep.neurons[block], dtype=torch.long)
        sides = {  # role -> rows, columns
            "query": (inner, channels),
            "key": (groups, channels),
            "value": (groups, channels),
            "output": (channels, inner),
            "gate": (neurons, channels),
            "up": (neurons, channels),
            "down": (channels, neurons),
        }
        for role, (rows, columns) in sides.items():
            layer = place + names.projections[role]
            stays |= {f"{layer}.weight": (rows, columns), f"{layer}.bias": (rows,)}
        for norm in (names.attention_norm, names.mlp_norm):
            stays[f"{place}{norm}.weight"] = (channels,)
        for name, parameter in model.get_submodule(place[:-1]).named_parameters():
            stays.setdefault(place + name, _whole(parameter))  # norms within a head
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: axes for name, axes in stays.items() if name in there}


def _rows_of_heads(heads: Indices, size: Sizes) -> tuple[Tensor, Tensor]:
    """Rows of the query's weight, and of the key's and value's."""
    share = size.heads // size.kv_heads
    groups = sorted({head // share for head in heads})
    within = torch.arange(size.head_dim)

    def rows(these: Indices) -> Tensor:
        return (torch.tensor(these, dtype=torch.long)[:, None] * size.head_dim + within).flatten()

    return rows(list(heads)), rows(groups)


def _whole(parameter: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.arange(length) for length in parameter.shape)


def _part(parameter: Tensor, axes: tuple[Tensor, ...]) -> Tensor:
    """The part that stays, a copy."""
    part = parameter.detach()
    for axis, places in enumerate(axes):
        if len(places) < part.shape[axis]:
            part = part.index_select(axis, places.to(part.device))
    return part.clone() if part.data_ptr() == parameter.data_ptr() else part


def _zero_rest(parameter: Tensor, axes: tuple[Tensor, ...]) -> None:
    for axis, places in enumerate(axes):
        gone = torch.ones(parameter.shape[axis], dtype=torch.bool)
        gone[places] = False
        parameter.index_fill_(axis, gone.nonzero()[:, 0].to(parameter.device), 0.0)


@contextlib.contextmanager
def masked(model: nn.Module, keep: Keep) -> Iterator[None]:
    """Within it all that goes is zero; afterwards the model has its own weights, to the bit."""
    stays, before = remaining(model, keep), {}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                axes = stays.get(name)
                if axes is None or [*map(len, axes)] != [*parameter.shape]:
                    before[name] = parameter.detach().clone()
                    parameter.zero_() if axes is None else _zero_rest(parameter, axes)
        yield
    finally:
        with torch.no_grad():
            for name, values in before.items():
                model.get_parameter(name).copy_(values)


def parameters_of(model: nn.Module, keep: Keep) -> int:
    """How many parameters the sliced model has, those that are shared counted once."""
    stays = remaining(model, keep)
    names = [name for name, _ in model.named_parameters() if name in stays]
    return sum(math.prod(map(len, stays[name])) for name in names)


def flops_per_token(model: nn.Module, keep: Keep, length: int) -> float:
    """Of the sliced model's forward pass, averaged over the positions of a text of `length`.

    What is counted is as in `lablib.models.flops`: products of matrices, two for each multiply-add.
    """
    stays, names = remaining(model, keep), anatomy.family(model)
    head = stays.get(f"{names.head}.weight", stays[f"{names.embedding}.weight"])
    total = 2 * math.prod(map(len, head))
    for block in full(model, keep).blocks:
        for role, below in names.projections.items():
            rows, columns = stays[f"{names.blocks}.{block}.{below}.weight"]
            total += 2 * len(rows) * len(columns)
            if role == "query":  # scores and weighted values, of half of the text
                total += 2 * 2 * len(rows) * (length + 1) / 2
    return total


def sliced(model: nn.Module, keep: Keep) -> nn.Module:
    """A smaller model that computes what `masked` does; no weight is shared with the whole one.

    Where channels go, the gains of the norms grow by sqrt(all / kept), since a norm's mean is now
    over fewer. A config whose blocks differ keeps the whole model's sizes for them.
    Raises ValueError for query heads that do not fill their groups alike, for a block that keeps no
    head, and, in transformers' models, for blocks that differ.
    """
    keep = full(model, keep)
    shapes = {_heads_and_neurons(model, keep, block) for block in keep.blocks}
    ours = anatomy.family(model).name == "GPT"
    if len(shapes) > 1 and not ours:
        raise ValueError("transformers' models need blocks of equal size: keep as many in each")
    stays = remaining(model, keep)
    shared = {id(p): p for p in model.parameters()}
    small = copy.deepcopy(model, shared)  # its parameters are the whole model's, until replaced
    _select_blocks(small, keep.blocks)
    _select_weights(small, _renamed(model, stays, keep.blocks))
    for place, block in enumerate(keep.blocks):
        heads, groups, _ = _heads_and_neurons(model, keep, block)
        _set_heads(anatomy.part(small, place, "attention"), heads, groups)
    _widen_norms(small, sizes(model).channels / len(keep.channels))
    _set_config(small.config, small, shapes, len(keep.channels))
    return small


def _heads_and_neurons(model: nn.Module, keep: Keep, block: int) -> tuple[int, int, int]:
    """Query heads, key-value heads and neurons that a block keeps."""
    size, heads = sizes(model), keep.heads[block]
    share = size.heads // size.kv_heads
    counts = [sum(head // share == group for head in heads) for group in range(size.kv_heads)]
    kept = [count for count in counts if count]
    if not kept:
        raise ValueError(f"block {block} keeps no head: keep one, or take the block away")
    if len({*kept}) > 1:
        raise ValueError(f"block {block} keeps {kept} query heads of its groups: keep equally many")
    return len(heads), len(kept), len(keep.neurons[block])


def _select_blocks(small: nn.Module, blocks: Indices) -> None:
    names = anatomy.family(small)
    parent, _, child = names.blocks.rpartition(".")
    chosen = nn.ModuleList(anatomy.blocks(small)[block] for block in blocks)
    setattr(small.get_submodule(parent), child, chosen)
    for place, block in enumerate(chosen):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where transformers' cache keeps its keys
                module.layer_idx = place


def _renamed(
    model: nn.Module, stays: dict[str, tuple[Tensor, ...]], blocks: Indices
) -> dict[str, tuple[Tensor, ...]]:
    """With each block's name at its place among those that stay."""
    top = anatomy.family(model).blocks
    new = {f"{top}.{block}": f"{top}.{place}" for place, block in enumerate(blocks)}

    def rename(name: str) -> str:
        block = name.removeprefix(f"{top}.").partition(".")[0]
        old = f"{top}.{block}"
        return new[old] + name.removeprefix(old) if name.startswith(f"{old}.") else name

    return {rename(name): axes for name, axes in stays.items()}


def _select_weights(small: nn.Module, stays: dict[str, tuple[Tensor, ...]]) -> None:
    made: dict[int, nn.Parameter] = {}  # so that what was shared is shared again
    for name, old in [*small.named_parameters(remove_duplicate=False)]:
        if id(old) not in made:
            part = _part(old, stays[name])
            made[id(old)] = nn.Parameter(part, requires_grad=old.requires_grad)
        parent, _, child = name.rpartition(".")
        module = small.get_submodule(parent)
        setattr(module, child, made[id(old)])
        _set_shape(module)


def _set_shape(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def _set_heads(attention: nn.Module, heads: int, groups: int) -> None:
    if hasattr(attention, "n_heads"):
        attention.n_heads, attention.n_kv_heads = heads, groups
    else:
        attention.num_key_value_groups = heads // groups


@torch.no_grad()
def _widen_norms(small: nn.Module, factor: float) -> None:
    for norm in anatomy.norms(small).values():
        norm.weight.mul_(math.sqrt(factor))
        name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
        setattr(norm, name, getattr(norm, name) * factor)


_SIZES = {
    True: ("n_layers", "dim", "n_heads", "n_kv_heads", "ffn_dim"),
    False: (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    ),
}


def _set_config(config, small: nn.Module, shapes: set[tuple[int, int, int]], dim: int) -> None:
    """Its copy, which belongs to `small` alone; shapes: heads, groups and neurons of blocks."""
    ours = isinstance(config, GPTConfig)
    values = (len(anatomy.blocks(small)), dim, *(min(shapes) if len(shapes) == 1 else ()))
    fields = dict(zip(_SIZES[ours], values, strict=False))
    norm = anatomy.final_norm(small)
    if ours:
        fields["norm_eps"] = norm.eps
    else:
        fields |= {"rms_norm_eps": norm.variance_epsilon, "head_dim": _head_dim(small)}
    for name, value in fields.items():
        setattr(config, name, value)
