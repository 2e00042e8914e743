"""Learning to Skip for Language Modeling (Zeng et al., 2023): SkipLayer.

Lab 301. A binary router in front of every layer decides, token by token, whether the layer runs.
With x a token's state, f the layer and G in {0, 1} the router's choice,

    y = G(x) f(x) + (1 - G(x)) x.

A choice has no gradient, so training draws it by straight-through Gumbel-softmax. Running always
would be easiest, so each layer pays 0.1 (density - target)^2, density being the share of tokens
that run it. At inference kept rows alone are computed: `lablib.experts.compaction`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.compaction import Rotary, run_kept
from lablib.experts.routing import LeavesLoss
from lablib.models import anatomy
from lablib.models.flops import block_flops, head_flops
from lablib.models.gpt import GPT, Attention, Block, GPTConfig, KVCache
from lablib.modes import kept_modes


class SkipRouter(nn.Module):
    """The paper's router: two logits a token, "skip" and "run", without bias, in float32.

    temperature: of the Gumbel-softmax. threshold: at inference a token runs the layer when its
    margin, logit of run minus logit of skip, is above it; 0 is the paper's larger logit.
    std: of the matrix at the start, a choice of ours. A large one makes the first choices depend on
    the token more than on the draw; with 0.02, small models trained briefly stay near random.
    """

    def __init__(self, dim: int, temperature: float = 1.0, std: float = 0.5):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(2, dim))
        self.temperature = temperature
        self.register_buffer("threshold", torch.tensor(0.0))

    def forward(self, normed: Tensor, x: Tensor) -> Tensor:
        """normed, x: (batch, length, dim), the state after the block's norm and before.

        Returns the gate G: (batch, length) float32, ones and zeros; in training with the gradient
        of the soft choice.
        """
        logits = self.logits(normed)  # (batch, length, 2)
        if self.training:
            return F.gumbel_softmax(logits, self.temperature, hard=True)[..., 1]
        return (logits[..., 1] - logits[..., 0] > self.threshold).float()

    def logits(self, normed: Tensor) -> Tensor:
        """(..., dim) -> (..., 2) float32, whatever the model's dtype."""
        with torch.autocast(normed.device.type, enabled=False):
            return normed.float() @ self.weight.float().t()


class SkipBlock(LeavesLoss):
    """A block of `GPT` that each token runs or skips: `model.blocks[i] = SkipBlock(block, ...)`.

    router: (normed states, states) -> gate, as `SkipRouter`.
    target, weight: training leaves weight * (density - target)^2 in `auxiliary_loss`, which `fit`
    adds. No target, no loss.
    compact: when kept rows alone are computed, and skipped ones cost no more than keys and values.
        "inference": in training all rows are, as the equation has it, so that a skipped token, too,
        tells its router what the layer would have done. "always": training is as cheap, but that
        gradient is dropped; the router of a skipped token learns from the density term alone.
        "never": all rows are computed, to compare with.
    `ran`: (batch, length) bool, which tokens ran the block in the last call.
    Raises TypeError when the block's attention is not `models.gpt.Attention`, ValueError for
    another compact or a target outside [0, 1].
    """

    def __init__(
        self,
        block: Block,
        router: nn.Module,
        *,
        target: float | None = None,
        weight: float = 0.1,
        compact: str = "inference",
    ):
        super().__init__()
        if not isinstance(getattr(block, "attention", None), Attention):
            raise TypeError(
                f"{type(block).__name__} has no models.gpt.Attention whose queries can be skipped; "
                "lablib.models.from_hf makes a GPT of a Llama-family model of transformers"
            )
        if compact not in ("inference", "always", "never"):
            raise ValueError(f"compact {compact!r} is none of 'inference', 'always', 'never'")
        self.block, self.router = block, router
        self.target = None if target is None else checked_density(target)
        self.weight, self.compact = weight, compact
        self.ran: Tensor | None = None

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None = None) -> Tensor:
        """x: (batch, length, dim) -> (batch, length, dim)."""
        normed = self.block.attention_norm(x)
        gate = self.choose(normed, x)  # G(x): (batch, length)
        self.ran = gate.detach() > 0.5
        if self.training and self.target is not None:
            self.auxiliary_loss = self.weight * (gate.mean() - self.target).square()
        if self.compact == "always" or (self.compact == "inference" and not self.training):
            return run_kept(self.block, x, normed, gate, rotary, cache)
        # y = G(x) f(x) + (1 - G(x)) x
        gate = gate[..., None].to(x.dtype)  # (batch, length, 1)
        return gate * self.block(x, rotary, cache) + (1 - gate) * x

    def choose(self, normed: Tensor, x: Tensor) -> Tensor:
        """Which tokens run the block: (batch, length), as the router says."""
        return self.router(normed, x)


class RandomRouter(nn.Module):
    """The baseline that skips blindly: each token runs the layer with probability `density`.

    Draws from torch's global generator, in training and at inference.
    Raises ValueError for a density outside [0, 1].
    """

    def __init__(self, density: float):
        super().__init__()
        self.density = checked_density(density)

    def forward(self, normed: Tensor, x: Tensor) -> Tensor:
        """normed, x: (batch, length, dim) -> gate (batch, length) float32, without a gradient."""
        return (torch.rand(x.shape[:-1], device=x.device) < self.density).float()


def checked_density(density: float) -> float:
    """The density, a share of tokens or layers; ValueError when it is outside [0, 1] or NaN."""
    if not 0 <= density <= 1:
        raise ValueError(f"density {density} is the share of tokens that run a layer: 0 to 1")
    return density


def add_routers(
    model: GPT,
    density: float,
    *,
    weight: float = 0.1,
    temperature: float = 1.0,
    std: float = 0.5,
    compact: str = "inference",
) -> GPT:
    """Put a learned router before every block, in place; returns the model.

    density: the target of each layer. weight: of the density term; 0.1 is the paper's.
    temperature, std: as in `SkipRouter`; compact: as in `SkipBlock`.
    Raises ValueError, and leaves the model as it was, for a density outside [0, 1] or a model that
    has routers.
    """
    dim, options = model.config.dim, {"weight": weight, "compact": compact}
    return _put(model, lambda: SkipRouter(dim, temperature, std), target=density, **options)


def add_random_routers(model: GPT, density: float, *, compact: str = "inference") -> GPT:
    """Put a `RandomRouter` before every block, in place; returns the model.

    Raises ValueError, and leaves the model as it was, for a density outside [0, 1] or a model that
    has routers.
    """
    return _put(model, lambda: RandomRouter(density), compact=compact)


def _put(model: GPT, router: Callable[[], nn.Module], **options) -> GPT:
    refuse_routers(model)
    blocks = anatomy.blocks(model)
    for place, skip in enumerate([SkipBlock(block, router(), **options) for block in blocks]):
        blocks[place] = skip
    return model


def refuse_routers(model: GPT) -> None:
    """Raises ValueError when a block of the model has a router already."""
    if any(isinstance(block, SkipBlock) for block in anatomy.blocks(model)):
        raise ValueError("the model has routers already: start from one without")


def layers_run(model: GPT) -> Tensor:
    """How many layers each token ran in the last call: (batch, length) float32.

    Blocks without a router always run.
    """
    blocks = anatomy.blocks(model)
    runs = [block.ran.float() for block in blocks if isinstance(block, SkipBlock)]
    return len(blocks) - len(runs) + torch.stack(runs).sum(0)


def measured_density(model: GPT) -> float:
    """The share of layers that tokens ran in the last call, from 0 to 1."""
    return layers_run(model).mean().item() / len(anatomy.blocks(model))


def set_density(model: GPT, density: float) -> None:
    """Give all random routers one density. Raises ValueError when it is outside [0, 1]."""
    checked_density(density)
    for module in model.modules():
        if isinstance(module, RandomRouter):
            module.density = density


def set_threshold(model: GPT, threshold: float) -> None:
    """Give all routers one threshold; the higher it is, the more tokens skip."""
    for router in _with_threshold(model):
        router.threshold.fill_(threshold)


def _with_threshold(model: GPT) -> list[nn.Module]:
    routers = [block.router for block in anatomy.blocks(model) if isinstance(block, SkipBlock)]
    return [router for router in routers if hasattr(router, "threshold")]


WIDEST = 1000.0  # no router's margin is as far from 0


@torch.no_grad()
def calibrate(model: GPT, tokens: Tensor, target: float, tolerance: float = 2e-3) -> float:
    """Find, by bisection, the threshold at which tokens run `target` of the layers; set it.

    tokens: (batch, length) text to measure on. tolerance: how far off the density may be.
    The paper takes threshold 0 and whatever density that gives; this makes densities equal, so
    that losses can be compared. Warns when no threshold comes as near as tolerance, because tokens
    that are alike go together.
    Raises ValueError, and leaves the thresholds as they were, for a target outside [0, 1] or one
    that no threshold reaches.
    """
    checked_density(target)

    def density_at(threshold: float) -> float:
        set_threshold(model, threshold)
        model.hidden_states(tokens)
        return measured_density(model)

    routers = _with_threshold(model)
    before = [router.threshold.item() for router in routers]
    with kept_modes(model):
        model.eval()
        most, least = density_at(-WIDEST), density_at(WIDEST)
        if not least - tolerance <= target <= most + tolerance:
            for router, threshold in zip(routers, before):
                router.threshold.fill_(threshold)
            raise ValueError(
                f"density {target} is out of reach: thresholds give {least:.3f} to {most:.3f}"
            )
        threshold, off = _bisect(density_at, target, tolerance)
        density_at(threshold)
    if off > tolerance:
        warnings.warn(f"the nearest density to {target} is {off:.3f} off", stacklevel=3)
    return threshold


def _bisect(
    density_at: Callable[[float], float], target: float, tolerance: float
) -> tuple[float, float]:
    """The best threshold that was tried, and how far off its density is."""
    low, high, best = -1.0, 1.0, (0.0, float("inf"))
    while low > -WIDEST and density_at(low) < target:
        low *= 2
    while high < WIDEST and density_at(high) > target:
        high *= 2
    for _ in range(40):
        threshold = (low + high) / 2
        off = density_at(threshold) - target
        if abs(off) < best[1]:
            best = threshold, abs(off)
        if abs(off) <= tolerance:
            break
        low, high = (threshold, high) if off > 0 else (low, threshold)
    return best


def skipping_flops(config: GPTConfig, length: int, density: float) -> float:
    """Forward FLOPs a token of a routed model, averaged over a text of `length`.

    Keys and values are made for every token; queries, scores, output and the feed-forward layer
    for the share `density`; each layer's router costs 4 dim.
    """
    block = block_flops(config, length)
    layer = block.keys_values + checked_density(density) * block.rest + 4 * config.dim
    return config.n_layers * layer + head_flops(config)


def matching_density(config: GPTConfig, length: int, flops: float) -> float:
    """The density at which the routed model of `config` costs `flops` a token.

    Raises ValueError when none does: its keys, values and routers alone cost more, or running
    every layer costs less.
    """
    least, most = (skipping_flops(config, length, share) for share in (0.0, 1.0))
    if not least < flops <= most:
        raise ValueError(f"{flops:,.0f} FLOPs a token are not within {least:,.0f} to {most:,.0f}")
    return (flops - least) / (most - least)
