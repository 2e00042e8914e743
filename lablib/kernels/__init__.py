"""Operations that plain PyTorch does slowly or with too much memory, forward and backward.

One op, one folder: `naive.py` is the definition, `triton.py` the fast path on CUDA, and the
folder's `__init__.py` the public function with its CPU path. All are registered with
`torch.library`, so autograd, autocast and torch.compile see them. Forward-mode derivatives, and
second derivatives that a fast path does not have, are those of the definition.
"""

# Imported at once: a folder and its function share their name, and the function must win.
from lablib.kernels.dequant_matmul import dequant_matmul
from lablib.kernels.grouped_linear import grouped_linear
from lablib.kernels.linear_cross_entropy import linear_cross_entropy
from lablib.kernels.moe_mlp import moe_mlp
from lablib.kernels.route import Routing, route
from lablib.kernels.select_tokens import merge_tokens, select_tokens

__all__ = [
    "Routing",
    "dequant_matmul",
    "grouped_linear",
    "linear_cross_entropy",
    "merge_tokens",
    "moe_mlp",
    "route",
    "select_tokens",
]
