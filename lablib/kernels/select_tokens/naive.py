"""The definition of `select_tokens` and `merge_tokens`."""

from torch import Tensor


def select_tokens(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """x (tokens, d), mask (tokens,) bool -> rows (kept, d), index (kept,)."""
    return x[mask], mask.nonzero().squeeze(1)


def merge_tokens(x: Tensor, rows: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """x (tokens, d), rows (kept, d), index (kept,), weight (kept,) -> (tokens, d)."""
    if weight is not None:
        rows = rows * weight[:, None]
    return x.index_add(0, index, rows)
