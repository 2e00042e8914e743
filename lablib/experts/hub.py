"""Mixture-of-experts models of Hugging Face transformers as `GPT`: OLMoE and Mixtral.

`GPT` gets no option for it: a plain one is built and its feed-forward layers are replaced by
`MoE`, OLMoE's norms of queries and keys by ones over all heads. Of Switch, an encoder-decoder,
there is the layer alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.moe import FeedForwardExperts, MoE, SwiGLUExperts
from lablib.experts.routing import TokenChoice
from lablib.models import GPT
from lablib.models.hub import config_from_hub, empty_model, hub_name, load_weights, read_model

FAMILIES = ("olmoe", "mixtral")


class WideNorm(nn.Module):
    """RMSNorm over the features of all heads together: x (..., heads, head_dim), same shape out."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.flatten(-2), self.weight.shape, self.weight, self.eps).view(x.shape)


def from_hf_moe(source: nn.Module | str | Path) -> GPT:
    """A `GPT` with `MoE` layers and the weights of a transformers OLMoE or Mixtral model.

    source: a model, or the folder that it was saved to. Logits equal transformers'.
    In training mode each layer leaves its balancing loss times router_aux_loss_coef / layers, so
    that their sum is the coefficient times the mean over layers of N sum_i f_i P_i. transformers
    averages f and P over layers before it multiplies them: equal for one layer; for more its loss
    is smaller by coefficient * N sum_i cov(f_i, P_i), the covariance over layers.
    Raises ValueError for another architecture, one whose attention GPT can't represent, or weights
    that the model has no place for.
    """
    config, weights = read_model(source)
    if config.get("model_type") not in FAMILIES:
        raise ValueError(
            f"model_type {config.get('model_type')!r} is none of {', '.join(FAMILIES)}"
        )
    model = _skeleton(config)
    load_weights(model, weights, _take)
    return model


def from_hf_switch(block: nn.Module, capacity_factor: float | None = None) -> MoE:
    """The layer of transformers' `SwitchTransformersSparseMLP`, with copies of its weights.

    capacity_factor: of each sequence, in training and in eval mode, as in the block. The block has
    places an expert instead: at sequences of one length, capacity_factor = places * n_experts /
    length is the same.
    """
    wi = torch.stack([expert.wi.weight.detach() for expert in block.experts.values()])
    wo = torch.stack([expert.wo.weight.detach() for expert in block.experts.values()])
    n_experts, width, dim = wi.shape
    router = TokenChoice(
        dim,
        n_experts,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        capacity_of="sequence",
    )
    layer = MoE(router, FeedForwardExperts(n_experts, dim, width)).to(wi)
    weights = {
        "experts.up": wi,
        "experts.down": wo,
        "router.weight": block.router.classifier.weight,
    }
    layer.load_state_dict(weights)
    return layer


def _skeleton(config: dict) -> GPT:
    if config.get("clip_qkv"):
        raise ValueError(f"clip_qkv {config['clip_qkv']} is not supported: GPT does not clip")
    dense = config | {"model_type": "mistral" if config["model_type"] == "mixtral" else "llama"}
    model = empty_model(config_from_hub(dense))
    for block in model.blocks:
        with torch.device("meta"):
            block.mlp = _layer(config)
            if config["model_type"] == "olmoe":
                attention, eps = block.attention, model.config.norm_eps
                attention.query_norm = WideNorm(attention.query.out_features, eps)
                attention.key_norm = WideNorm(attention.key.out_features, eps)
    return model


def _layer(config: dict) -> MoE:
    """One MoE layer of a transformers configuration."""
    n_experts = config.get("num_experts") or config["num_local_experts"]
    after = config["model_type"] == "mixtral" or config.get("norm_topk_prob", False)
    router = TokenChoice(
        config["hidden_size"],
        n_experts,
        top_k=config["num_experts_per_tok"],
        softmax="after" if after else "before",
        balance=config.get("router_aux_loss_coef", 0.0) / config["num_hidden_layers"],
    )
    experts = SwiGLUExperts(n_experts, config["hidden_size"], config["intermediate_size"])
    return MoE(router, experts)


_MOE_NAMES = {
    "router.weight": "gate.weight",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
}


def _take(weights: dict[str, Tensor], name: str) -> Tensor | None:
    """Our parameter's weights, put together from one matrix an expert where the file has those."""
    if ".mlp." not in name:
        return weights.pop(hub_name(name), None)
    block, _, part = name.partition(".mlp.")
    stem = f"model.layers.{block.removeprefix('blocks.')}."
    for mlp in ("mlp.", "block_sparse_moe."):
        if (whole := weights.pop(stem + mlp + _MOE_NAMES[part], None)) is not None:
            return whole
        if part != "router.weight" and (rows := _stacked(weights, stem + mlp + "experts.", part)):
            return torch.stack(rows)  # (n_experts, out, in)
    return None


def _stacked(weights: dict[str, Tensor], stem: str, part: str) -> list[Tensor]:
    """One matrix an expert: gate and up (OLMoE's names, then Mixtral's) joined, or down."""
    stacked = []
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        names = [down] if part == "experts.down" else [gate, up]
        while f"{stem}{len(stacked)}.{names[0]}.weight" in weights:
            keys = [f"{stem}{len(stacked)}.{name}.weight" for name in names]
            stacked.append(torch.cat([weights.pop(key) for key in keys]))
    return stacked
