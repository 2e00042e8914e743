"""Learning to Skip for Language Modeling (Zeng et al., 2023): SkipLayer.

Lab 301. A binary router in front of every layer decides, token by token, whether the layer runs.
With x a token's state, f the layer and G in {0, 1} the router's choice,

    y = G(x) f(x) + (1 - G(x)) x.

The router reads the normed state through a d -> 2 matrix; training draws the choice by
straight-through Gumbel-softmax, inference takes the larger logit. A term 0.1 (density - target)^2 a
layer holds the share of tokens that run it near a target. A token that skips a layer still gives it
keys and values, so the tokens that run it attend to the whole text, and a cache misses nothing.

Only kept rows are computed, in training too. So the language-model loss reaches the router through
kept tokens alone; tokens that skip a layer move its router through the density term. With
`compact=False` every row is computed, and skipped ones give their straight-through gradient, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.kernels import merge_tokens, select_tokens
from lablib.models import anatomy
from lablib.models.gpt import GPT, Attention, Block, GPTConfig, KVCache, rotary_table, rotate
from lablib.resources import measure

Rotary = tuple[Tensor, Tensor]


class Choice(NamedTuple):
    """What a router decided for tokens of shape (...).

    mask: (...) bool, true where the layer runs. gate: (...) float32, the same choice as 0 or 1,
    with the soft one's gradient; None where there is none.
    """

    mask: Tensor
    gate: Tensor | None = None


class Router(nn.Module):
    """The paper's router: two logits a token, "skip" and "run", without bias, in float32.

    temperature: of the Gumbel-softmax. threshold: at inference a token runs the layer when its
    margin, logit of run minus logit of skip, is above it; 0 is the paper's larger logit.
    std: of the matrix at the start, a choice of ours. A large one makes the first choices depend on
    the token more than on the draw; with 0.02, small models trained briefly stay near random.
    """

    def __init__(self, dim: int, temperature: float = 1.0, std: float = 0.5):
        super().__init__()
        self.weight = nn.Parameter(std * torch.randn(2, dim))
        self.temperature, self.threshold = temperature, 0.0

    def logits(self, normed: Tensor) -> Tensor:
        """(..., dim) -> (..., 2) float32, whatever the model's dtype."""
        with torch.autocast(normed.device.type, enabled=False):
            return normed.float() @ self.weight.float().T

    def forward(self, normed: Tensor, x: Tensor) -> Choice:
        logits = self.logits(normed)
        if not self.training:
            return Choice(logits[..., 1] - logits[..., 0] > self.threshold)
        gate = F.gumbel_softmax(logits, self.temperature, hard=True)[..., 1]
        return Choice(gate > 0.5, gate)


class RandomRouter(nn.Module):
    """The baseline that skips blindly: each token runs the layer with probability `density`.

    Draws from torch's global generator, in training and at inference.
    """

    def __init__(self, density: float):
        super().__init__()
        self.density = density

    def forward(self, normed: Tensor, x: Tensor) -> Choice:
        return Choice(torch.rand(x.shape[:-1], device=x.device) < self.density)


class ConfidenceRouter(nn.Module):
    """Early exit by confidence: a token stops once its next token is predicted clearly enough.

    norm, head: the model's own; they read the state before each layer. Confidence is the gap
    between the two largest probabilities, and the token runs on while 1 - gap is above `threshold`.
    Source: CALM (Schuster et al., 2022), its softmax response.
    """

    def __init__(self, norm: nn.Module, head: nn.Module):
        super().__init__()
        # Borrowed, not owned: as submodules they would be counted and saved once a layer.
        self.__dict__.update(norm=norm, head=head)
        self.threshold = 0.0

    def forward(self, normed: Tensor, x: Tensor) -> Choice:
        first, second = self.head(self.norm(x)).float().softmax(-1).topk(2).values.unbind(-1)
        return Choice(1 - (first - second) > self.threshold)


class SkipBlock(nn.Module):
    """A block of `GPT` that each token runs or skips: `model.blocks[i] = SkipBlock(block, ...)`.

    router: (normed states, states) -> Choice. mlp_router: a second one for the feed-forward layer;
    `router` then decides on attention alone.
    target, weight: training leaves weight * (density - target)^2 in `auxiliary_loss`, which `fit`
    adds. No target, no loss.
    after: the block before, for early exit: a token that skipped that one skips this one, too.
    compact: compute kept rows alone. False computes all rows and multiplies by the gate: the same
    output, and skipped tokens give their router a gradient, too.
    `choices`: those of the last call, one, or two with an mlp_router.
    Raises TypeError when the block's attention is not `models.gpt.Attention`.
    """

    def __init__(
        self,
        block: Block,
        router: nn.Module,
        mlp_router: nn.Module | None = None,
        *,
        target: float | None = None,
        weight: float = 0.1,
        after: SkipBlock | None = None,
        compact: bool = True,
    ):
        super().__init__()
        if not isinstance(getattr(block, "attention", None), Attention):
            raise TypeError(
                f"{type(block).__name__} has no models.gpt.Attention whose queries can be skipped; "
                "lablib.models.from_hf makes a GPT of a Llama-family model of transformers"
            )
        self.block, self.router, self.mlp_router = block, router, mlp_router
        self.target, self.weight, self.compact = target, weight, compact
        self.__dict__["after"] = after  # the model owns it already
        self.choices: list[Choice] = []
        self.auxiliary_loss: Tensor | None = None

    def __getstate__(self) -> dict:
        # What the last call left belongs to its graph, which can't be copied or pickled.
        return self.__dict__ | {"choices": [], "auxiliary_loss": None}

    def forward(self, x: Tensor, rotary: Rotary, cache: KVCache | None = None) -> Tensor:
        """x: (batch, length, dim) -> (batch, length, dim)."""
        block, normed = self.block, self.block.attention_norm(x)
        choice = self._choose(self.router, normed, x)
        keys, values = keys_and_values(block.attention, normed, rotary, cache)

        def attend(mask: Tensor, index: Tensor) -> Tensor:
            return attend_kept(block.attention, normed, mask, index, rotary, keys, values)

        if self.mlp_router is None:
            self._note(choice)
            return self._update(choice, x, lambda rows, *kept: _block(block, rows, attend(*kept)))
        x = self._update(choice, x, lambda rows, *kept: attend(*kept))
        second = self._choose(self.mlp_router, block.mlp_norm(x), x)
        self._note(choice, second)
        return self._update(second, x, lambda rows, *_: block.mlp(block.mlp_norm(rows)))

    def _choose(self, router: nn.Module, normed: Tensor, x: Tensor) -> Choice:
        mask, gate = router(normed, x)
        if self.after is not None:
            before = self.after.choices[-1]
            mask = mask & before.mask
            gate = gate if before.gate is None or gate is None else gate * before.gate
        return Choice(mask, gate)

    def _note(self, *choices: Choice) -> None:
        self.choices = list(choices)
        if self.training and self.target is not None:
            density = torch.stack([choice.gate.mean() for choice in choices])
            self.auxiliary_loss = self.weight * (density - self.target).square().mean()

    def _update(self, choice: Choice, x: Tensor, update: Callable[..., Tensor]) -> Tensor:
        """x + gate * update(rows, mask, index), where update sees the kept rows alone."""
        mask, gate = choice
        if not self.compact:
            gate = mask.float() if gate is None else gate
            mask = torch.ones_like(mask)
        rows, index = select_tokens(x, mask)
        if not len(index):
            return x
        weight = None if gate is None else gate.flatten()[index]
        rows = update(rows, mask, index).to(x.dtype)  # autocast's products are in bfloat16
        return merge_tokens(x, rows, index, weight)


def _block(block: Block, rows: Tensor, attended: Tensor) -> Tensor:
    """What a whole block adds to its kept rows: f(x) - x."""
    return attended + block.mlp(block.mlp_norm(rows + attended))


def keys_and_values(
    attention: Attention, normed: Tensor, rotary: Rotary, cache: KVCache | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of all tokens, skipped or not, after those in the cache.

    normed: (batch, length, dim). Returns two (batch, heads, seen, head_dim).
    """
    shape = *normed.shape[:2], -1, attention.head_dim
    keys = rotate(attention.key_norm(attention.key(normed).view(shape)).transpose(1, 2), *rotary)
    values = attention.value(normed).view(shape).transpose(1, 2)
    return (keys, values) if cache is None else cache.append(keys, values)


def attend_kept(
    attention: Attention,
    normed: Tensor,
    mask: Tensor,
    index: Tensor,
    rotary: Rotary,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Causal attention for the kept tokens' queries, over everybody's keys: (kept, dim).

    normed: (batch, length, dim); mask: (batch, length); index: (kept,), where the mask holds.
    Rows of a batch keep different numbers, so queries are padded to the largest of them.
    """
    batch, length = mask.shape
    row, position = index // length, index % length
    q = attention.query(normed.flatten(0, 1)[index]).unflatten(-1, (-1, attention.head_dim))
    q = rotate(attention.query_norm(q), *(table[position, None] for table in rotary))
    slot = mask.cumsum(1)[row, position] - 1
    width = int(slot.max()) + 1
    padded = q.new_zeros(batch, width, *q.shape[1:]).index_put((row, slot), q)
    # A query sees its own position and all before it, those in the cache included.
    last = index.new_zeros(batch, width).index_put((row, slot), keys.shape[2] - length + position)
    seen = torch.arange(keys.shape[2], device=index.device) <= last[:, None, :, None]
    y = F.scaled_dot_product_attention(
        padded.transpose(1, 2),
        keys,
        values,
        attn_mask=None if length == 1 else seen,
        enable_gqa=attention.n_heads != attention.n_kv_heads,
    )
    return attention.output(y.transpose(1, 2)[row, slot].flatten(1))


def masked_logits(model: GPT, tokens: Tensor) -> Tensor:
    """What a model of `SkipBlock`s computes, by the equation as it stands: nothing is gathered.

    Every row runs every layer, and G multiplies. From one seed, routers that draw make the draws
    of the model's own call. tokens: (batch, length) int64. Returns (batch, length, vocab).
    Raises ValueError for blocks with a second router or with early exit.
    """
    x = model.embedding(tokens)
    rotary = rotary_table(model.config, 0, tokens.shape[1], x)
    for skip in model.blocks:
        if skip.mlp_router is not None or skip.after is not None:
            raise ValueError("masked_logits takes blocks with one router and without early exit")
        mask, gate = skip.router(skip.block.attention_norm(x), x)
        # A skipped row is never computed, so its gate gets no gradient.
        gate = (mask if gate is None else mask * gate)[..., None].to(x.dtype)
        x = gate * skip.block(x, rotary) + (1 - gate) * x
    return model.head(model.norm(x))


def add_routers(
    model: GPT,
    density: float,
    *,
    weight: float = 0.1,
    temperature: float = 1.0,
    apart: bool = False,
    exits: bool = False,
    compact: bool = True,
) -> GPT:
    """Put a learned router before every block, in place; returns the model.

    density: the target of each layer. weight: of the density term; 0.1 is the paper's.
    apart: a router for attention and one for the feed-forward layer. exits: early exit with the
    same router: a token that skips a layer skips all later ones.
    Raises ValueError for a density outside (0, 1], or for exits of parts.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is the share of tokens that run a layer: 0 to 1")
    if apart and exits:
        raise ValueError("a token exits after a whole layer: exits and apart exclude each other")
    blocks, before = anatomy.blocks(model), None
    for place, block in enumerate(blocks):
        dim = model.config.dim
        routers = [Router(dim, temperature) for _ in range(1 + apart)]
        options = {"target": density, "weight": weight, "compact": compact}
        blocks[place] = SkipBlock(block, *routers, **options, after=before if exits else None)
        before = blocks[place]
    return model


def add_random_routers(model: GPT, density: float) -> GPT:
    """Put a `RandomRouter` before every block, in place; returns the model."""
    blocks = anatomy.blocks(model)
    for place, block in enumerate(blocks):
        blocks[place] = SkipBlock(block, RandomRouter(density))
    return model


def add_confidence_exits(model: GPT) -> GPT:
    """Let tokens leave after any block once they are confident, in place; returns the model.

    For models trained with `early_exit_loss`. Every token runs the first block.
    """
    blocks, before = anatomy.blocks(model), None
    for place in range(1, len(blocks)):
        router = ConfidenceRouter(anatomy.final_norm(model), anatomy.head(model))
        before = blocks[place] = SkipBlock(blocks[place], router, after=before)
    return model


def early_exit_loss(model: GPT, tokens: Tensor) -> Tensor:
    """Next-token loss of every layer's state through the one head, later layers weighing more.

    tokens: (batch, length + 1). Layer i of L has weight i / (1 + ... + L).
    Source: CALM (Schuster et al., 2022), its average over layers.
    """
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: states.append(output))
        for block in anatomy.blocks(model)
    ]
    try:
        model.hidden_states(tokens[:, :-1])
    finally:
        for hook in hooks:
            hook.remove()
    target, total = tokens[:, 1:].flatten(), 0.0
    for depth, state in enumerate(states, start=1):
        logits = model.head(model.norm(state)).flatten(0, 1)
        total = total + depth * F.cross_entropy(logits, target)
    return total / (len(states) * (len(states) + 1) / 2)


def layers_run(model: GPT) -> Tensor:
    """How many layers each token ran in the last call: (batch, length) float32.

    Half a layer for attention or feed-forward layer alone. Blocks without a router always run.
    """
    plain, runs = 0, []
    for block in anatomy.blocks(model):
        if isinstance(block, SkipBlock):
            runs += [choice.mask.float() / len(block.choices) for choice in block.choices]
        else:
            plain += 1
    return plain + torch.stack(runs).sum(0)


def density(model: GPT) -> float:
    """The share of layers that tokens ran in the last call, from 0 to 1."""
    return layers_run(model).mean().item() / len(anatomy.blocks(model))


def set_threshold(model: GPT, threshold: float) -> None:
    """Give all routers one threshold; the higher it is, the more tokens skip."""
    for module in model.modules():
        if hasattr(module, "threshold"):
            module.threshold = threshold


def set_density(model: GPT, density: float) -> None:
    """Give all random routers one density.

    Raises ValueError for a density outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise ValueError(f"density {density} is the share of tokens that run a layer: 0 to 1")
    for module in model.modules():
        if isinstance(module, RandomRouter):
            module.density = density


@torch.no_grad()
def calibrate(model: GPT, tokens: Tensor, target: float, tolerance: float = 2e-3) -> float:
    """Find, by bisection, the threshold at which tokens run `target` of the layers; set it.

    tokens: (batch, length) text to measure on. tolerance: how far off the density may be.
    The paper takes threshold 0 and whatever density that gives; this makes densities equal, so
    that losses can be compared.
    """
    training, low, high = model.training, -40.0, 40.0
    model.eval()
    for _ in range(30):
        threshold = (low + high) / 2
        set_threshold(model, threshold)
        model.hidden_states(tokens)
        off = density(model) - target
        if abs(off) < tolerance:
            break
        low, high = (threshold, high) if off > 0 else (low, threshold)
    model.train(training)
    return threshold


def flops_per_token(
    config: GPTConfig, length: int, density: float = 1.0, *, routed: bool = False
) -> float:
    """Forward FLOPs a token, averaged over a text of `length`: two for each multiply-add.

    Keys and values are made for every token; queries, scores, output and the feed-forward layer
    for the share `density`; routed adds the routers.
    """
    inner, kv_inner = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    scores = 2 * inner * (length + 1) / 2  # with half of the text, for products with keys, values
    skippable = 2 * config.dim * inner + scores + 3 * config.dim * config.ffn_dim
    layer = 2 * config.dim * kv_inner + density * skippable + routed * 2 * config.dim
    return 2 * (config.n_layers * layer + config.dim * config.vocab_size)


def matching_density(config: GPTConfig, length: int, flops: float) -> float:
    """The density at which the routed model of `config` costs `flops` a token.

    Raises ValueError when none does: its keys, values and routers alone cost more, or running
    every layer costs less.
    """
    least, most = (flops_per_token(config, length, share, routed=True) for share in (0.0, 1.0))
    if not least < flops <= most:
        raise ValueError(f"{flops:,.0f} FLOPs a token are not within {least:,.0f} to {most:,.0f}")
    return (flops - least) / (most - least)


@torch.inference_mode()
def decoding_seconds(
    model: GPT, ways: Sequence[Sequence[nn.Module]], prompt: Tensor, steps: int
) -> list[float]:
    """Median seconds of a decoding step, one number for each of several lists of blocks.

    ways: lists of blocks that stand in for the model's own, which are put back at the end. They
    take turns, step by step, so that other programs slow all of them alike.
    prompt: (batch, length) int64, read before the clock starts. Each step then feeds its last
    column again: time depends on how many tokens there are, not on which.
    steps: how many are timed, after a first one that is not.
    Raises ValueError for less than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps have no median: time one or more")
    own, new, turns = model.blocks, prompt[:, -1:], {}

    def step(stack: nn.ModuleList, cache: list[KVCache]) -> None:
        model.blocks = stack
        model.head(model.hidden_states(new, cache)[:, -1])

    try:
        for place, blocks in enumerate(ways):
            stack = model.blocks = nn.ModuleList(blocks)
            cache = model.new_cache(prompt.shape[1] + steps + 1)
            model.hidden_states(prompt, cache)
            turns[place] = partial(step, stack, cache)
        spent = measure(turns, steps + 1)
    finally:
        model.blocks = own
    return [statistics.median(seconds[1:]) for seconds in spent.values()]


@torch.no_grad()
def leave_one_out_losses(model: GPT, tokens: Tensor) -> tuple[float, list[float]]:
    """Next-token loss with all blocks, and with each block left out in turn, for all tokens.

    tokens: (batch, length + 1) int64. Nats a token. What comes before the block that is left out
    is computed once.
    """
    x, target = model.embedding(tokens[:, :-1]), tokens[:, 1:].flatten()
    rotary = rotary_table(model.config, 0, x.shape[1], x)
    blocks, losses = list(model.blocks), []

    def loss_after(x: Tensor, blocks: Sequence[nn.Module]) -> float:
        for block in blocks:
            x = block(x, rotary)
        return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1), target).item()

    whole = loss_after(x, blocks)
    for place, block in enumerate(blocks):
        losses.append(loss_after(x, blocks[place + 1 :]))
        x = block(x, rotary)
    return whole, losses
