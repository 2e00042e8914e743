"""What `moe_mlp` is timed on: `route` and it, as one layer, beside transformers' blocks."""

import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lablib.kernels import moe_mlp, route
from lablib.kernels.cases import Case, layer_step, naive


class Layer(nn.Module):
    """A router and its experts, put together from the two ops that are given.

    router: (n_experts, dim); up, down: as `moe_mlp` takes them.
    """

    def __init__(self, router: Tensor, up: Tensor, down: Tensor, top_k: int, ops: tuple):
        super().__init__()
        tensors = (tensor.detach().clone() for tensor in (router, up, down))
        self.router, self.up, self.down = (nn.Parameter(tensor) for tensor in tensors)
        self.top_k, (self.route, self.mlp) = top_k, ops
        self.activation = "swiglu" if up.shape[1] == 2 * down.shape[2] else "relu"

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, dim) -> (batch, length, dim)."""
        flat = x.flatten(0, 1)  # (tokens, dim)
        weight, order, counts = self.route(flat @ self.router.t(), self.top_k)
        token = order // self.top_k  # (tokens * top_k,), sorted by expert
        return self.mlp(flat, token, weight, self.up, self.down, counts, self.activation).view(
            x.shape
        )


def _ours(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    routing = route(logits, top_k)
    return routing.weights.flatten()[routing.order], routing.order, routing.counts


def _plain(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    probs, experts, counts, order = naive("route").route(logits, top_k)
    return probs.gather(1, experts).flatten()[order], order, counts


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    """OLMoE's and Switch's layers, with random weights that all ways share."""
    version = importlib.metadata.version("transformers")
    pairs = {"ours": (_ours, moe_mlp), "naive": (_plain, naive("moe_mlp").moe_mlp)}
    built: dict[str, Callable] = {"OLMoE": _olmoe, "Switch": _switch}
    made = []
    for name, build in built.items():
        title, theirs, tensors, top_k, flops = build(device, dtype)
        dim = tensors[0].shape[1]
        x = torch.randn(4, 1024, dim, device=device, dtype=dtype, requires_grad=True)
        ways = {key: Layer(*tensors, top_k, ops) for key, ops in pairs.items()}
        ways[f"transformers {version} {name}"] = theirs
        steps = {key: layer_step(way, x) for key, way in ways.items()}
        gap = max(_distance(steps["ours"](), step) for step in steps.values())
        made.append(Case(f"{title}, forward and backward; outputs within {gap:.1e}", steps, flops))
    return made


def _distance(ours: Tensor, way: Callable[[], Tensor]) -> float:
    """The largest difference of a way's output; 0 for one that fails, which the table will tell."""
    try:
        return (way() - ours).abs().max().item()
    except RuntimeError:
        return 0.0


def _olmoe(device: str, dtype: torch.dtype):
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    sizes = {"hidden_size": 256, "intermediate_size": 128}
    config = OlmoeConfig(**sizes, num_experts=64, num_experts_per_tok=8)
    block = _random(OlmoeSparseMoeBlock(config)).to(device, dtype)
    tensors = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    title = "MoE, 4,096 tokens, 64 experts, top 8, d 256, width 128"
    return title, block, tensors, 8, 4096 * 8 * 3 * 6 * 256 * 128


def _switch(device: str, dtype: torch.dtype):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    config = SwitchTransformersConfig(
        d_model=512, d_ff=2048, num_experts=8, expert_capacity=4096, dropout_rate=0.0
    )
    block = _random(switch.SwitchTransformersSparseMLP(config)).eval().to(device, dtype)
    experts = block.experts.values()
    up = torch.stack([expert.wi.weight for expert in experts])
    down = torch.stack([expert.wo.weight for expert in experts])
    title = "MoE, 4,096 tokens, 8 experts, top 1, d 512, width 2,048"
    tensors = block.router.classifier.weight, up, down
    return title, block, tensors, 1, 4096 * 2 * 6 * 512 * 2048


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    return module
