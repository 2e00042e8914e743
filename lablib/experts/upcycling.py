"""Upcycling Large Language Models into Mixture of Experts (He et al., 2024).

Lab 305. `upcycled` makes a layer of experts from one dense feed-forward layer: copies of it, or
copies of its shards (virtual groups, section 2.3, Figure 3), their weights scaled (equation 2).
Then: `upcycle_` for whole models, what theory says about the newborn function, and the similarity
of experts to the layer they came from (section 3.2). In the paper's names E8G4T4 the expansion is
8, the granularity 4 and top-k 4: 32 experts, each a quarter as wide as the dense layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.moe import MoE, SwiGLUExperts, moe_layers
from lablib.experts.routing import TokenChoice
from lablib.models import GPTConfig, anatomy
from lablib.models.flops import flops_per_token

ROLES = ("gate", "up", "down")


@torch.no_grad()
def upcycled(
    dense: Sequence[Tensor],
    expansion: int,
    granularity: int = 1,
    top_k: int = 1,
    softmax: str = "before",
    *,
    virtual: bool = True,
    scaled: Sequence[str] = ROLES,
    balance: float = 1e-2,
) -> MoE:
    """A layer of experts made of a dense SwiGLU layer: (..., dim) -> (..., dim).

    dense: its gate (width, dim), up (width, dim) and down (dim, width).
    expansion E, granularity G, top_k T: E * G experts of width / G, of which a token asks T.
    softmax: over all logits "before" the choice, as the paper recommends, or "after" it.
    virtual: routers start as E different rows, each repeated for the G shards of one copy; else
        each expert's row is drawn apart, the naive way.
    scaled: among which of "gate", "up", "down" equation 2's factor is shared; () leaves it out.
    balance: weight of the balancing loss, 1e-2 in the paper (section 3.3).
    Raises ValueError for a width that granularity does not divide, or another role.
    """
    gate, up, down = dense
    width, dim = gate.shape
    check(width, granularity, scaled)
    # Section 2.3: cut the hidden features into G shards; the row of shards is copied E times.
    gate, up = (w.reshape(granularity, -1, dim).repeat(expansion, 1, 1) for w in (gate, up))
    down = down.reshape(dim, granularity, -1).transpose(0, 1).repeat(expansion, 1, 1)
    # Equation 2: s = (E G^2 / T)^(1/3) on each of three matrices.
    factor = output_factor(expansion, granularity, top_k, softmax)
    s = {role: factor ** (1 / len(scaled)) if role in scaled else 1.0 for role in ROLES}
    experts = SwiGLUExperts(expansion * granularity, dim, width // granularity)
    experts.gate_up.copy_(torch.cat([s["gate"] * gate, s["up"] * up], 1))  # (E G, 2 width / G, dim)
    experts.down.copy_(s["down"] * down)  # (E G, dim, width / G)
    router = TokenChoice(dim, expansion * granularity, top_k, softmax, balance=balance)
    if virtual:  # one row for each of E copies, so that the best G experts are one of each shard
        router.weight.copy_(router.weight[:expansion].repeat_interleave(granularity, 0))
    return MoE(router, experts)


def check(width: int, granularity: int, scaled: Iterable[str]) -> None:
    """Raise ValueError unless width can be cut and the roles to scale exist."""
    if granularity < 1 or width % granularity:
        raise ValueError(f"a width of {width} can't be cut into {granularity} equal shards")
    if unknown := set(scaled) - set(ROLES):
        raise ValueError(f"{', '.join(sorted(unknown))} is none of {', '.join(ROLES)}")


def output_factor(expansion: int, granularity: int, top_k: int, softmax: str = "before") -> float:
    """By how much a newborn layer's output is too small, routers being near uniform.

    Softmax before the choice: each of E G experts weighs 1 / (E G), and T of them give T / G dense
    outputs, E G^2 / T times too little (section 2.3.1, equation 2 before its root). After the
    choice: weights sum to 1 over shards, of which G make one output, G times too little.
    """
    if softmax == "after":
        return float(granularity)
    return expansion * granularity**2 / top_k


def weight_scale(expansion: int, granularity: int, top_k: int) -> float:
    """Equation 2: what each matrix is multiplied with, the third root of `output_factor`."""
    return output_factor(expansion, granularity, top_k) ** (1 / 3)


def keeps_function(
    expansion: int,
    granularity: int = 1,
    top_k: int = 1,
    softmax: str = "before",
    *,
    virtual: bool = True,
    scaled: Sequence[str] = ROLES,
) -> bool:
    """Whether the newborn layer computes exactly what the dense one did, for every token.

    Three things are needed. The weights of what is chosen sum to a constant: always when softmax
    comes after the choice, before it only when all experts are chosen. One of each shard is there
    in equal weight. And the constant is made up for where the layer is linear: a scale on the gate
    goes through silu.
    """
    constant = softmax == "after" or top_k == expansion * granularity
    whole = granularity == 1 or (virtual and top_k % granularity == 0)
    factor = output_factor(expansion, granularity, top_k, softmax)
    made_up = factor == 1 or (len(scaled) > 0 and "gate" not in scaled)
    return constant and whole and made_up


def dense_weights(model: nn.Module, block: int) -> list[Tensor]:
    """A block's gate, up and down matrices. Raises ValueError where the layer has biases."""
    parts = [anatomy.projection(model, block, role) for role in ROLES]
    if any(part.bias is not None for part in parts):
        raise ValueError(f"block {block}'s feed-forward layer has biases, which experts have not")
    return [part.weight.detach() for part in parts]


def upcycle_(
    model: nn.Module,
    expansion: int,
    granularity: int = 1,
    top_k: int = 1,
    softmax: str = "before",
    blocks: Iterable[int] | None = None,
    **options,
) -> nn.Module:
    """Put `upcycled` layers in the place of a model's SwiGLU layers, in place. Returns model.

    blocks: which ones, all by default. options: as in `upcycled`. Works on `GPT` and on
    transformers' Llama-like models; the optimizer's state is not carried over, as `fit` starts one.
    Raises ValueError, and leaves the model as it was, where a layer can't be upcycled.
    """
    places = range(len(anatomy.blocks(model))) if blocks is None else blocks
    layers = {}
    for place in places:
        if isinstance(anatomy.part(model, place, "mlp"), MoE):
            raise ValueError(f"block {place} is a mixture of experts already")
        dense = dense_weights(model, place)
        layers[place] = upcycled(dense, expansion, granularity, top_k, softmax, **options)
        layers[place].to(dense[0])
        layers[place].router.float()
    for place, layer in layers.items():
        anatomy.replace_part(model, place, "mlp", layer)
    return model


def scale_(model: nn.Module, factor: float) -> nn.Module:
    """Multiply the output of every MoE layer with factor, in its down matrices, in place."""
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.experts.down.mul_(factor)
    return model


def active_flops(
    config: GPTConfig, length: int, expansion: int = 1, granularity: int = 1, top_k: int = 1
) -> float:
    """FLOPs a token of a `GPT`'s forward pass with upcycled layers; expansion 1 is the dense model.

    T / G of a dense layer's products, and the router's 2 dim E G. Training costs three times that.
    """
    dense = flops_per_token(config, length)
    if expansion == granularity == top_k == 1:
        return dense
    layer = 2 * 3 * config.dim * config.ffn_dim
    router = 2 * config.dim * expansion * granularity
    return dense + config.n_layers * ((top_k / granularity - 1) * layer + router)


@torch.no_grad()
def similarity(layer: MoE, dense: Sequence[Tensor]) -> float:
    """Mean cosine of the experts' weights with the shards that they came from: -1 to 1.

    Each expert is one long vector of its three matrices; scales that all three share do not count.
    Source: section 3.2.1, Figure 6, whose mean goes over whole experts, too.
    """
    gate, up, down = dense
    n_experts, dim, width = layer.experts.down.shape
    granularity = gate.shape[0] // width
    shards = [w.view(granularity, -1) for w in (gate, up)]
    shards.append(down.view(dim, granularity, -1).transpose(0, 1).flatten(1))
    origin = torch.cat(shards, 1).repeat(n_experts // granularity, 1)  # (experts, 3 width dim)
    mine = torch.cat([layer.experts.gate_up.flatten(1), layer.experts.down.flatten(1)], 1)
    return F.cosine_similarity(mine, origin, dim=1).mean().item()
