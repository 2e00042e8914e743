"""`python -m lablib bench kernels`: each op against its definition, plain and compiled, and peers.

What is compared takes turns, in a new order each round, so that neither a busy machine nor what ran
just before favors one of them; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.hub import from_hf_switch
from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.kernels import grouped_linear, linear_cross_entropy, merge_tokens, route, select_tokens
from lablib.models import GPTConfig, SwiGLU
from lablib.resources import Way, measure, peak_memory


@dataclass
class Case:
    """One table, our way first. flops, moved (bytes): of one run, for the share of limits."""

    title: str
    ways: dict[str, Way]
    flops: float = 0.0
    moved: float = 0.0


def _naive(op: str):
    return import_module(f"lablib.kernels.{op}.naive")


def _compiled(function: Callable) -> Callable:
    """torch.compile of the definition, compiled for the shapes that it meets."""
    return torch.compile(function, dynamic=False)


def _step(function: Callable, *leaves: Tensor) -> Way:
    """Forward and backward of the output's sum of squares."""

    def run():
        for leaf in leaves:
            leaf.grad = None
        out = function(*leaves)
        (out * out).sum().backward()
        return out.detach()

    return run


def _show(case: Case, limits: dict[str, float], repeats: int) -> dict[str, float | str]:
    """Median seconds of each way, printed; a way that fails gives its error's name."""
    found: dict[str, float | str] = {}
    for key, way in case.ways.items():
        try:
            way()  # the first run of each is not timed
        except Exception as error:  # a peer that is not there or a compiler that fails
            found[key] = f"not run: {type(error).__name__}"
    ways = [(key, way) for key, way in case.ways.items() if key not in found]
    rounds = [measure(dict(random.sample(ways, len(ways))), 1) for _ in range(repeats)]
    times = {key: [seconds[key][0] for seconds in rounds] for key, _ in ways}
    print(f"\n{case.title}")
    ours = times[next(iter(case.ways))]
    for key in case.ways:
        if key in found:
            print(f"  {key:36} {found[key]}")
            continue
        seconds = found[key] = statistics.median(times[key])
        ratio = statistics.median(time / own for time, own in zip(times[key], ours))
        parts = [f"  {key:36} {1e3 * seconds:9.2f} ms  {ratio:5.2f} x ours"]
        if case.flops:
            parts.append(f"{case.flops / seconds / limits['flops']:5.0%} of peak FLOP/s")
        if case.moved:
            parts.append(f"{case.moved / seconds / limits['bandwidth']:5.0%} of bandwidth")
        print("  ".join(parts), flush=True)
    return found


def machine_limits(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of one large matrix product and bytes a second of one large copy, both measured."""
    size = 1536 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = statistics.median(measure({"": lambda: a @ a})[""])
    b = torch.randn(2**24 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(b)
    copy = statistics.median(measure({"": lambda: target.copy_(b)})[""])
    return {"flops": 2 * size**3 / product, "bandwidth": 2 * b.nbytes / copy}


def select_cases(device: str, dtype: torch.dtype) -> list[Case]:
    x = torch.randn(4096, 512, device=device, dtype=dtype, requires_grad=True)
    mask = torch.rand(4096, device=device) < 0.5
    naive = _naive("select_tokens")

    def both(ops):
        def run(x):
            rows, index = ops[0](x, mask)
            return ops[1](x, rows, index)

        return run

    ours = both((select_tokens, merge_tokens))
    plain = both((naive.select_tokens, naive.merge_tokens))
    ways = {"ours": ours, "naive": plain, "torch.compile of naive": _compiled(plain)}
    return [
        Case(
            "select_tokens and merge_tokens, 4,096 tokens, d 512, half kept, forward and backward",
            {key: _step(way, x) for key, way in ways.items()},
            moved=8 * x.nbytes,
        ),
        skip_case(device, dtype),
    ]


def skip_case(device: str, dtype: torch.dtype) -> Case:
    """What skipping half the tokens of a layer leaves of its cost."""
    layer = SwiGLU(GPTConfig(dim=512, n_heads=8, ffn_dim=1376)).to(device, dtype)
    x = torch.randn(4096, 512, device=device, dtype=dtype, requires_grad=True)
    mask = torch.arange(4096, device=device) % 2 == 0

    def skip(x):
        rows, index = select_tokens(x, mask)
        return merge_tokens(x, layer(rows), index)

    return Case(
        "feed-forward layer at 4,096 tokens, d 512: half the tokens skipped, and all computed",
        {"half skipped": _step(skip, x), "all computed": _step(lambda x: x + layer(x), x)},
    )


def route_cases(device: str, dtype: torch.dtype) -> list[Case]:
    logits = torch.randn(4096, 64, device=device)
    naive = _naive("route").route
    ways = {
        "ours": lambda: route(logits, 8),
        "naive": lambda: naive(logits, 8),
        "torch.compile of naive": lambda: compiled(logits, 8),
    }
    compiled = _compiled(naive)
    return [Case("route, 4,096 tokens, 64 experts, top 8, forward", ways)]


def grouped_cases(device: str, dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(0)
    counts = torch.rand(4096, 64).topk(8).indices.flatten().bincount(minlength=64).to(device)
    x = torch.randn(4096 * 8, 256, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(64, 256, 256, device=device, dtype=dtype, requires_grad=True)
    naive = _naive("grouped_linear").grouped_linear
    compiled = _compiled(naive)
    offsets = counts.cumsum(0).to(torch.int32)

    def torch_grouped(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)

    ways = {
        "ours": lambda x, w: grouped_linear(x, w, counts),
        "naive": lambda x, w: naive(x, w, counts),
        "torch.compile of naive": lambda x, w: compiled(x, w, counts),
        f"torch {torch.__version__} grouped_mm": torch_grouped,
    }
    steps = {key: _step(way, x, weight) for key, way in ways.items()}
    title = "grouped_linear, 32,768 rows in 64 uneven groups, 256 to 256, forward and backward"
    return [Case(title, steps, flops=6 * x.shape[0] * 256 * 256)]


def moe_cases(device: str, dtype: torch.dtype) -> list[Case]:
    """The MoE layer against transformers' blocks and against the definition."""
    version = importlib.metadata.version("transformers")
    found = []
    for name, build in {"OLMoE": _olmoe, "Switch": _switch}.items():
        title, theirs, ours, flops = build(device, dtype)
        dim = ours.router.weight.shape[1]
        x = torch.randn(4, 1024, dim, device=device, dtype=dtype, requires_grad=True)
        ways = {"ours": ours, "naive": _Naive(ours), f"transformers {version} {name}": theirs}
        steps = {key: _layer_step(way, x) for key, way in ways.items()}
        outputs = {key: step() for key, step in steps.items()}
        gap = max((out - outputs["ours"]).abs().max().item() for out in outputs.values())
        found.append(Case(f"{title}, forward and backward; outputs within {gap:.1e}", steps, flops))
    return found


def _layer_step(layer: nn.Module, x: Tensor) -> Way:
    def run():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        out = layer(x)
        (out * out).sum().backward()
        return out.detach()

    return run


class _Naive(nn.Module):
    """The MoE layer put together from the ops' definitions, on ours's parameters."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, flat = self.layer, x.flatten(0, 1)
        probs, experts, counts, order = _naive("route").route(layer.router(flat), layer.top_k)
        weight = probs.gather(1, experts).flatten()[order]
        up, down = layer.experts.parameters()
        activation = "swiglu" if up.shape[1] == 2 * down.shape[2] else "relu"
        arguments = flat, order // layer.top_k, weight, up, down, counts, activation
        return _naive("moe_mlp").moe_mlp(*arguments).view(x.shape)


def _olmoe(device, dtype):
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    sizes = {"hidden_size": 256, "intermediate_size": 128}
    config = OlmoeConfig(**sizes, num_experts=64, num_experts_per_tok=8)
    theirs = _random(OlmoeSparseMoeBlock(config)).to(device, dtype)
    ours = MoE(256, SwiGLUExperts(64, 256, 128), 64, top_k=8).to(device, dtype)
    ours.router.weight.data.copy_(theirs.gate.weight)
    ours.experts.gate_up.data.copy_(theirs.experts.gate_up_proj)
    ours.experts.down.data.copy_(theirs.experts.down_proj)
    title = "MoE, 4,096 tokens, 64 experts, top 8, d 256, width 128"
    return title, theirs, ours, 4096 * 8 * 3 * 6 * 256 * 128


def _switch(device, dtype):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    config = SwitchTransformersConfig(
        d_model=512, d_ff=2048, num_experts=8, expert_capacity=4096, dropout_rate=0.0
    )
    theirs = _random(switch.SwitchTransformersSparseMLP(config)).eval().to(device, dtype)
    ours = from_hf_switch(theirs)
    title = "MoE, 4,096 tokens, 8 experts, top 1, d 512, width 2,048"
    return title, theirs, ours, 4096 * 2 * 6 * 512 * 2048


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    return module


def _loss_inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(8192, 512, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(50304, 512, device=device) / 512**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(50304, (8192,), device=device)


def _loss_ways(device: str, dtype: torch.dtype) -> dict[str, Way]:
    hidden, weight, target = _loss_inputs(device, dtype)
    ways = {"ours": linear_cross_entropy, "logits, then loss": _naive_loss}
    if device == "cuda":
        ways["torch.compile of naive"] = _compiled(_naive_loss)
        ways["liger-kernel"] = _liger
    return {
        key: _step(lambda h, w, way=way: way(h, w, target), hidden, weight)
        for key, way in ways.items()
    }


def _naive_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _naive("linear_cross_entropy").linear_cross_entropy(hidden, weight, target)


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)


def loss_cases(device: str, dtype: torch.dtype) -> list[Case]:
    title = "linear_cross_entropy, 8,192 tokens, d 512, vocabulary 50,304, forward and backward"
    return [Case(title, _loss_ways(device, dtype), flops=3 * 2 * 8192 * 512 * 50304)]


def _peak(way: str, device: str, dtype: torch.dtype) -> int:
    """Bytes that one run of a way adds at its peak; in a process of its own on CPU."""
    run = _loss_ways(device, dtype)[way]
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


def loss_memory(device: str, dtype: torch.dtype) -> dict[str, int]:
    """Peak bytes of `linear_cross_entropy` and of logits-then-loss, printed as a ratio."""
    found = {}
    for way in ("ours", "logits, then loss"):
        if device == "cuda":
            found[way] = _peak(way, device, dtype)
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[way] = pool.apply(_peak, (way, device, dtype))
    for way, size in found.items():
        print(f"  peak memory, {way:23} {size / 2**20:9.0f} MiB {size / found['ours']:5.2f} x ours")
    return found


def bench_kernels(repeats: int = 41) -> dict[str, dict[str, float | str]]:
    """Time every op on this machine's device and print ratios; returns title -> way -> seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    limits = machine_limits(device, dtype)
    print(
        f"{device} ({name}), {str(dtype).removeprefix('torch.')}, torch {torch.__version__}: "
        f"{limits['flops'] / 1e9:,.0f} GFLOP/s, {limits['bandwidth'] / 1e9:,.1f} GB/s"
    )
    found = {}
    for cases in (select_cases, route_cases, grouped_cases, moe_cases):
        for case in cases(device, dtype):
            found[case.title] = _show(case, limits, repeats)
    for case in loss_cases(device, dtype):
        found[case.title] = _show(case, limits, min(repeats, 3))
        found["peak memory in bytes"] = loss_memory(device, dtype)
    if device == "cpu":
        print("\non a GPU: not run (there is none here)")
    return found
