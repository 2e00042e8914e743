"""Compiles every Triton kernel for GPUs that this machine need not have; argument: T4, H100, ...

The ops' own functions are called on CPU tensors, with shapes that the compiler takes apart (an
argument of 1 becomes a constant); each launch compiles its kernel for the GPU and runs nothing.
Prints one line a kernel: its name and how often it was compiled.
"""

import sys
from collections import Counter

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lablib.kernels.dequant_matmul import naive
from lablib.kernels.dequant_matmul import triton as dequant_matmul
from lablib.kernels.grouped_linear import triton as grouped_linear
from lablib.kernels.linear_cross_entropy import triton as linear_cross_entropy
from lablib.kernels.route import triton as route
from lablib.kernels.select_tokens import triton as select_tokens

CAPABILITY = {"T4": 75, "A100": 80, "H100": 90}


class Elsewhere:
    """A driver for a GPU that is not there: enough of one to compile, and nothing to launch."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_each(dtype: torch.dtype) -> None:
    """Launch every kernel in this dtype; ints of 1 and multiples of 16 are specialized on."""
    for bits, group in ((8, 64), (4, 32), (2, 64), (4, 24)):
        for tokens in (1, 5, 70):
            packed = naive.pack(torch.zeros(24, 96, dtype=torch.int64), bits)
            scale = torch.ones(24, 96 // group + (96 % group > 0))
            x = torch.zeros(tokens, 96, dtype=dtype)
            dequant_matmul.product(x, packed, scale, torch.zeros(1, 1), bits, group)
    for d in (1, 24, 128):
        counts = torch.tensor([3, 0, 5])
        x, weight = torch.zeros(8, d, dtype=dtype), torch.zeros(3, 32, d, dtype=dtype)
        grouped_linear.product(x, weight, counts)
        grouped_linear.outer(torch.zeros(8, 32, dtype=dtype), x, counts)
        mask = torch.arange(8) % 2 == 0
        rows, index = select_tokens.select_tokens(x, mask)
        for of_each in (None, torch.ones(len(index), dtype=dtype)):
            select_tokens.merge_tokens(x, rows, index * 0, of_each)
    for vocabulary in (11, 4096):
        for gradient in (False, True):
            logits = torch.zeros(3, vocabulary, dtype=dtype)
            labels = torch.zeros(3, dtype=torch.int64)
            linear_cross_entropy.rows(logits, labels, 1.0, -100, gradient)
    for n_experts, top_k in ((1, 1), (16, 4)):
        # The order that `_sort` would have written is never read here.
        route.route(torch.zeros(5, n_experts, dtype=dtype), top_k)


def main(gpu: str) -> None:
    """Compile for one GPU. Raises what the compiler raises."""
    seen: Counter = Counter()
    driver.set_active(Elsewhere(CAPABILITY[gpu]))

    def compiled_alone(kernel: JITFunction, grid):
        def launch(*arguments, **options):
            seen[f"{kernel.fn.__module__}.{kernel.fn.__name__}"] += 1
            return kernel.run(*arguments, grid=grid, warmup=True, **options)

        return launch

    JITFunction.__getitem__ = compiled_alone
    kinds = [torch.float32, torch.float16] + [torch.bfloat16] * (CAPABILITY[gpu] >= 80)
    for dtype in kinds:
        compile_each(dtype)
    print(*(f"{name} {count}" for name, count in sorted(seen.items())), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
