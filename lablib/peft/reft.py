"""ReFT (Wu et al., 2024): edit the residual stream at a few positions, and no weight at all.

LoReFT    h <- h + R^T (W h + b - R h)      R h, what h has in a subspace of rank r, becomes W h + b
DiReFT    h <- h + R^T (W h + b)            without the difference

after a block, with R (r, d) of orthonormal rows, W (r, d), b (r), the same ones at all positions of
a block. DiReFT is the class of this name in the authors' code, which keeps R orthonormal too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.models.hooks import drop_hooks_
from lablib.peft.adapter import Adapter, method
from lablib.peft.prefix import _by_name, _seen

STARTS = ("random", "base")


class ReFT(Adapter):
    """h + R^T (W h + b - R h) at the first and the last positions, of what a block gives.

    first, last: how many positions; everywhere: all of them instead. direct: DiReFT.
    start: "random" as in the paper, R orthonormal and W, b as those of nn.Linear, which is not the
        base's function; "base" has W = R (zero in DiReFT) and b = 0, which is, within rounding.
    Under a key-value cache the last positions are those of the call that finds the cache empty, as
    in the authors' generation, which edits the prompt alone; a prompt given in pieces has those of
    its first piece edited. At all positions a cache changes nothing.
    Padding counts as text, since nothing here knows a mask: the last positions are padding where a
    row is padded on the right, the first where on the left. Give texts of one length, edit the
    other end, or all positions.
    Raises ValueError for a rank above dim, another start, or no position.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 8,
        first: int = 7,
        last: int = 7,
        *,
        everywhere: bool = False,
        direct: bool = False,
        start: str = "random",
    ):
        super().__init__()
        if not 0 < rank <= dim:
            raise ValueError(f"rank {rank} is not 1 to {dim}")
        if start not in STARTS:
            raise ValueError(f"{start!r} is none of {', '.join(STARTS)}")
        if not (everywhere or first > 0 or last > 0):
            raise ValueError("no position is edited: first and last are both 0")
        self.first, self.last, self.everywhere = first, last, everywhere
        self.direct = direct
        self.free = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, dim)))  # spans R's rows
        self.target = nn.Linear(dim, rank)  # W, b
        if start == "base":
            self.target.bias.data.zero_()
            self.target.weight.data.copy_(0 * self.free if direct else self.rows())

    def rows(self) -> Tensor:
        """R: (rank, dim), orthonormal rows, float32 or more; gradients reach `free` through QR."""
        q, triangle = torch.linalg.qr(
            self.free.T.to(torch.promote_types(torch.float32, self.dtype))
        )
        return (q * triangle.diagonal().sign()).T  # free^T = Q U, made unique by a diagonal U > 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.free.dtype

    def edit(self, h: Tensor) -> Tensor:
        """h: (..., dim) -> (..., dim), edited."""
        r = self.rows().to(h.dtype)
        change = self.target(h)  # W h + b: dim -> rank
        if not self.direct:
            change = change - F.linear(h, r)  # - R h
        return h + change @ r  # h + R^T (...): rank -> dim

    def places(self, length: int, seen: int = 0) -> Tensor:
        """(length,) bool: which positions of a call are edited, with `seen` in the cache before."""
        position = torch.arange(seen, seen + length)
        last = (position >= length - self.last) & (seen == 0)
        return last | (position < self.first)

    def put(self, module: nn.Module, args: tuple, kwargs: dict, h: Tensor) -> Tensor | None:
        """After the block: h (batch, length, dim), edited."""
        if not self.enabled:
            return None
        if self.everywhere:
            return self.edit(h)
        given = _by_name(module, args, kwargs)
        cache = given.get("cache", given.get("past_key_values"))
        before = max(_seen(cache) - h.shape[1], 0)  # this block has put its keys there by now
        places = self.places(h.shape[1], before).to(h.device)
        if not places.any():
            return None
        edited = h.clone()
        edited[:, places] = self.edit(h[:, places])
        return edited

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete it, and the hook that edits."""
        drop_hooks_(model, self)
        place, _, last = name.rpartition(".")
        delattr(model.get_submodule(place), last)


@method
def reft_(
    model: nn.Module,
    rank: int = 8,
    first: int = 7,
    last: int = 7,
    everywhere: bool = False,
    blocks: Sequence[int] | None = None,
    direct: bool = False,
    start: str = "random",
) -> None:
    """Put a `ReFT` after each of the blocks, of all for None.

    Rank 8 and seven positions at each end of all blocks are the authors' command for commonsense
    and arithmetic; theirs for GLUE on RoBERTa has rank 1 and the first position. Separate
    parameters for the first and the last positions, an option of theirs, are not offered.
    Raises ValueError where one is already, and for T5, whose blocks return more than h.
    """
    if anatomy.family(model).name.startswith("T5"):
        raise ValueError("T5's blocks return more than their hidden states: no ReFT here")
    weight, found = anatomy.embedding(model).weight, anatomy.blocks(model)
    for i in range(len(found)) if blocks is None else blocks:
        if hasattr(found[i], "reft"):
            raise ValueError(f"block {i} has a ReFT already")
        reft = ReFT(
            weight.shape[1], rank, first, last, everywhere=everywhere, direct=direct, start=start
        )
        found[i].reft = reft.to(weight)
        found[i].register_forward_hook(reft.put, with_kwargs=True)
