"""Ladder side tuning (Sung et al., 2022): a small network beside a frozen one, none inside it.

s_0 = D_0 x                                           x: what the first block reads
s_i = block_i(mu_i s_{i-1} + (1 - mu_i) D_i h_i)      h_i: what the base's block i gives
z   = U norm(s_last)                                  what the head reads
mu_i = sigmoid(alpha_i / T), T = 0.1, alpha_i = 0 at the start

D (d / r, d), U (d, d / r). x and h_i are constants to the side network, so no gradient enters the
base and none of its activations is kept: memory is that of the small network.

As in the authors' code the head reads the side network alone, which is not the base's function at
the start; z + U norm(s), with U = 0 at the start, is offered beside it. Side blocks are of the
base's kind, pruned from its weights. Two differences: theirs narrow every head by r, here a side
block has 1 / r of the heads, each as wide as the base's, so that positions and masks fit as they
are; theirs are pruned by Fisher information, here by the L1 norm of rows, as their code does when
none is given. From that code too: T, the starts of D and U, and that norm is an RMS norm.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lablib.models import anatomy
from lablib.models.gpt import KVCache, RMSNorm
from lablib.models.hooks import drop_hooks_
from lablib.peft.adapter import Adapter, matrix, method
from lablib.peft.bottleneck import n_heads
from lablib.peft.prefix import _by_name

TEMPERATURE = 0.1  # T
STD = 0.01  # of the normal starts of D and U
FIELDS = {  # of a configuration: width, inner width, heads, heads of keys
    "GPT": ("dim", "ffn_dim", "n_heads", "n_kv_heads"),
    "Llama": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "GPT-2": ("n_embd", "n_inner", "n_head"),
    "BERT": ("hidden_size", "intermediate_size", "num_attention_heads"),
    "RoBERTa": ("hidden_size", "intermediate_size", "num_attention_heads"),
}
WRITES_READS = {  # features that a projection's rows and columns stand for
    "query": ("query", "stream"),
    "key": ("key", "stream"),
    "value": ("key", "stream"),
    "query_key_value": ("query_key_value", "stream"),
    "output": ("stream", "query"),
    "gate": ("inner", "stream"),
    "up": ("inner", "stream"),
    "down": ("stream", "inner"),
}


class Rung(nn.Module):
    """A side block, and the mixture that it reads.

    dim, width: features of the base and of the side network. block: of the base's kind.
    """

    def __init__(self, dim: int, width: int, block: nn.Module):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.down = _projection(dim, width)  # D_i
        self.block = block

    def mixture(self, s: Tensor, h: Tensor) -> Tensor:
        """s (batch, length, width), h (batch, length, dim) -> (batch, length, width)."""
        mu = (self.alpha / TEMPERATURE).sigmoid()
        return mu * s + (1 - mu) * self.down(h)  # dim -> width

    def climb(self, module: nn.Module, args: tuple, kwargs: dict, h: Tensor) -> None:
        """After the base's block: s_i, by the side block with the same masks and positions."""
        (side,) = self.side
        if not side.enabled:
            return
        given = _by_name(module, args, kwargs)
        states = next(iter(given))
        if self is side.rungs[0]:
            side.s = side.first(given[states].detach())
        elif side.s is None:
            raise ValueError("the block of the first rung did not run: name the blocks that do")
        given[states] = self.mixture(side.s, h.detach())
        for cache in ("cache", "past_key_values"):
            if given.get(cache) is not None:
                given[cache] = side.cache_beside(given[cache])
        side.s = self.block.forward(**given)  # transformers would record a call as the base's


class Side(Adapter):
    """The side network of a model: its rungs, its first projection and its last.

    added: whether the head reads z + U norm(s), z what it read before, or U norm(s) alone.
    Keys and values of the side blocks lie in a cache of their own, kept for as long as the base's
    one lives: generation is what it is without a cache. Reordering or cutting the base's cache, as
    beam search does, does not reach it.
    """

    def __init__(self, dim: int, width: int, rungs: Sequence[Rung], added: bool = False):
        super().__init__()
        self.added = added
        self.first = _projection(dim, width)  # D_0
        self.rungs = nn.ModuleList(rungs)
        self.norm = RMSNorm(width)
        self.up = _projection(width, dim)  # U
        if added:
            nn.init.zeros_(self.up.weight)
        for rung in rungs:
            rung.side = (self,)  # a tuple: no submodule
        self.s: Tensor | None = None  # of the last rung so far
        self.caches: weakref.WeakKeyDictionary | None = None  # the base's cache -> the side's

    def cache_beside(self, cache):
        """The side's cache that goes with one of the base's, ours or transformers'."""
        if self.caches is None:
            self.caches = weakref.WeakKeyDictionary()
        if cache not in self.caches:
            self.caches[cache] = _empty_like(cache)
        return self.caches[cache]

    def read(self, module: nn.Module, args: tuple, z: Tensor) -> Tensor | None:
        """After the last norm: what the head reads, (batch, length, dim)."""
        if not self.enabled:
            return None
        s, self.s = self.s, None
        result = self.up(self.norm(s))  # width -> dim
        return z + result if self.added else result

    def put(self, model: nn.Module, blocks: Sequence[int]) -> None:
        """Watch these blocks of the model, and what its head reads."""
        found = anatomy.blocks(model)
        for rung, i in zip(self.rungs, blocks, strict=True):
            found[i].register_forward_hook(rung.climb, with_kwargs=True)
        last = anatomy.final_norm(model) if anatomy.family(model).final_norm else found[-1]
        last.register_forward_hook(self.read)

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete it, and all its hooks."""
        for owner in (self, *self.rungs):
            drop_hooks_(model, owner)
        place, _, last = name.rpartition(".")
        delattr(model.get_submodule(place), last)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"s": None, "caches": None}  # a copy starts between two passes


def _projection(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.normal_(layer.weight, std=STD)
    nn.init.zeros_(layer.bias)
    return layer


def _empty_like(cache):
    if isinstance(cache, KVCache):
        return KVCache(cache.max_length)
    from transformers import DynamicCache

    return DynamicCache()


@method
def side_(
    model: nn.Module,
    reduction: int = 4,
    blocks: Sequence[int] | None = None,
    added: bool = False,
) -> None:
    """Put a side network of 1 / reduction of the width beside these blocks, beside all for None.

    The authors' reduction is 8, and they leave out every fourth rung in T5-base. With blocks the
    network starts from what the first of them reads (theirs from the embeddings): name the upper
    ones where states below are computed once.
    Raises ValueError where one is already, when width or heads are not whole, and for T5.
    """
    if hasattr(model, "side"):
        raise ValueError(f"{type(model).__name__} has a side network already")
    weight = anatomy.embedding(model).weight
    width = _width(model, reduction)
    places = range(len(anatomy.blocks(model))) if blocks is None else blocks
    stream = _largest(_written(model), width)
    rungs = [Rung(weight.shape[1], width, _side_block(model, i, reduction, stream)) for i in places]
    model.side = Side(weight.shape[1], width, rungs, added).to(weight)
    model.side.train(model.training)
    model.side.put(model, list(places))


def _width(model: nn.Module, reduction: int) -> int:
    if (names := anatomy.family(model)).name not in FIELDS:
        raise ValueError(f"{names.name}'s blocks share their position bias: no side network here")
    dim, heads = anatomy.embedding(model).weight.shape[1], n_heads(model)
    if dim % reduction or heads % reduction:
        raise ValueError(
            f"a reduction by {reduction} leaves {dim / reduction:g} features and "
            f"{heads / reduction:g} heads of {dim} and {heads}: both must be whole"
        )
    return dim // reduction


def _side_block(model: nn.Module, i: int, reduction: int, stream: Tensor) -> nn.Module:
    """A block of the kind of block i, with the part of its weights that counts most.

    stream: (width,) features of the residual stream that stay, the same in all blocks.
    """
    names, base = anatomy.family(model), anatomy.blocks(model)[i]
    kept = _kept(model, i, reduction) | {"stream": stream}
    heads, kv_heads = (len(kept[what]) // _head_dim(model, i) for what in ("query", "key"))
    sizes = (len(stream), len(kept["inner"]), heads, kv_heads)
    config = copy.deepcopy(model.config)
    for field, size in zip(FIELDS[names.name], sizes):  # some have no heads of keys
        setattr(config, field, size)
    block = type(base)(config, **({} if names.name == "GPT" else {"layer_idx": i}))
    _prune_(block, base, names, kept)
    return block


def _head_dim(model: nn.Module, i: int) -> int:
    return matrix(_plain(anatomy.projection(model, i, "output"))).shape[1] // n_heads(model)


@torch.no_grad()
def _kept(model: nn.Module, i: int, reduction: int) -> dict[str, Tensor]:
    """Features of queries, of keys and values, and of the feed-forward layer that stay in block i.

    Whole heads stay, by the L1 norm of their query's rows, in groups that share a head of keys.
    """
    n, head_dim = n_heads(model), _head_dim(model, i)
    fused = "query_key_value" in anatomy.family(model).projections
    query = matrix(_plain(anatomy.projection(model, i, "query_key_value" if fused else "query")))
    n_kv = n if fused else len(matrix(anatomy.projection(model, i, "key"))) // head_dim
    size = query[: n * head_dim].abs().sum(1).view(n_kv, n // n_kv, head_dim).sum(2)
    heads, kv_heads = n // reduction, _kv_heads(n_kv, n, reduction)
    groups = _largest(size.sum(1), kv_heads)
    within = _largest(size[groups], heads // kv_heads)  # (kv_heads, heads / kv_heads)
    kept = {"query": _features((groups[:, None] * (n // n_kv) + within).flatten(), head_dim)}
    kept |= {"key": _features(groups, head_dim)}
    if fused:
        parts = [kept["query"], *(kept["key"] + j * n * head_dim for j in (1, 2))]
        kept |= {"query_key_value": torch.cat(parts)}
    up = matrix(_plain(anatomy.projection(model, i, "up")))
    return kept | {"inner": _largest(up.abs().sum(1), len(up) // reduction)}


def _kv_heads(n_kv: int, n: int, reduction: int) -> int:
    """The fewest heads of keys that divide the side's, in groups no larger than the base's."""
    heads = n // reduction
    return next(k for k in range(1, n + 1) if heads % k == 0 and heads // k <= n // n_kv)


@torch.no_grad()
def _prune_(
    block: nn.Module, base: nn.Module, names: anatomy.Family, kept: dict[str, Tensor]
) -> None:
    """Copy the rows and columns that stay, of every projection and norm, into the side block."""
    whole = dict(base.named_parameters())
    for name, parameter in block.named_parameters():  # norms over a head's features, as Qwen3's
        if name in whole and whole[name].shape == parameter.shape:
            parameter.copy_(whole[name])
    for role, place in names.projections.items():
        rows, columns = (kept[what] for what in WRITES_READS[role])
        old, new = _plain(base.get_submodule(place)), block.get_submodule(place)
        matrix(new).copy_(matrix(old)[rows][:, columns])
        if new.bias is not None:
            new.bias.copy_(old.bias[rows])
    for place in (names.attention_norm, names.mlp_norm):
        old = _plain(base.get_submodule(place))
        for name, parameter in block.get_submodule(place).named_parameters():
            parameter.copy_(old.get_parameter(name)[kept["stream"]])


def _written(model: nn.Module) -> Tensor:
    """(dim,): L1 norms of what writes each feature of the residual stream, summed over blocks."""
    layers = anatomy.projections(model, "output", "down").values()
    return sum(matrix(_plain(layer)).detach().abs().sum(1) for layer in layers)


def _largest(sizes: Tensor, n: int) -> Tensor:
    """Places of the n largest along the last axis, in their order."""
    return sizes.topk(n).indices.sort().values


def _features(heads: Tensor, head_dim: int) -> Tensor:
    """Places of all features of these heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim, device=heads.device)).flatten()


def _plain(layer: nn.Module) -> nn.Module:
    """A layer of the base without what other methods put around it."""
    return _plain(layer.base) if isinstance(layer, Adapter) else layer
