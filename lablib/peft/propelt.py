"""ProPETL, "One Network, Many Masks" (Zeng et al., 2023): an adapter shared by all blocks.

It is the prototype phi; block i uses phi * m_i, with m_i of zeros and ones:

    adapter   h + (W_up * m_up) f((W_down * m_down) h)        biases shared, without a mask
    LoRA      W x + (alpha / r) (B * m_B) (A * m_A) x         one prototype a projection's role
    prefix    P_k * m_k, P_v * m_v

m is one for the share `keep` of largest |s|, s scores that train with the prototype: a gradient
reaches |s| as if it were m ("straight-through"). Once trained, `freeze_masks_` keeps one bit for a
score. From the authors' code: that |s| counts, that the share is taken in each matrix by itself,
and the scores' start. Masks for several tasks of one prototype are not offered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import Adapter, SublayerAdapter, WeightAdapter, adapters, matrix, method
from lablib.peft.bottleneck import FORMS, _free, start_
from lablib.peft.prefix import Prefix, _attentions


class Mask(nn.Module):
    """Zeros and ones of this shape, from scores that train or, once frozen, from bits.

    keep: the share of ones, rounded up.
    """

    def __init__(self, shape: tuple[int, int], keep: float, frozen: bool = False):
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"a share of {keep} is not above 0 and at most 1")
        self.shape, self.keep = shape, keep
        n = math.prod(shape)
        self.n_ones = n - int((1 - keep) * n)
        if frozen:
            self.register_buffer("bits", torch.zeros(math.ceil(n / 8), dtype=torch.uint8))
        else:
            self.scores = nn.Parameter(torch.empty(shape))
            nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """The mask, `shape`: (rows, columns)."""
        if not hasattr(self, "scores"):
            return unpacked(self.bits, self.shape)
        size = self.scores.abs()
        ones = size.flatten().topk(self.n_ones).indices
        mask = torch.zeros_like(size).flatten().index_fill(0, ones, 1.0).view(self.shape)
        return mask + (size - size.detach())  # the mask itself; d mask / d|s| = 1

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the bits, and drop the scores."""
        bits = packed(self() > 0.5)
        del self.scores
        self.register_buffer("bits", bits)


def packed(mask: Tensor) -> Tensor:
    """Booleans of any shape -> (n / 8, rounded up) uint8, eight a byte, the first one lowest."""
    flat = mask.flatten().to(torch.uint8)
    eights = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weight = 2 ** torch.arange(8, device=mask.device)  # 1, 2, ..., 128
    return (eights * weight).sum(1).to(torch.uint8)


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `packed` took, as zeros and ones of float32."""
    weight = 2 ** torch.arange(8, device=bits.device)
    eights = (bits[:, None].long() // weight) % 2
    return eights.flatten()[: math.prod(shape)].view(shape).float()


class Shared:
    """Of modules that share a prototype: one holds it as a submodule, so that it is saved once."""

    def share(self, prototype: nn.Module, owner: bool) -> None:
        """Take the prototype; the others keep it in a tuple, which is no submodule."""
        self.shared = (prototype,)
        if owner:
            self.prototype = prototype


class MaskedBottleneck(SublayerAdapter, Shared):
    """h + s (W_up * m_up) f((W_down * m_down) h + b_down) + s b_up.

    prototype: a module with `down` and `up`, both nn.Linear; owner: whether it lies here.
    """

    def __init__(
        self,
        prototype: nn.Module,
        owner: bool,
        keep: float,
        scale: float = 1.0,
        *,
        form: str = "relu",
        frozen: bool = False,
    ):
        super().__init__()
        self.share(prototype, owner)
        self.scale, self.form = scale, FORMS[form]
        self.down_mask = Mask(tuple(prototype.down.weight.shape), keep, frozen)
        self.up_mask = Mask(tuple(prototype.up.weight.shape), keep, frozen)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim), the sublayer's input and output -> (batch, length, dim)."""
        (both,) = self.shared
        down = both.down.weight * self.down_mask().to(h.dtype)
        up = both.up.weight * self.up_mask().to(h.dtype)
        inner = self.form(F.linear(h, down, both.down.bias))  # dim -> rank
        return h + self.scale * F.linear(inner, up, both.up.bias)  # rank -> dim


class MaskedLoRA(WeightAdapter, Shared):
    """W x + (alpha / r) (B * m_B) (A * m_A) x. prototype: a module with `down`, A, and `up`, B."""

    def __init__(
        self,
        base: nn.Module,
        prototype: nn.Module,
        owner: bool,
        keep: float,
        factor: float,
        *,
        frozen: bool = False,
    ):
        super().__init__(base)
        self.share(prototype, owner)
        self.factor = factor
        self.down_mask = Mask(tuple(prototype.down.shape), keep, frozen)
        self.up_mask = Mask(tuple(prototype.up.shape), keep, frozen)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B * m_B (out, r) and A * m_A (r, in)."""
        (both,) = self.shared
        dtype = both.up.dtype
        return both.up * self.up_mask().to(dtype), both.down * self.down_mask().to(dtype)

    def delta(self) -> Tensor:
        """(out, in): the change of the weight."""
        up, down = self.factors()
        return self.factor * (up @ down)

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        up, down = self.factors()
        return self.base(x) + self.factor * F.linear(F.linear(x, down), up)  # in -> r -> out


class MaskedPrefix(Prefix, Shared):
    """Rows P_k * m_k and P_v * m_v.

    prototype: a module with `keys` and `values`, both (length, width).
    """

    def __init__(self, prototype: nn.Module, owner: bool, keep: float, frozen: bool = False):
        Adapter.__init__(self)
        self.share(prototype, owner)
        self.length = len(prototype.keys)
        self.keys_mask = Mask(tuple(prototype.keys.shape), keep, frozen)
        self.values_mask = Mask(tuple(prototype.values.shape), keep, frozen)

    def rows(self) -> tuple[Tensor, Tensor]:
        """P_k and P_v of this block: each (length, width)."""
        (both,) = self.shared
        dtype = both.keys.dtype
        return both.keys * self.keys_mask().to(dtype), both.values * self.values_mask().to(dtype)


def _holding(**parts) -> nn.Module:
    """A module with these parts."""
    holder = nn.Module()
    for name, part in parts.items():
        setattr(holder, name, part)
    return holder


@method
def propelt_adapter_(
    model: nn.Module,
    rank: int = 64,
    keep: float = 0.5,
    scale: float = 1.0,
    form: str = "relu",
    start: str = "bert",
    frozen: bool = False,
) -> None:
    """One serial adapter behind every block's feed-forward layer, with two masks in each.

    The defaults are the authors' on RoBERTa-base: 64 is 768 / 12; they train scores at 3e-3 and the
    prototype at 1e-4. start: as in `Bottleneck`. frozen: with bits in the place of scores.
    """
    weight = anatomy.embedding(model).weight
    down, up = nn.Linear(weight.shape[1], rank), nn.Linear(rank, weight.shape[1])
    start_(start, down, up)
    prototype = _holding(down=down, up=up).to(weight)
    for block in range(len(anatomy.blocks(model))):
        adapter = MaskedBottleneck(prototype, block == 0, keep, scale, form=form, frozen=frozen)
        name = _free(model, block, "mlp")
        sublayers.change_(model, block, "mlp", adapter.to(weight.device), name)


@method
def propelt_lora_(
    model: nn.Module,
    roles: tuple[str, ...] = ("query", "value"),
    rank: int = 32,
    alpha: float = 48,
    keep: float = 0.1,
    frozen: bool = False,
) -> None:
    """One LoRA a role, shared by all blocks, with two masks in each. Starts as the base: B = 0.

    The defaults are the authors' on RoBERTa-base; they train scores at 3e-2 and prototypes at 1e-4.
    Name "query_key_value" for GPT-2. Raises ValueError for a role that the family lacks.
    """
    for role in roles:
        layers = anatomy.projections(model, role)
        prototype = None
        for name, layer in layers.items():
            owner = prototype is None
            if owner:
                prototype = _lora_prototype(layer, rank)
            adapted = MaskedLoRA(layer, prototype, owner, keep, alpha / rank, frozen=frozen)
            anatomy.replace(model, name, adapted.to(layer.weight.device))


def _lora_prototype(layer: nn.Module, rank: int) -> nn.Module:
    """A (r, in), Kaiming uniform, and B (out, r), zero."""
    n_out, n_in = matrix(layer).shape
    down = nn.Parameter(layer.weight.new_empty(rank, n_in))
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return _holding(down=down, up=nn.Parameter(layer.weight.new_zeros(n_out, rank)))


@method
def propelt_prefix_(
    model: nn.Module, length: int = 64, keep: float = 0.1, std: float = 0.02, frozen: bool = False
) -> None:
    """One prefix for the attention of all blocks, with two masks in each.

    Length and share are the authors' on RoBERTa-base. They mask rows that an MLP computes and keep
    a share of keys and values together; here rows train directly and each has its share.
    Raises ValueError for T5, which takes no prefix, and where a prefix is already.
    """
    places, like = _attentions(model), anatomy.embedding(model).weight
    if any(hasattr(model.get_submodule(name), "prefix") for name in places):
        raise ValueError(f"{type(model).__name__} has a prefix already")
    width = next(iter(places.values()))
    rows = [nn.Parameter(std * torch.randn(length, width)) for _ in range(2)]
    prototype = _holding(keys=rows[0], values=rows[1]).to(like)
    for block, name in enumerate(places):
        attention = model.get_submodule(name)
        attention.prefix = MaskedPrefix(prototype, block == 0, keep, frozen).to(like.device)
        attention.register_forward_pre_hook(attention.prefix.look, with_kwargs=True)


def masks(model: nn.Module) -> Iterator[Mask]:
    """Every mask of the model."""
    return (m for m in model.modules() if isinstance(m, Mask))


def freeze_masks_(model: nn.Module) -> None:
    """Keep one bit for each score: the same outputs, and a saved adapter as small as it can be."""
    for mask in masks(model):
        if hasattr(mask, "scores"):
            mask.freeze()
    for place, options in model.peft_methods:
        if place.partition(":")[0] == __name__:
            options["frozen"] = True


def storage_bits(model: nn.Module, width: int = 32) -> dict[str, int]:
    """Bits that the methods of this module must keep, as the paper counts them.

    Keys: prototype (`width` bits a number), masks (one bit an entry), total. The adapter at its
    defaults comes to 0.11 % of RoBERTa-base. What trains is more, since a score is a number and not
    a bit: with the prototype 1.03 %, and 1.50 % with a classification head of two labels.
    """
    shared = {
        id(p): p.numel()
        for a in adapters(model).values()
        if isinstance(a, Shared)
        for p in a.shared[0].parameters()
    }
    bits = {"prototype": width * sum(shared.values())}
    bits["masks"] = sum(math.prod(mask.shape) for mask in masks(model))
    return bits | {"total": sum(bits.values())}
