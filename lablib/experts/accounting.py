"""What a model costs: parameters in all and a token, FLOPs of training and decoding, energy.

Takes models of this package and transformers' models, mixtures of experts or not, also on the meta
device, which knows shapes and stores no numbers:

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(OlmoeConfig(intermediate_size=1024))
    parameters(model)  # Parameters(total=6919161856, active=1282017280.0)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from lablib.experts.moe import MoE
from lablib.experts.switch_transformers import SwitchFFN

JOULES_PER_KILOWATT_HOUR = 3.6e6


class Parameters(NamedTuple):
    """How many numbers a model stores, and how many of them one token meets."""

    total: int
    active: float


class Flops(NamedTuple):
    """FLOPs a token, two for each multiply-add.

    forward: averaged over a text's positions; training: forward and backward, three times that;
    decoding: one more token after a whole text, whose keys and values are kept.
    """

    forward: float
    training: float
    decoding: float


def parameters(model: nn.Module) -> Parameters:
    """Total and active parameters; a matrix shared by embedding and head counts once.

    A token meets top_k of n_experts in each layer, and all of everything else, the whole embedding
    included. Raises ValueError for a mixture whose top_k can't be read.
    """
    shares = dict(_expert_shares(model))
    total, active = 0, 0.0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        active += parameter.numel() * _share(name, shares)
    return Parameters(total, active)


def flops(model: nn.Module, length: int) -> Flops:
    """FLOPs a token of texts of `length` tokens, of matrix products and attention alone.

    The head's product counts, looking up the embedding doesn't. A router that mixes tokens into
    slots is not counted. Raises ValueError as `parameters` does.
    """
    products = 2 * _multiplied(model)
    features = _attention_features(model)  # of all heads and layers
    forward = products + 4 * features * (length + 1) / 2  # half of the text, keys and values
    return Flops(forward, 3 * forward, products + 4 * features * length)


def energy(flops: float, flops_per_second: float, watts: float, overhead: float = 1.0) -> float:
    """Kilowatt-hours of so many FLOPs on devices that reach flops_per_second at `watts` each.

    flops_per_second: what is measured, not the peak. overhead: of the building, its power over that
    of its machines (PUE). Raises ValueError unless all are above 0.
    """
    if min(flops, flops_per_second, watts, overhead) <= 0:
        raise ValueError("FLOPs, their rate, watts and overhead must be above 0")
    return flops / flops_per_second * watts * overhead / JOULES_PER_KILOWATT_HOUR


def _multiplied(model: nn.Module) -> float:
    """Active parameters that a token is multiplied with: matrices but for looked-up tables."""
    shares = dict(_expert_shares(model))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    used = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and (id(parameter) not in tables or id(parameter) in heads):
            used += parameter.numel() * _share(name, shares)
    return used


def _share(name: str, shares: dict[str, float]) -> float:
    """The share of a parameter that one token meets: below 1 in the experts of `shares`."""
    return next((share for stem, share in shares.items() if name.startswith(stem)), 1.0)


def _expert_shares(model: nn.Module) -> Iterator[tuple[str, float]]:
    """(name of the experts, with a dot; the share of them that a token meets) of each mixture."""
    for name, module in model.named_modules():
        stem = f"{name}." if name else ""
        if isinstance(module, MoE):
            yield f"{stem}experts.", _experts_a_token(module.router) / module.router.n_experts
        elif isinstance(module, SwitchFFN):
            yield f"{stem}experts.", 1 / len(module.experts)
    yield from _hub_shares(model)


def _experts_a_token(router: nn.Module) -> float:
    """How many experts a token has, on average where experts choose."""
    for field in ("top_k", "capacity_factor"):
        if (value := getattr(router, field, None)) is not None:
            return value
    if (table := getattr(router, "table", None)) is not None:
        return table.shape[1]
    raise ValueError(f"{type(router).__name__} does not say how many experts a token meets")


def _hub_shares(model: nn.Module) -> Iterator[tuple[str, float]]:
    """The same of transformers' models, whose configuration says how many experts there are."""
    config = getattr(model, "config", None)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    n_experts = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    if n_experts is None or not hasattr(config, "model_type"):
        return
    top_k = 1 if config.model_type == "switch_transformers" else None
    top_k = getattr(config, "num_experts_per_tok", top_k)
    if top_k is None:
        raise ValueError(f"a {config.model_type} configuration does not say its experts a token")
    for name, _ in model.named_modules():
        if name.rpartition(".")[2] == "experts":
            yield f"{name}.", top_k / n_experts


def _attention_features(model: nn.Module) -> int:
    """Features of the queries of all layers: layers * heads * features of a head."""
    config = model.config
    if hasattr(config, "n_layers"):
        return config.n_layers * config.n_heads * config.head_dim
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * heads * width
