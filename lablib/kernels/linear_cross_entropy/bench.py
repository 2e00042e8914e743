"""What `linear_cross_entropy` is timed on, and the memory that it takes."""

import multiprocessing

import torch
from torch import Tensor

from lablib.kernels import linear_cross_entropy
from lablib.kernels.cases import Case, compiled, naive, step
from lablib.resources import Way, peak_memory


def inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (8192, 512), weight (50304, 512), target (8192,)."""
    torch.manual_seed(0)
    hidden = torch.randn(8192, 512, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(50304, 512, device=device) / 512**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(50304, (8192,), device=device)


def ways(device: str, dtype: torch.dtype) -> dict[str, Way]:
    """Forward and backward of each way; the compiled ones on CUDA alone."""
    hidden, weight, target = inputs(device, dtype)
    plain = naive("linear_cross_entropy").linear_cross_entropy
    named = {"ours": linear_cross_entropy, "logits, then loss": plain}
    if device == "cuda":
        named["torch.compile of naive"] = compiled(plain)
        named["liger-kernel"] = _liger
    return {
        key: step(lambda h, w, way=way: way(h, w, target), hidden, weight)
        for key, way in named.items()
    }


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)


def cases(device: str, dtype: torch.dtype) -> list[Case]:
    """The head of a model with GPT-2's vocabulary."""
    title = "linear_cross_entropy, 8,192 tokens, d 512, vocabulary 50,304, forward and backward"
    return [Case(title, ways(device, dtype), flops=3 * 2 * 8192 * 512 * 50304, repeats=3)]


def memory(device: str, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that one run of a way adds at its peak; on CPU each in a process of its own."""
    names = ("ours", "logits, then loss")
    if device == "cuda":
        return {way: peak(way, device, dtype) for way in names}
    sizes = {}
    for way in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sizes[way] = pool.apply(peak, (way, device, dtype))
    return sizes


def peak(way: str, device: str, dtype: torch.dtype) -> int:
    """Bytes that one run of a way adds to this process, or to the GPU, at its peak."""
    run = ways(device, dtype)[way]
    if device == "cuda":
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    torch.zeros(64, 64).requires_grad_().matmul(torch.zeros(64, 64)).sum().backward()
    before = peak_memory()
    run()
    return peak_memory() - before
