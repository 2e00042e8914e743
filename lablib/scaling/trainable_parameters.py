"""Is the Number of Trainable Parameters All That Actually Matters? (Chatelain et al., 2021).

Lab 409. Two ways to make a model look larger than what is trained of it: `dope_` adds frozen random
parts, `structured_` puts fast transforms in the place of dense matrices, which then stand for far
more numbers than they hold. Then how such models are counted, and the dense law against each count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lablib.models import GPT, anatomy


class HDHD(nn.Module):
    """y = H D1 H D2 x: two trained diagonals between fast Hadamard transforms.

    x is padded with zeros to n, a power of 2; as many such products as needed lie below each other,
    and what is beyond out_features is cut off: 2 n numbers each, for n^2 of a dense matrix.
    """

    def __init__(self, in_features: int, out_features: int, std: float = 1.0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        n = 2 ** math.ceil(math.log2(in_features))
        self.diagonals = nn.Parameter(torch.empty(math.ceil(out_features / n), 2, n))
        # Each of the two diagonals has the root of the wanted variance: outputs then have it.
        self.diagonals.data.normal_(0.0, math.sqrt(std * math.sqrt(in_features)))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.diagonals.unbind(1)  # D1, D2: (products, n) each
        x = nn.functional.pad(x, (0, first.shape[-1] - self.in_features))  # (..., n)
        y = hadamard(second * x.unsqueeze(-2))  # (..., products, n): H D2 x
        y = hadamard(first * y)  # H D1 H D2 x
        return y.flatten(-2)[..., : self.out_features]


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of the last dimension, in n log n additions.

    H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2). Raises ValueError unless n is a power of 2.
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"a Hadamard transform needs a power of 2, not {n}")
    half, shape = 1, x.shape
    while half < n:
        pairs = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), -2).reshape(shape)
        half *= 2
    return x / math.sqrt(n)


class Circulant(nn.Module):
    """y = C x, where each row of C is the one above, moved on by one: a convolution, by FFT.

    Square products lie below each other, as many as needed: n numbers for n^2.
    """

    def __init__(self, in_features: int, out_features: int, std: float = 1.0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        products = math.ceil(out_features / in_features)
        self.column = nn.Parameter(torch.empty(products, in_features).normal_(0.0, std))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.column) * torch.fft.rfft(x).unsqueeze(-2)
        y = torch.fft.irfft(spectrum, n=self.in_features)  # (..., products, in)
        return y.flatten(-2)[..., : self.out_features]


class Monarch(nn.Module):
    """y = P B2 P' B1 x: two block-diagonal matrices and fixed permutations between them.

    blocks: of each; in_features must be divisible by its square. Source: Dao et al. (2022).
    """

    def __init__(self, in_features: int, out_features: int, std: float = 1.0, blocks: int = 4):
        super().__init__()
        if in_features % blocks**2 or out_features % blocks:
            raise ValueError(
                f"{out_features} x {in_features} has no Monarch form of {blocks} blocks"
            )
        self.in_features, self.out_features = in_features, out_features
        width = in_features // blocks
        self.first = nn.Parameter(torch.empty(blocks, width, width))  # B1
        self.second = nn.Parameter(torch.empty(blocks, out_features // blocks, width))  # B2
        # A product of two sums of `width` terms each: the variance of a dense layer's sum.
        each = math.sqrt(std * math.sqrt(in_features) / width)
        self.first.data.normal_(0.0, each)
        self.second.data.normal_(0.0, each)

    def forward(self, x: Tensor) -> Tensor:
        blocks, width, _ = self.first.shape
        x = x.unflatten(-1, (blocks, width))  # (..., blocks, width)
        inner = torch.einsum("kqp,...kp->...kq", self.first, x)  # B1, within blocks
        inner = inner.flatten(-2).unflatten(-1, (width, blocks)).transpose(-1, -2)  # across them
        outer = torch.einsum("lsr,...lr->...sl", self.second, inner)  # B2, and back
        return outer.flatten(-2)


KINDS = {"hadamard": HDHD, "circulant": Circulant, "monarch": Monarch}
FEED_FORWARD = ("gate", "up", "down")


def structured_(
    model: nn.Module, kind: str, roles: Sequence[str] = FEED_FORWARD, **options
) -> nn.Module:
    """Structured layers, new ones, in the place of dense ones without bias, in place.

    kind: "hadamard", "circulant" or "monarch". Each begins with outputs as large as the dense
    layer's. roles: as in `lablib.models.anatomy`. Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    for name, layer in anatomy.projections(model, *roles).items():
        std = float(layer.weight.detach().std())
        anatomy.replace(
            model, name, KINDS[kind](layer.in_features, layer.out_features, std, **options)
        )
    return model


class Doped(nn.Module):
    """A trained layer and frozen units beside it: their outputs add up."""

    def __init__(self, trained: nn.Module, frozen: nn.Module):
        super().__init__()
        self.trained, self.frozen = trained, frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(x) + self.frozen(x)


def dope_(model: GPT, share: float, where: str = "blocks") -> GPT:
    """Add frozen random parts, so that `share` of all blocks, or units, are frozen, in place.

    where: "blocks" puts frozen blocks between the trained ones; "units" puts frozen units beside
    the trained ones of each feed-forward layer. Weights are drawn as the model's own were.
    Raises ValueError for another place, or a share that is no whole number of blocks.
    """
    if not share:
        return model
    if where == "units":
        times = share / (1 - share)
        for block in model.blocks:
            block.mlp = Doped(block.mlp, fresh_units(model, round(times * model.config.ffn_dim)))
        return model
    if where != "blocks":
        raise ValueError(f"where {where!r} is neither 'blocks' nor 'units'")
    trained = len(model.blocks)
    frozen = share * trained / (1 - share)
    if abs(frozen - round(frozen)) > 1e-6:
        raise ValueError(f"{share:.0%} of all blocks frozen asks for {frozen:.2f} beside {trained}")
    places = np.linspace(0, trained, round(frozen), endpoint=False).astype(int)
    blocks = fresh_blocks(model, len(places))
    mixed = []
    for place, block in enumerate(model.blocks):
        mixed += [block, *(b for b, at in zip(blocks, places) if at == place)]
    model.blocks = nn.ModuleList(mixed)
    return model


def fresh_blocks(model: GPT, n: int) -> list[nn.Module]:
    """Blocks as the model's, newly drawn and frozen."""
    return list(GPT(replace(model.config, n_layers=n)).blocks.requires_grad_(False))


def fresh_units(model: GPT, width: int) -> nn.Module:
    """A feed-forward layer of another width, drawn as the model's own."""
    return GPT(replace(model.config, ffn_dim=width)).blocks[0].mlp


def freeze_(model: nn.Module, blocks: Sequence[int]) -> nn.Module:
    """Freeze some of a model's own blocks as they were drawn, in place."""
    for place in blocks:
        anatomy.blocks(model)[place].requires_grad_(False)
    return model


class Counts(NamedTuple):
    """Parameters of the blocks: trained ones, and all, a structured layer as what it stands for."""

    trainable: int
    total: int


def counts(model: nn.Module) -> Counts:
    """Embedding and head are left out, as in Kaplan et al. (2020)."""
    trained = total = 0
    for block in anatomy.blocks(model):
        trained += sum(p.numel() for p in block.parameters() if p.requires_grad)
        for module in block.modules():
            if isinstance(module, tuple(KINDS.values())):
                total += module.in_features * module.out_features
            else:
                total += sum(p.numel() for p in module.parameters(recurse=False))
    return Counts(trained, total)


def training_flops(count: Counts, tokens: float) -> float:
    """4 N_total + 2 N_trainable a token: frozen weights pass gradients on, and get none.

    Forward 2 a weight, backward 2 to what came in and 2 to the weight itself. Of dense layers.
    """
    return (4.0 * count.total + 2.0 * count.trainable) * tokens


def forward_flops(layer: nn.Module) -> float:
    """FLOPs of a layer's own weights for one token, a multiplication or an addition each.

    A Hadamard transform takes n log2 n additions. A real FFT of n is counted as 5/2 n log2 n, half
    of the customary 5 n log2 n of a complex one; the spectrum of a circulant's own column is needed
    once a step, not once a token, and is left out.
    """
    if isinstance(layer, HDHD):
        products, _, n = layer.diagonals.shape
        return products * (2.0 * n * math.log2(n) + 2 * n)
    if isinstance(layer, Circulant):
        products, n = layer.column.shape
        each = 6 * (n // 2 + 1)  # complex products, 6 FLOPs each
        return 2.5 * n * math.log2(n) * (1 + products) + products * each
    return 2.0 * sum(p.numel() for p in layer.parameters(recurse=False))


def flops_of_a_token(model: nn.Module) -> float:
    """Training FLOPs of a token, blocks alone: `training_flops`, structured layers as they run.

    A pass back to what came in costs as much as a pass forward, and one to the weights, where they
    are trained, as much again.
    """
    total = 0.0
    for block in anatomy.blocks(model):
        for layer in block.modules():
            trained = any(p.requires_grad for p in layer.parameters(recurse=False))
            total += (3 if trained else 2) * forward_flops(layer)
    return total


def dense(layer: nn.Module) -> Tensor:
    """The matrix that a structured layer stands for: (out_features, in_features)."""
    some = next(layer.parameters())
    return layer(torch.eye(layer.in_features, dtype=some.dtype, device=some.device)).T


@torch.no_grad()
def nearest_monarch(weight: Tensor, blocks: int) -> Monarch:
    """The Monarch matrix nearest to a dense one, in the Frobenius norm.

    weight: (out, in). In the order of the two permutations a Monarch matrix is made of blocks^2
    pieces of low rank, so each piece's truncated singular value decomposition is the best.
    """
    out, width = weight.shape[0] // blocks, weight.shape[1] // blocks
    made = Monarch(weight.shape[1], weight.shape[0], blocks=blocks).to(weight)
    rank = width // blocks
    # pieces[l, k]: the rows s blocks + l, the columns of block k
    pieces = weight.view(out, blocks, blocks, width).permute(1, 2, 0, 3)  # (l, k, out, width)
    u, s, v = torch.linalg.svd(pieces.float(), full_matrices=False)
    root = s[..., :rank].sqrt()  # (l, k, rank)
    left, right = u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * v[..., :rank, :]
    # What block k hands to block l are its outputs q = r' blocks + l.
    made.first.copy_(right.permute(1, 2, 0, 3).reshape(blocks, width, width))  # (k, (rank l), p)
    made.second.copy_(left.permute(0, 2, 1, 3).reshape(blocks, out, width))  # (l, s, (k rank))
    return made
