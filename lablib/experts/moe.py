"""A mixture-of-experts layer: a router sends each token to a few of many experts.

The layer that the papers of this theme share. `MoE` takes the place of a block's feed-forward
layer: `block.mlp = MoE(TokenChoice(dim, 8, top_k=2), SwiGLUExperts(8, dim, width))`.
Shared experts beside routed ones are those of DeepSeekMoE (Dai et al., 2024); routers are in
`lablib.experts.routing`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.routing import Assignments, Record, Router, counted_places
from lablib.kernels import grouped_linear, merge_tokens, moe_mlp


class Experts(nn.Module):
    """What a `MoE` calls: a module from rows sorted by expert to as many rows.

    forward(rows (n, dim), counts (n_experts,) int64) -> (n, dim).
    """

    def __init__(self, n_experts: int):
        super().__init__()
        self.n_experts = n_experts

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        """Each token's weighted sum of its experts: x (tokens, dim) -> (tokens, dim)."""
        rows = self(x.index_select(0, assigned.token), assigned.counts)  # (rows, dim)
        return merge_tokens(rows.new_zeros(x.shape), rows, assigned.token, assigned.weight)


class FeedForwardExperts(Experts):
    """n_experts layers down(activation(up(x))), their weights in two tensors.

    activation: "relu", or a function of (n, width).
    """

    def __init__(
        self,
        n_experts: int,
        dim: int,
        width: int,
        activation: str | Callable[[Tensor], Tensor] = "relu",
    ):
        super().__init__(n_experts)
        self.activation = activation
        self.up = nn.Parameter(torch.empty(n_experts, width, dim).normal_(0.0, 0.02))
        self.down = nn.Parameter(torch.empty(n_experts, dim, width).normal_(0.0, 0.02))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        activation = F.relu if self.activation == "relu" else self.activation
        hidden = activation(grouped_linear(rows, self.up, counts))  # (n, width)
        return grouped_linear(hidden, self.down, counts)  # (n, dim)

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        if self.activation != "relu":
            return super().mix(x, assigned)
        token, weight, counts = assigned
        return moe_mlp(x, token, weight, self.up, self.down, counts, "relu")


class SwiGLUExperts(Experts):
    """n_experts layers down(silu(gate(x)) * up(x)); gate and up lie in one tensor, gate first.

    The layout is that of transformers' OLMoE and Mixtral.
    """

    def __init__(self, n_experts: int, dim: int, width: int):
        super().__init__(n_experts)
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * width, dim).normal_(0.0, 0.02))
        self.down = nn.Parameter(torch.empty(n_experts, dim, width).normal_(0.0, 0.02))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, self.gate_up, counts).chunk(2, -1)  # (n, width) each
        return grouped_linear(F.silu(gate) * up, self.down, counts)  # (n, dim)

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        token, weight, counts = assigned
        return moe_mlp(x, token, weight, self.gate_up, self.down, counts, "swiglu")


class ExpertList(Experts):
    """Any modules (n, dim) -> (n, dim) as experts; those without rows are not called."""

    def __init__(self, experts: Iterable[nn.Module]):
        experts = list(experts)
        super().__init__(len(experts))
        self.experts = nn.ModuleList(experts)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        parts = zip(self.experts, rows.split(counts.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part)] or [rows])


class MoE(nn.Module):
    """Experts behind a router, in the place of one feed-forward layer.

    router: one of `lablib.experts.routing`, or a `Router` of your own. Losses that it leaves in
        `router.auxiliary_loss` are added by `lablib.training.fit`; a loop of your own adds
        `lablib.training.losses.auxiliary_loss(model)`.
    experts: one of the three above, or an `Experts` of your own.
    shared: a module (..., dim) -> (..., dim) added for every token.
    Raises ValueError when router and experts disagree on how many experts there are.
    """

    def __init__(self, router: Router, experts: Experts, *, shared: nn.Module | None = None):
        super().__init__()
        if router.n_experts != experts.n_experts:
            raise ValueError(
                f"the router chooses from {router.n_experts} experts, not {experts.n_experts}"
            )
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length, dim), or (tokens, dim) -> x's shape."""
        flat = x.reshape(-1, x.shape[-1])  # (tokens, dim)
        if self.router.counted is None:
            sequences = x.shape[:-2].numel() if x.ndim > 2 else None
            mixed = self.router(flat, sequences).mix(self.experts, flat)
        else:
            mixed = self._without_padding(flat)
        if self.shared is not None:
            mixed = mixed + self.shared(flat)
        return mixed.view(x.shape)

    def _without_padding(self, flat: Tensor) -> Tensor:
        """As if only the counted tokens were there; the others get nothing from the experts."""
        place = counted_places(self.router, len(flat))  # (counted,)
        tokens = flat.index_select(0, place)
        mixed = self.router(tokens).mix(self.experts, tokens)
        return torch.zeros_like(flat).index_copy(0, place, mixed.to(flat.dtype))


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """Full dotted name -> MoE layer, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@contextlib.contextmanager
def observed(model: nn.Module, observe: Callable[[str, MoE, Record], None]) -> Iterator[None]:
    """Within the block, observe(name, layer, record) is called after each call of a MoE layer.

    One block within another takes its place until it ends.
    """
    layers = moe_layers(model)
    before = {name: layer.router.observer for name, layer in layers.items()}

    def observer(name: str) -> Callable[[Record], None]:
        return lambda record: observe(name, layers[name], record)

    try:
        for name, layer in layers.items():
            layer.router.observer = observer(name)
        yield
    finally:
        for name, layer in layers.items():
            layer.router.observer = before[name]


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Record]]]:
    """Within the block, every MoE layer keeps a `Record` a call: name -> records."""
    records: dict[str, list[Record]] = {name: [] for name in moe_layers(model)}
    with observed(model, lambda name, layer, record: records[name].append(record)):
        yield records
