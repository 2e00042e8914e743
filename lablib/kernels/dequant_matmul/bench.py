"""What `dequant_matmul` is timed on, beside torch's and torchao's own weight-only products."""

import torch
from torch import Tensor

from lablib.kernels import dequant_matmul
from lablib.kernels.cases import Case, compiled, naive
from lablib.kernels.dequant_matmul import one_token
from lablib.resources import Way

SIZE, GROUP = 4096, 64  # a projection too large for the cache, as a whole model is


def ways(bits: int, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Way]:
    """Forward of each way on the same codes."""
    torch.manual_seed(0)
    group = SIZE if bits == 8 else GROUP  # torch's own int8 has one scale a row
    x = torch.randn(tokens, SIZE, device=device, dtype=dtype)
    codes = torch.randint(2**bits, (SIZE, SIZE), device=device)
    scale = torch.rand(SIZE, SIZE // group, device=device) / SIZE**0.5
    zero = torch.full((1, 1), 2.0 ** (bits - 1), device=device)
    definition = naive("dequant_matmul")
    packed = definition.pack(codes, bits)
    plain = definition.dequant_matmul
    fast = compiled(plain)
    weight = definition.dequantize(packed, scale, zero, bits, SIZE, group).to(dtype)
    small = packed, scale, zero, bits
    turned = one_token.turn(*small, SIZE, group, dtype) if one_token.fits(x) else None
    tiles = {"ours, in tiles": lambda: dequant_matmul(x, *small, group)} if turned else {}
    return {
        "ours": lambda: dequant_matmul(x, *small, group, turned),
        **tiles,
        _wide(dtype): lambda: x @ weight.t(),
        "naive": lambda: plain(x, packed, scale, zero, bits, group),
        "torch.compile of naive": lambda: fast(x, packed, scale, zero, bits, group),
        **_torchs(x, codes, scale, bits),
        **_torchaos(x, weight, bits, group),
    }


def _wide(dtype: torch.dtype) -> str:
    """The way that reads the weight as it was."""
    return f"{str(dtype).removeprefix('torch.')} matmul"


def _torchs(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> dict[str, Way]:
    """torch's weight-only products, in bfloat16 (what they are written for) and in x's dtype."""
    found = {}
    for dtype in dict.fromkeys((x.dtype, torch.bfloat16)):
        given, name = x.to(dtype), f"torch int{bits}, {str(dtype).removeprefix('torch.')}"
        if bits == 8:
            signed, by = (codes - 128).to(torch.int8), scale[:, 0].to(dtype)
            found[name] = lambda g=given, s=signed, b=by: torch._weight_int8pack_mm(g, s, b)
        elif bits == 4 and x.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
            both = torch.stack([scale, 0 * scale], -1).transpose(0, 1).contiguous().to(dtype)
            found[name] = lambda g=given, p=packed, b=both: (
                torch.ops.aten._weight_int4pack_mm_for_cpu(g, p, GROUP, b)
            )
    return found


def _torchaos(x: Tensor, weight: Tensor, bits: int, group: int) -> dict[str, Way]:
    """torchao's module, quantized by itself; not run where it is not installed."""

    def make():
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

        layer = torch.nn.Linear(*weight.shape[::-1], bias=False, device=x.device, dtype=x.dtype)
        layer.weight.data.copy_(weight)
        granularity = PerAxis(0) if bits == 8 else PerGroup(group)
        quantize_(layer, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity))
        return layer

    layers: list = []

    @torch.no_grad()
    def run():
        if not layers:
            layers.append(make())
        return layers[0](x)

    return {"torchao, weight only": run}


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    """1, 16 and 512 tokens through one projection; moved: codes and scales, or the weight."""
    found = []
    for bits in (8, 4):
        for tokens in (1, 16, 512):
            given = ways(bits, tokens, device, dtype)
            scales = 4 * SIZE * (1 if bits == 8 else SIZE // GROUP)
            stored = SIZE * SIZE * bits // 8 + scales
            size = f"{SIZE} to {SIZE}, {stored / 1e6:.1f} MB stored"
            title = f"dequant_matmul, {bits} bits, {tokens} tokens, {size}, forward"
            options = {"flops": 2 * tokens * SIZE**2, "moved": stored, "repeats": 11}
            wide = {_wide(dtype): SIZE * SIZE * dtype.itemsize}
            found.append(Case(title, given, **options, other_moved=wide))
    return found
