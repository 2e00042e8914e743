"""Products with weights that are stored in few bits, and never dequantized as a whole.

At one token a product is as slow as reading the weight, so fewer bits are less time; at hundreds of
tokens arithmetic is what takes time, and unpacking is extra. On CPU one token has a way of its own,
`one_token`, for which codes are laid out a second time.
"""

import torch
from torch import Tensor

from lablib.kernels.autocast import cast
from lablib.kernels.dequant_matmul import naive, one_token
from lablib.kernels.derivatives import forward_mode

TILE = 2**19  # weights dequantized at once on CPU: fewer, and calls cost more than cache misses


def dequant_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group: int,
    turned: one_token.LaidOut | None = None,
) -> Tensor:
    """Multiply x with W^T, W = scale (code - zero) in groups along its input axis.

    x: (..., in) floating; packed: (out, bytes) uint8, codes of `bits` bits each as
    `naive.pack` lays them out; scale: (out, groups); zero: (out or 1, groups or 1), any real
    numbers; groups = in / group, the last may be shorter. turned: the same weight as
    `one_token.turn` lays it out for x's dtype, read where `one_token.fits`.
    Returns (..., out) in x's dtype, differentiable in x alone. Follows autocast as nn.Linear does.
    Raises ValueError when bits are not 2 to 8, shapes do not fit, or a gradient of scales is asked.
    """
    _check(x, packed, scale, zero, bits, group)
    (x,) = cast(x)
    flat = x.reshape(-1, x.shape[-1])
    if forward_mode():
        out = naive.dequant_matmul(flat, packed, scale, zero, bits, group)
    elif turned is not None and one_token.fits(flat, turned):
        out = one_token.product(flat, turned, group)
    else:
        out = _product(flat, packed, scale, zero, bits, group)
    return out.view(*x.shape[:-1], len(packed))


def _check(x, packed, scale, zero, bits, group) -> None:
    if bits not in naive.PLANES:
        raise ValueError(f"codes have 2 to 8 bits, not {bits}")
    size, rows = x.shape[-1], len(packed)
    if packed.dtype != torch.uint8 or packed.shape != (rows, naive.packed_size(size, bits)):
        raise ValueError(
            f"packed {tuple(packed.shape)} {packed.dtype} is not (out, "
            f"{naive.packed_size(size, bits)}) uint8, as {size} inputs in {bits} bits need"
        )
    groups = -(-size // group) if group > 0 else 0
    if scale.shape != (rows, groups) or any(
        have not in (1, need) for have, need in zip(zero.shape, (rows, groups), strict=True)
    ):
        raise ValueError(
            f"scale {tuple(scale.shape)} and zero {tuple(zero.shape)} do not fit ({rows}, {groups})"
        )
    if scale.requires_grad or zero.requires_grad:
        raise ValueError("dequant_matmul gives no gradient of scales and zeros: detach them")


def _codes(packed: Tensor, bits: int, size: int, buffer: Tensor) -> Tensor:
    """Codes (rows, size) uint8, eight bytes at a time where their number allows it."""
    if bits == 8:
        return packed
    if len(naive.PLANES[bits]) > 1 or packed.shape[1] % 8 or not packed.is_contiguous():
        return naive.unpack(packed, bits, size)
    words, mask = packed.view(torch.int64), (2**bits - 1) * 0x0101010101010101
    parts = buffer[: len(packed)].view(torch.int64).view(len(packed), 8 // bits, -1)
    for place, part in enumerate(parts.unbind(1)):
        torch.bitwise_right_shift(words, bits * place, out=part).bitwise_and_(mask)
    return buffer[: len(packed), :size]


def _tiles(packed: Tensor, scale: Tensor, bits: int, size: int, group: int):
    """(rows, their scale * code in float32), TILE weights at once in one buffer for all.

    What zeros take off is a product of its own, and one scale a row is left to the output.
    """
    most = min(max(1, TILE // max(1, size)), len(packed))
    buffer = torch.empty(most, packed.shape[1] * 8 // bits, dtype=torch.uint8)
    weights = torch.empty(most, size)
    whole = size // group * group  # inputs in full groups
    for start in range(0, len(packed), most):
        rows = slice(start, min(start + most, len(packed)))
        weight = weights[: rows.stop - start].copy_(_codes(packed[rows], bits, size, buffer))
        by = scale[rows]
        if by.shape[1] == 1:
            yield rows, weight
            continue
        weight[:, :whole].unflatten(1, (-1, group)).mul_(by[:, : whole // group, None])
        if whole < size:
            weight[:, whole:] *= by[:, -1:]
        yield rows, weight


def _group_sums(x: Tensor, group: int) -> Tensor:
    """(tokens, in) -> (tokens, groups)."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group))
    return padded.unflatten(1, (-1, group)).sum(2)


@torch.library.custom_op("lablib::dequant_matmul", mutates_args=(), device_types="cpu")
def _product(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int
) -> Tensor:
    # x W^T = x (s code)^T - (sums of x over groups) (s zero)^T
    wide, by = x.float(), scale.float()
    out = wide.new_zeros(len(x), len(packed))
    for part, weight in _tiles(packed, by, bits, x.shape[1], group):
        if len(wide) == 1:  # a tenth of the time that a product of two matrices takes
            torch.mv(weight, wide[0], out=out[0, part])
        else:
            torch.mm(wide, weight.t(), out=out[:, part])
    if by.shape[1] == 1:
        out *= by[:, 0]
    out -= _group_sums(wide, group) @ (by * zero).t()
    return out.to(x.dtype)


@torch.library.custom_op("lablib::dequant_matmul_backward", mutates_args=(), device_types="cpu")
def _product_backward(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, size: int, group: int
) -> Tensor:
    wide, by = grad.float(), scale.float()
    out = -(wide @ (by * zero)).repeat_interleave(group, 1)[:, :size]
    wide = wide * by[:, 0] if by.shape[1] == 1 else wide
    for part, weight in _tiles(packed, by, bits, size, group):
        out += wide[:, part] @ weight
    return out.to(grad.dtype)


@_product.register_kernel("cuda")
def _(x, packed, scale, zero, bits, group):
    from lablib.kernels.dequant_matmul.triton import product

    if len(naive.PLANES[bits]) > 1:
        return naive.dequant_matmul(x, packed, scale, zero, bits, group)
    return product(x, packed, scale, zero, bits, group)


@_product_backward.register_kernel("cuda")
def _(grad, packed, scale, zero, bits, size, group):
    return grad @ naive.dequantize(packed, scale, zero, bits, size, group).to(grad.dtype)


@_product.register_fake
def _(x, packed, scale, zero, bits, group):
    return x.new_empty(x.shape[0], packed.shape[0])


@_product_backward.register_fake
def _(grad, packed, scale, zero, bits, size, group):
    return grad.new_empty(grad.shape[0], size)


def _keep(ctx, inputs, output):
    x, *weight, ctx.bits, ctx.group = inputs
    ctx.size = x.shape[1]
    ctx.save_for_backward(*weight)


def _gradients(ctx, grad):
    by_x = _product_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.size, ctx.group)
    return by_x, None, None, None, None, None


_product.register_autograd(_gradients, setup_context=_keep)


def _keep_backward(ctx, inputs, output):
    _, *weight, ctx.bits, _, ctx.group = inputs
    ctx.save_for_backward(*weight)


def _gradients_of_backward(ctx, grad):
    by_grad = _product(grad, *ctx.saved_tensors, ctx.bits, ctx.group)
    return by_grad, None, None, None, None, None, None


# The backward pass is linear in its gradient, so that second derivatives exist, too.
_product_backward.register_autograd(_gradients_of_backward, setup_context=_keep_backward)
