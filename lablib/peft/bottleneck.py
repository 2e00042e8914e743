"""Adapters (Houlsby et al., 2019): a small network beside, or behind, a frozen sublayer.

Serial    h <- h + s W_up f(W_down h)      reads what the sublayer wrote
Parallel  h <- h + s W_up f(W_down x)      reads what the sublayer reads (He et al., 2022)
with W_down (r, d), W_up (d, r), f = ReLU and a scale s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import SublayerAdapter, matrix, method

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "softmax": lambda scores: scores.softmax(-1),
    "linear": lambda scores: scores,
}
STARTS = ("lora", "bert")
INSERTIONS = ("serial", "parallel")


class Bottleneck(SublayerAdapter):
    """h + s W_up f(W_down x or h), with the biases of both projections.

    rank: r, the width of the bottleneck. form: f, one of FORMS. insertion: "serial" reads h,
    "parallel" x. start: "lora" has a zero W_up, so that the base's function is the start, and a
    Kaiming-uniform W_down; "bert" draws both from a normal of 0.02. bias: whether there are any.
    Raises ValueError for another name than those.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        scale: float = 1.0,
        *,
        insertion: str = "serial",
        form: str = "relu",
        start: str = "lora",
        bias: bool = True,
    ):
        super().__init__()
        _known(insertion, INSERTIONS)
        self.scale, self.insertion = scale, insertion
        self.form = FORMS[_known(form, tuple(FORMS))]
        self.down = nn.Linear(dim, rank, bias=bias)
        self.up = nn.Linear(rank, dim, bias=bias)
        start_(start, self.down, self.up)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim), the sublayer's input and output -> (batch, length, dim)."""
        read = x if self.insertion == "parallel" else h
        inner = self.form(self.down(read))  # dim -> rank
        return h + self.scale * self.up(inner)  # rank -> dim


class HeadsBottleneck(SublayerAdapter):
    """A parallel adapter on each head's output, ahead of the output projection W_o.

    head_i <- head_i + s U_i f(D_i q_i) with q_i = W_q x, the head's own query (unturned, where
    positions are rotary), D_i (r, head_dim), U_i (head_dim, r): by linearity h + s W_o [U_1 f(D_1
    q_1), ...]. As many parameters as one adapter of rank r, and rank r in each head.
    query, output: the projections W_q and W_o as they are in the model, not trained here; put LoRA
        on them before this. Other arguments as in `Bottleneck`; there are no biases.
    Source: section 3.3 of He et al. (2022); that it reads queries is from the authors' code.
    Raises ValueError when the heads don't divide W_o's input.
    """

    def __init__(
        self,
        query: nn.Module,
        output: nn.Module,
        heads: int,
        rank: int,
        scale: float = 1.0,
        *,
        form: str = "relu",
        start: str = "lora",
    ):
        super().__init__()
        self.inner = matrix(output).shape[1]
        if self.inner % heads:
            raise ValueError(f"{heads} heads do not divide the output projection's {self.inner}")
        self.scale, self.heads = scale, heads
        self.form = FORMS[_known(form, tuple(FORMS))]
        self.around = (query, output)  # a tuple: no submodules
        self.down = nn.Parameter(torch.zeros(heads, rank, self.inner // heads))  # D
        self.up = nn.Parameter(torch.zeros(heads, self.inner // heads, rank))  # U
        zero_up = _known(start, STARTS) == "lora"
        bound = (self.inner // heads) ** -0.5
        if zero_up:
            nn.init.uniform_(self.down, -bound, bound)
        else:
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim) -> (batch, length, dim)."""
        query, output = self.around
        q = query(x)[..., : self.inner].unflatten(-1, (self.heads, -1))  # dim -> heads, head_dim
        low = self.form(torch.einsum("...hd,hrd->...hr", q, self.down))  # head_dim -> rank
        change = torch.einsum("...hr,hdr->...hd", low, self.up)  # rank -> head_dim
        return h + self.scale * F.linear(change.flatten(-2), matrix(output))  # -> dim


@torch.no_grad()
def start_(start: str, down: nn.Linear, up: nn.Linear) -> None:
    """Draw W_down and W_up; biases are zero. Raises ValueError for a start not in STARTS."""
    zero_up = _known(start, STARTS) == "lora"
    for layer in (down, up):
        layer.weight.normal_(std=0.02)
        if layer.bias is not None:
            layer.bias.zero_()
    if zero_up:
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        up.weight.zero_()


@method
def bottleneck_(
    model: nn.Module,
    rank: int,
    places: Sequence[str] = ("attention", "mlp"),
    insertion: str = "serial",
    scale: float = 1.0,
    form: str = "relu",
    start: str = "lora",
) -> None:
    """Put a `Bottleneck` at each of the places ("attention", "mlp") of every block."""
    weight = anatomy.embedding(model).weight
    for block in range(len(anatomy.blocks(model))):
        for place in places:
            adapter = Bottleneck(
                weight.shape[1], rank, scale, insertion=insertion, form=form, start=start
            )
            sublayers.change_(model, block, place, adapter.to(weight), _free(model, block, place))


@method
def heads_(
    model: nn.Module, rank: int, scale: float = 1.0, form: str = "relu", start: str = "lora"
) -> None:
    """Put a `HeadsBottleneck` at every block's attention, with as many heads as it has."""
    weight, heads = anatomy.embedding(model).weight, n_heads(model)
    fused = "query_key_value" in anatomy.family(model).projections  # queries come first
    for block in range(len(anatomy.blocks(model))):
        query = anatomy.projection(model, block, "query_key_value" if fused else "query")
        output = anatomy.projection(model, block, "output")
        adapter = HeadsBottleneck(query, output, heads, rank, scale, form=form, start=start)
        name = _free(model, block, "attention")
        sublayers.change_(model, block, "attention", adapter.to(weight), name)


def houlsby_(model: nn.Module, rank: int, scale: float = 1.0, start: str = "bert") -> None:
    """Serial adapters behind both sublayers of every block (Houlsby et al., 2019).

    Their norms, which that paper trains too, stay frozen here.
    """
    bottleneck_(model, rank, ("attention", "mlp"), "serial", scale, start=start)


def pfeiffer_(model: nn.Module, rank: int, scale: float = 1.0, start: str = "bert") -> None:
    """Serial adapters behind the feed-forward layer alone (Pfeiffer et al., 2021)."""
    bottleneck_(model, rank, ("mlp",), "serial", scale, start=start)


def parallel_(model: nn.Module, rank: int, scale: float = 4.0, start: str = "lora") -> None:
    """Scaled parallel adapters at the feed-forward layer (He et al., 2022)."""
    bottleneck_(model, rank, ("mlp",), "parallel", scale, start=start)


def n_heads(model: nn.Module) -> int:
    """Query heads a block."""
    config = model.config
    return config.n_heads if hasattr(config, "n_heads") else config.num_attention_heads


def _free(model: nn.Module, block: int, place: str) -> str:
    """A name for a change that no earlier one has there."""
    names = anatomy.family(model)
    start = f"{names.blocks}.{block}."
    taken = {n for n in sublayers.changes(model) if n.startswith(start)}
    return "adapter" if not taken else f"adapter_{len(taken)}"


def _known(name: str, names: Sequence[str]) -> str:
    if name not in names:
        raise ValueError(f"{name!r} is none of {', '.join(names)}")
    return name
