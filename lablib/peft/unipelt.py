"""UniPELT (Mao et al., 2022): LoRA, a prefix and an adapter at once, each with a gate of its own.

LoRA on query and value    W x + g B A x
Prefix in attention        attention(q, [g P_k; K], [g P_v; V])
Adapter after the mlp      h + g W_up f(W_down h)

g = mean over positions of sigmoid(w z + c), one number a text and a part, with z what that part
reads: x, attention's input, and h. So the model itself decides how much of each a text needs.
From the authors' code: the mean is taken after the sigmoid and over all positions, padding too;
LoRA's gate stands where alpha / r did; query and value have a gate each. Their adapter, and its
gate, read h after the residual sum and its norm; here both read h itself, as the other adapters of
this package do.

The mean looks at the whole text. In a decoder a token's gates hence depend on later tokens: train
classifiers with it, not next-token losses. Under a key-value cache the mean is over the tokens of a
call, so that outputs differ from those of the text in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import matrix, method
from lablib.peft.bottleneck import Bottleneck, _free
from lablib.peft.lora import LoRALinear
from lablib.peft.prefix import Prefix, _attentions, _Rows


class Gate(nn.Module):
    """One number from 0 to 1 for each text. Starts near 1/2: w normal of 0.02, c zero.

    dim: features of what it reads.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.score = nn.Linear(dim, 1)
        nn.init.normal_(self.score.weight, std=0.02)
        nn.init.zeros_(self.score.bias)

    def forward(self, z: Tensor) -> Tensor:
        """z: (batch, length, dim) -> (batch, 1, 1)."""
        return self.score(z).sigmoid().mean(1, keepdim=True)


class GatedLoRA(LoRALinear):
    """W x + g B A x: a change of W that differs from text to text, so it can't be merged."""

    def __init__(self, base: nn.Module, rank: int = 8):
        super().__init__(base, rank)
        self.gate = Gate(matrix(base).shape[1])

    def delta(self) -> Tensor:
        """Raises ValueError: there is no one change of the weight."""
        raise ValueError("a gated LoRA changes with its input: it can't be merged into a weight")

    def changed(self, x: Tensor) -> Tensor:
        """x: (batch, length, in) -> (batch, length, out)."""
        change = F.linear(F.linear(x, self.down), self.up)  # in -> rank -> out
        return self.base(x) + self.gate(x) * change


class GatedPrefix(Prefix):
    """Key and value rows times a gate that reads what the attention reads. dim: its features."""

    def __init__(self, dim: int, length: int, width: int, std: float = 0.02):
        super().__init__(length, width, std)
        self.gate = Gate(dim)

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """As `Prefix.look`, with rows that are gated."""
        seen = super().look(module, args, kwargs)
        if seen is None:
            return None
        (x,), given = seen
        cache = "cache" if "cache" in given else "past_key_values"
        rows, inner = given[cache].rows, given[cache].cache
        return (x,), given | {cache: _GatedRows(rows, inner, self.gate(x))}


class _GatedRows(_Rows):
    """The cache that adds the rows, each text's times its gate. gate: (batch, 1, 1)."""

    def __init__(self, rows: tuple[Tensor, Tensor], cache, gate: Tensor):
        super().__init__(rows, cache)
        self.gate = gate.unsqueeze(-1)  # (batch, heads, length, head_dim)

    def _before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        length = len(self.rows[0])
        both = super()._before(keys, values)
        return tuple(torch.cat([self.gate * t[:, :, :length], t[:, :, length:]], 2) for t in both)


class GatedBottleneck(Bottleneck):
    """h + g W_up f(W_down h), with a gate that reads h, as W_down does."""

    def __init__(self, dim: int, rank: int, *, start: str = "bert"):
        super().__init__(dim, rank, start=start)
        self.gate = Gate(dim)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim), the sublayer's input and output -> (batch, length, dim)."""
        change = self.up(self.form(self.down(h)))  # dim -> rank -> dim
        return h + self.gate(h) * self.scale * change


@method
def unipelt_(model: nn.Module, rank: int = 8, length: int = 10, bottleneck: int = 48) -> None:
    """LoRA of this rank, a prefix of this length and an adapter of this width in every block.

    The defaults are the authors' (48 is 768 / 16). Theirs computes the prefix by an MLP of width
    512; here its rows train directly. GPT-2 has query, key and value in one matrix: LoRA is on it.
    It does not start as the base: gates begin at 1/2 and the prefix takes its share of attention.
    Raises ValueError for T5, which takes no prefix, and where a prefix is already.
    """
    places = _attentions(model)
    if any(hasattr(model.get_submodule(name), "prefix") for name in places):
        raise ValueError(f"{type(model).__name__} has a prefix already")
    weight, fused = anatomy.embedding(model).weight, "query_key_value"
    roles = (fused,) if fused in anatomy.family(model).projections else ("query", "value")
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, GatedLoRA(layer, rank).to(weight))
    for block, (name, width) in enumerate(places.items()):
        attention = model.get_submodule(name)
        attention.prefix = GatedPrefix(weight.shape[1], length, width).to(weight)
        attention.register_forward_pre_hook(attention.prefix.look, with_kwargs=True)
        adapter = GatedBottleneck(weight.shape[1], bottleneck).to(weight)
        sublayers.change_(model, block, "mlp", adapter, _free(model, block, "mlp"))
