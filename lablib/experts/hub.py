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

    source: a model, or the folder that it was saved to. Logits equal transformers'; the balancing
    loss has the configuration's weight and is left in training mode, a layer at a time.
    Raises ValueError for another architecture, or one whose attention GPT can't represent.
    """
    config, weights = read_model(source)
    if config.get("model_type") not in FAMILIES:
        raise ValueError(
            f"model_type {config.get('model_type')!r} is none of {', '.join(FAMILIES)}"
        )
    model = _skeleton(config)
    load_weights(model, lambda name: _find(weights, name))
    return model


def from_hf_switch(block: nn.Module, capacity_factor: float | None = None) -> MoE:
    """The layer of transformers' `SwitchTransformersSparseMLP`, with copies of its weights.

    capacity_factor: of each sequence, as in `MoE`. The block has places an expert instead: at
    sequences of one length, capacity_factor = places * n_experts / length is the same.
    """
    wi = torch.stack([expert.wi.weight.detach() for expert in block.experts.values()])
    wo = torch.stack([expert.wo.weight.detach() for expert in block.experts.values()])
    n_experts, width, dim = wi.shape
    experts = FeedForwardExperts(n_experts, dim, width)
    layer = MoE(
        dim, experts, n_experts, capacity_factor=capacity_factor, capacity_of="sequence"
    ).to(wi)
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
    olmoe = config["model_type"] == "olmoe"
    n_experts = config.get("num_experts") or config["num_local_experts"]
    after = not olmoe or config.get("norm_topk_prob", False)
    for block in model.blocks:
        with torch.device("meta"):
            block.mlp = MoE(
                config["hidden_size"],
                SwiGLUExperts(n_experts, config["hidden_size"], config["intermediate_size"]),
                n_experts,
                top_k=config["num_experts_per_tok"],
                softmax="after" if after else "before",
                balance=config.get("router_aux_loss_coef", 0.0),
            )
            if olmoe:
                attention = block.attention
                eps = model.config.norm_eps
                attention.query_norm = WideNorm(attention.query.out_features, eps)
                attention.key_norm = WideNorm(attention.key.out_features, eps)
    return model


_MOE_NAMES = {
    "router.weight": "gate.weight",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
}


def _find(weights: dict[str, Tensor], name: str) -> Tensor | None:
    """Our parameter's weights, put together from one matrix an expert where the file has those."""
    if ".mlp." not in name:
        return weights.get(hub_name(name))
    block, _, part = name.partition(".mlp.")
    stem = f"model.layers.{block.removeprefix('blocks.')}."
    for mlp in ("mlp.", "block_sparse_moe."):
        if (found := weights.get(stem + mlp + _MOE_NAMES[part])) is not None:
            return found
        if part != "router.weight" and (found := _stacked(weights, stem + mlp + "experts.", part)):
            return torch.stack(found)
    return None


def _stacked(weights: dict[str, Tensor], stem: str, part: str) -> list[Tensor]:
    """One matrix an expert: gate and up (OLMoE's names, then Mixtral's) joined, or down."""
    found = []
    for gate, up, down in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
        while f"{stem}{len(found)}.{down}.weight" in weights:
            names = [down] if part == "experts.down" else [gate, up]
            found.append(torch.cat([weights[f"{stem}{len(found)}.{n}.weight"] for n in names]))
    return found
