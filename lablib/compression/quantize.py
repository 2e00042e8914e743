"""Weights in few bits: codes, a scale for each group of neighbours, and where zero lies.

w = scale (code - zero). The schemes differ in how a group's scale and zero follow from its weights;
everything else is shared. Groups run along a weight's input axis, its last one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lablib.kernels import dequant_matmul
from lablib.kernels.dequant_matmul import naive, one_token
from lablib.models import anatomy

TINY = 1e-12  # in the place of a scale of 0: a group of zeros


def symmetric(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels -(2^(b-1) - 1) to 2^(b-1) - 1 times the scale: 0 is one, and one code is not used.

    Also optimum-quanto's of 8 bits, one scale a row.
    """
    most = 2 ** (bits - 1) - 1
    scale = torch.maximum(-low, high) / most
    return scale, torch.full_like(scale[:1, :1], most)


def clipped(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """All 2^b levels, from -2^(b-1) times the scale: the largest weight lies half a level outside.

    torchao's symmetric mapping.
    """
    scale = torch.maximum(-low, high) / ((2**bits - 1) / 2)
    return scale, torch.full_like(scale[:1, :1], 2 ** (bits - 1))


def half_step(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """All 2^b levels, (q + 1/2) times the scale, as many above 0 as below, and 0 is none."""
    most = (2**bits - 1) / 2
    scale = torch.maximum(-low, high) / most
    return scale, torch.full_like(scale[:1, :1], most)


def asymmetric(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """2^b levels from a group's smallest weight to its largest; 0 need not be one.

    Also hqq's without its optimizer and its rounded zeros, and optimum-quanto's of 4 and 2 bits.
    """
    scale = ((high - low) / (2**bits - 1)).clamp_min(TINY)
    return scale, -low / scale


def integer_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """2^b levels over a range that holds 0, and 0 is one of them. torchao's asymmetric mapping."""
    scale = ((high.clamp_min(0) - low.clamp_max(0)) / (2**bits - 1)).clamp_min(TINY)
    return scale, (-low.clamp_max(0) / scale).round()


Scheme = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
SCHEMES: dict[str, Scheme] = {
    "symmetric": symmetric,
    "clipped": clipped,
    "half-step": half_step,
    "asymmetric": asymmetric,
    "integer-zero": integer_zero,
}


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (out, in) in few bits.

    packed: (out, bytes) uint8, as `lablib.kernels.dequant_matmul.naive.pack` lays codes out.
    scale: (out, groups), or (1, 1) for the whole matrix; zero: (out, groups) or (1, 1).
    size: in; group: neighbours that share a scale.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    size: int

    @property
    def codes(self) -> Tensor:
        """(out, in) uint8."""
        return naive.unpack(self.packed, self.bits, self.size)

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        return naive.dequantize(
            self.packed, self._each(self.scale), self.zero, self.bits, self.size, self.group
        )

    def matmul(self, x: Tensor, turned: one_token.LaidOut | None = None) -> Tensor:
        """x (..., in) -> (..., out), by `dequant_matmul`; turned: what `turn` gave."""
        scale = self._each(self.scale)
        return dequant_matmul(x, self.packed, scale, self.zero, self.bits, self.group, turned)

    def turn(self, dtype: torch.dtype = torch.float32) -> one_token.LaidOut:
        """The same once more, as one token of this dtype on CPU reads it fastest."""
        parts = (self.packed, self._each(self.scale), self.zero)
        return one_token.turn(*parts, self.bits, self.size, self.group, dtype)

    def stored_bytes(self) -> int:
        """Of codes, scales and zeros."""
        zeros = self.zero.nbytes if self.zero.numel() > 1 else 0  # else a scheme's constant
        return self.packed.nbytes + self.scale.nbytes + zeros

    def bits_per_weight(self) -> float:
        """All that is stored, for each weight."""
        return 8 * self.stored_bytes() / (len(self.packed) * self.size)

    def _each(self, scale: Tensor) -> Tensor:
        return scale.expand(len(self.packed), -1)


def quantize(
    weight: Tensor,
    bits: int,
    *,
    group: int | str = "row",
    scheme: str = "symmetric",
    scale_dtype: torch.dtype = torch.float16,
    ignore: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> QuantizedWeight:
    """Round a matrix (out, in) to 2^bits levels a group.

    group: neighbours along the input axis that share a scale, or one scale for a "row" or for the
        "tensor"; the last group of a row may be shorter.
    scheme: one of SCHEMES. scale_dtype: that scales and zeros are stored in; codes are chosen for
        the scales as stored.
    ignore: (out, in) bool, weights that a group's range takes no notice of; they are clipped.
    scale, zero: in the place of the scheme's, shapes as `QuantizedWeight`'s.
    Raises ValueError for bits that are not 2 to 8, an unknown scheme, or weights that are not
    finite or not a matrix.
    """
    _check(weight, bits, group, scheme)
    width = weight.shape[1] if isinstance(group, str) else min(group, weight.shape[1])
    given = weight.detach().float()
    if scale is None:
        low, high = _range(given, width, ignore)
        if group == "tensor":
            low, high = low.min().view(1, 1), high.max().view(1, 1)
        scale, zero = SCHEMES[scheme](low, high, bits)
    scale, zero = scale.clamp_min(_least(scale_dtype)).to(scale_dtype), zero.to(scale_dtype)
    groups = -(-weight.shape[1] // width)
    each = torch.arange(weight.shape[1], device=weight.device) // width
    by = scale.float().expand(len(weight), groups)[:, each]
    off = zero.float().expand(len(weight), groups)[:, each]
    most = 2**bits - (2 if scheme == "symmetric" else 1)
    codes = (given / by + off).round().clamp(0, most).to(torch.uint8)
    return QuantizedWeight(naive.pack(codes, bits), scale, zero, bits, width, weight.shape[1])


def _check(weight: Tensor, bits: int, group: int | str, scheme: str) -> None:
    if bits not in naive.PLANES:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is none of {', '.join(SCHEMES)}")
    if not (group in ("row", "tensor") if isinstance(group, str) else group > 0):
        raise ValueError(f"group {group!r} is neither 'row', 'tensor' nor a number above 0")
    if weight.ndim != 2:
        raise ValueError(f"a weight has two axes, not the shape {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError("a weight is not finite: it has no code")


def _least(dtype: torch.dtype) -> float:
    """A scale that the dtype can hold, and that one can divide by."""
    return max(TINY, torch.finfo(dtype).tiny)


def _range(weight: Tensor, width: int, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group: (out, groups) each."""
    short = -weight.shape[1] % width
    lows, highs = weight, weight
    if ignore is not None:
        lows, highs = weight.masked_fill(ignore, math.inf), weight.masked_fill(ignore, -math.inf)
    low = nn.functional.pad(lows, (0, short), value=math.inf).unflatten(1, (-1, width)).amin(2)
    high = nn.functional.pad(highs, (0, short), value=-math.inf).unflatten(1, (-1, width)).amax(2)
    empty = low > high  # all of them ignored
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight stays in few bits; gradients reach its input alone.

    On CPU the first token that comes alone, as in writing, has the codes laid out a second time;
    that copy is kept in memory and in no file.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None):
        super().__init__()
        self.bits, self.group = weight.bits, weight.group
        self.in_features, self.out_features = weight.size, len(weight.packed)
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._turned: dict[torch.dtype, one_token.LaidOut] = {}

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight that this layer multiplies with."""
        parts = (self.packed, self.scale, self.zero)
        return QuantizedWeight(*parts, self.bits, self.group, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if x.dtype not in self._turned and one_token.fits(x):
            self._turned[x.dtype] = self.quantized.turn(x.dtype)
        out = self.quantized.matmul(x, self._turned.get(x.dtype))
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, *args, **kwargs):
        self._turned = {}  # buffers move, or change
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._turned = {}
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """What print shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"


def quantize_(model: nn.Module, bits: int, *roles: str, **options) -> list[str]:
    """Put a `QuantizedLinear` in the place of each of a model's projections; returns their names.

    roles: as `anatomy.projections` names them, none for all; options: as `quantize` takes them.
    Raises ValueError for a projection that is not nn.Linear: one that is quantized, too.
    """
    found = _linears(model, *roles)
    for name, layer in found.items():
        small = QuantizedLinear(quantize(layer.weight, bits, **options), layer.bias)
        anatomy.replace(model, name, small)
    return list(found)


def _linears(model: nn.Module, *roles: str) -> dict[str, nn.Linear]:
    found = anatomy.projections(model, *roles)
    for name, layer in found.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is {type(layer).__name__}, not nn.Linear")
    return found


def matrices(model: nn.Module, *roles: str) -> dict[str, Tensor]:
    """Name -> weight (out, in) of every projection, and (experts, out, in) of a mixture's experts.

    What `rounded` rounds. Experts are found where a block's feed-forward layer has weights of
    three axes; they count as the roles "gate", "up" and "down".
    """
    found = {f"{name}.weight": layer.weight for name, layer in _linears(model, *roles).items()}
    if not roles or set(roles) & {"gate", "up", "down"}:
        for name, weight in model.named_parameters():
            if weight.ndim == 3:
                found[name] = weight
    return found


@contextlib.contextmanager
def rounded(
    model: nn.Module, round_weight: Callable[[str, Tensor], Tensor], *roles: str
) -> Iterator[None]:
    """Within it, a model computes with other weights; afterwards with its own, to the bit.

    round_weight: (name, weight (out, in)) -> the weight to compute with, called once for each
        matrix of `matrices`, experts one by one: `lambda _, w: quantize(w, 4).dequantize()`.
    """
    weights = matrices(model, *roles)
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                for part in weight if weight.ndim == 3 else (weight,):
                    part.copy_(round_weight(name, part))
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def stored_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, those that are shared counted once."""
    seen: Mapping[int, Tensor] = {
        part.data_ptr(): part for part in [*model.parameters(), *model.buffers()] if part.numel()
    }
    return sum(part.nbytes for part in seen.values())
