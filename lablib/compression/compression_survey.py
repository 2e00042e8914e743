"""Model compression, a survey (Wang et al., 2024): its tree, and leaves that can be put in a row.

Lab 808. A recipe is a list of steps: prune, tune, quantize, distil. What is pruned or rounded is a
`Constraint` on a weight, through which the model computes and, where a step tunes it, trains.
`compress` carries a recipe out; `frontier` puts recipes side by side.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lablib.compression import cherry, flexigpt, importance
from lablib.compression.calibration import input_norms, token_losses
from lablib.compression.finequant import adaptive_groups, ranges
from lablib.compression.nas_compression import divergence
from lablib.compression.quantize import QuantizedLinear, QuantizedWeight, quantize
from lablib.compression.recover import cross_entropy, recover
from lablib.compression.structures import Keep, sizes, sliced
from lablib.kernels.dequant_matmul import naive
from lablib.models import anatomy
from lablib.resources import measure


@dataclass(frozen=True)
class Leaf:
    """A method of the survey's tree. path: from the root; where: "module:function", or None.

    needs: "nothing" beside the weights, "text" to read, or "training", which the survey calls
    tuning. large: whether "real" large models can have it, or medium ones alone: the survey's two
    reasons are that tuning all of a large model is too dear, and that it must stay good at
    everything. Which leaf that leaves out is our reading of its abstract.
    """

    name: str
    path: tuple[str, ...]
    about: str
    where: str | None = None
    needs: str = "nothing"

    @property
    def large(self) -> bool:
        """Not what tunes the whole model: but for what large ones are born with, or buy."""
        return self.needs != "training" or self.name in LARGE


LARGE = ("black box", "cheaper attention", "mixture of experts")
TAXONOMY = (
    Leaf("weights alone, rounded", ("quantization", "post-training"),
         "Each weight goes to the nearest level; nothing is trained.",
         "compression.quantize:quantize"),
    Leaf("fine-grained", ("quantization", "post-training"),
         "Neighbours share a scale, and the weights choose how many.",
         "compression.finequant:adaptive_groups"),
    Leaf("mixed precision", ("quantization", "post-training"),
         "The few weights that matter most stay in 16 bits.",
         "compression.cherry:round_rest", "text"),
    Leaf("activations, too", ("quantization", "post-training"),
         "What flows between layers is rounded as well, outliers smoothed away.", needs="text"),
    Leaf("straight through", ("quantization", "aware training"),
         "The model trains while it is rounded.",
         "compression.cherry:cherry_", "training"),
    Leaf("single weights", ("pruning", "unstructured"),
         "Small weights become zero, wherever they are.",
         "compression.compression_survey:sparse", "text"),
    Leaf("two of four", ("pruning", "semi-structured"),
         "Of each four neighbours two stay, which GPUs multiply faster.",
         "compression.compression_survey:two_of_four", "text"),
    Leaf("rows and columns by curvature", ("pruning", "structured"),
         "What goes costs least, and the rest moves to make up for it.",
         "compression.llm_surgeon:prune_", "text"),
    Leaf("heads and neurons", ("pruning", "structured"),
         "Whole parts go; what is left is a smaller dense model.",
         "compression.structures:sliced", "text"),
    Leaf("emptied first", ("pruning", "structured"),
         "A penalty drains the parts that will go.",
         "compression.dress:empty", "training"),
    Leaf("searched", ("pruning", "structured"),
         "One training holds many sizes, and a search picks.",
         "compression.nas_compression:evolve", "training"),
    Leaf("blocks", ("pruning", "structured"),
         "Whole blocks go, or a model is trained so that they can.",
         "compression.layerdrop:pruned"),
    Leaf("white box", ("distillation",),
         "A pupil learns the teacher's whole distribution.",
         "compression.compression_survey:taught", "training"),
    Leaf("black box", ("distillation",),
         "A pupil learns from what the teacher writes.",
         "compression.compression_survey:imitating", "training"),
    Leaf("shared weights", ("compact design",),
         "One block's weights serve for several, with small adapters.",
         "compression.flexigpt:share_", "text"),
    Leaf("low rank", ("compact design",),
         "A matrix becomes a product of two thin ones.",
         "compression.flexigpt:low_rank"),
    Leaf("cheaper attention", ("compact design",),
         "Attention whose cost grows with the length, not its square.", needs="training"),
    Leaf("mixture of experts", ("dynamic networks",),
         "Each token uses a few of many feed-forward layers.",
         "experts.moe:MoE", "training"),
    Leaf("early exit", ("dynamic networks",),
         "Easy tokens leave after a few blocks.",
         "experts.early_exit:add_confidence_exits", "training"),
    Leaf("skipped blocks", ("dynamic networks",),
         "A router sends some tokens past a block.",
         "experts.learning_to_skip:add_routers", "training"),
)  # fmt: skip


class Constraint(nn.Module):
    """What a weight (out, in) may be: zero where it is pruned, a level where it is rounded.

    mask: bool, true where a weight stays; None is everywhere. pattern: how its places are stored,
    "bitmap" or "2:4". bits: None is not rounded. fitted: levels follow from the weights that stay.
    """

    def __init__(
        self,
        mask: Tensor | None = None,
        bits: int | None = None,
        group: int = 64,
        scheme: str = "symmetric",
        pattern: str = "bitmap",
        fitted: bool = True,
    ):
        super().__init__()
        self.register_buffer("mask", mask)
        self.bits, self.group, self.scheme = bits, group, scheme
        self.pattern, self.fitted = pattern, fitted

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> the same; gradients pass the rounding, and not the mask."""
        value = weight
        if self.bits is not None:
            value = weight + (self.quantized(weight).dequantize() - weight).detach()
        return value if self.mask is None else value * self.mask

    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """In codes, scales fitted to all weights or to those that stay."""
        ignore = None if self.mask is None or not self.fitted else ~self.mask
        how = {"group": self.group, "scheme": self.scheme, "ignore": ignore}
        return quantize(weight.detach(), self.bits, **how)


class Cherries(Constraint):
    """A few weights stay as they are, the others are rounded by `cherry.round_rest`; lab 807.

    kept: (out, in) bool, as many in each row.
    """

    def __init__(self, kept: Tensor, bits: int, group: int = 64):
        super().__init__(None, bits, group)
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> the same; gradients pass the rounding."""
        value = cherry.round_rest(weight.detach(), self.kept, self.bits, self.group)
        return weight + (value - weight).detach()

    def parts(self, weight: Tensor) -> dict[str, Tensor]:
        """What a file holds: codes, steps, kept values, and their places."""
        small = cherry.store(weight, self.kept, self.bits, self.group)
        return {name: getattr(small, name) for name in ("packed", "steps", "kept", "places")}


def constrained(layer: nn.Module) -> Constraint:
    """A layer's constraint; one that allows everything where it has none."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight[0]
    return Constraint()


def constrain_(layer: nn.Module, new: Constraint) -> None:
    """Put a constraint in the place of the layer's."""
    if parametrize.is_parametrized(layer, "weight"):
        layer.parametrizations.weight[0] = new
    else:
        parametrize.register_parametrization(layer, "weight", new)


# What a recipe can ask for. Each takes the model, some text, and options; gives the model back.


def rounded(model, rows, bits: int, group: int = 64, scheme: str = "symmetric") -> nn.Module:
    """Quantize; weights that are pruned stay so, and levels are fitted to the others."""
    for layer in anatomy.projections(model).values():
        old = constrained(layer)
        constrain_(layer, Constraint(old.mask, bits, group, scheme, old.pattern))
    return model


def rounded_adaptively(model, rows, bits: int, alpha: float, sizes: Sequence[int] = (128, 64, 32)):
    """Quantize with FineQuant's groups: each matrix its own."""
    for layer in anatomy.projections(model).values():
        group = adaptive_groups(ranges(layer.weight, sizes), alpha)
        constrain_(layer, Constraint(None, bits, group))
    return model


def sparse(model, rows, keep: float, by: str = "activation") -> nn.Module:
    """Keep this share of each row: the largest |w|, or |w| times the norm of what it reads.

    Of a rounded model, by the rounded weights; scales stay those of all weights.
    """
    for layer, score in _scored(model, rows, by):
        n = max(1, round(keep * score.shape[1]))
        mask = torch.zeros_like(score, dtype=torch.bool)
        mask.scatter_(1, score.topk(n, 1).indices, True)
        old = constrained(layer)
        constrain_(layer, Constraint(mask, old.bits, old.group, old.scheme, fitted=False))
    return model


def two_of_four(model, rows, by: str = "activation") -> nn.Module:
    """Keep the two best of each four neighbours along a row."""
    for layer, score in _scored(model, rows, by):
        four = score.unflatten(1, (-1, 4))
        mask = torch.zeros_like(four, dtype=torch.bool)
        mask = mask.scatter_(2, four.topk(2, 2).indices, True).flatten(1)
        constrain_(layer, Constraint(mask, pattern="2:4"))
    return model


def with_cherries(model, rows, bits: int, keep: float = 1 / 64, group: int = 64) -> nn.Module:
    """Quantize, but for the weights of each row on which the loss leans most (lab 807)."""
    for name, score in cherry.impact(model, rows).items():
        kept = cherry.cherries(score, keep)
        constrain_(anatomy.projections(model)[name], Cherries(kept, bits, group))
    return model


def two_of_four_moved(model, rows) -> nn.Module:
    """Two of four by curvature, and the others move to make up for those that go (lab 802)."""
    from lablib.compression.llm_surgeon import shot_

    shot_(model, rows, 0.5, structure="2:4")
    for layer in anatomy.projections(model).values():
        constrain_(layer, Constraint(layer.weight.detach() != 0, pattern="2:4"))
    return model


def _scored(model, rows, by: str) -> list[tuple[nn.Module, Tensor]]:
    layers = anatomy.projections(model)
    if by == "magnitude":
        return [(layer, importance.magnitude(layer.weight)) for layer in layers.values()]
    norms = input_norms(model, rows)
    return [
        (layer, importance.activation_weighted(layer.weight, norms[name]))
        for name, layer in layers.items()
    ]


def narrow(model, rows, keep: float, blocks: int | None = None) -> nn.Module:
    """Fewer neurons, then fewer groups of heads, and the first of the blocks that matter.

    keep: of the parameters of the blocks. That share of the groups of heads stays, rounded, at
        least one, and as many neurons as then make up the share. blocks: how many stay.
    """
    return sliced(model, narrower(model, rows, keep, blocks))


def narrower(model, rows, keep: float, blocks: int | None = None) -> Keep:
    """What stays where a model is made `narrow`."""
    size = sizes(model)
    scores = flexigpt.block_influence(model, rows[:16])
    chosen = sorted(scores.topk(blocks or size.blocks).indices.tolist())
    share = keep * size.blocks / len(chosen)
    per_group = size.heads // size.kv_heads
    n_groups = max(1, round(share * size.kv_heads))
    attention = size.channels * size.head_dim * (2 * size.heads + 2 * size.kv_heads)
    whole = attention + 3 * size.channels * size.neurons
    left = share * whole - attention * n_groups / size.kv_heads
    n_neurons = max(1, min(size.neurons, round(left / (3 * size.channels))))
    heads, neurons = [], []
    for score in importance.of_heads(model, rows):
        best = score.square().view(-1, per_group).sum(1).topk(n_groups).indices.sort().values
        heads.append([int(g) * per_group + k for g in best for k in range(per_group)])
    for score in importance.of_neurons(model, rows):
        neurons.append(score.topk(n_neurons).indices.sort().values.tolist())
    return Keep(blocks=chosen, heads=heads, neurons=neurons)


def emptied(model, rows, keep: float, steps: int, rate: float, weight: float = 1e-2,
            phase: float = 0.75, batch: int = 8, calibration: int = 64) -> nn.Module:  # fmt: skip
    """`narrow`, then `tuned`, but what will go is driven to zero before it is cut (lab 803).

    phase: share of the steps that come before the cut; weight: of the penalty there. What goes is
    chosen on the first `calibration` of the rows.
    """
    from lablib.compression import dress

    stays = narrower(model, rows[:calibration], keep)
    before = round(phase * steps)
    dress.empty(model, rows, stays, steps, rate, before, weight, batch=batch, seed=None)
    return sliced(model, stays)


def shed(model, rows, blocks: int, steps: int, rate: float, batch: int = 8) -> nn.Module:
    """Train so that blocks may go, then let them (lab 801).

    blocks: how many stay, evenly spread; the rate at which they are left out follows from it.
    """
    from lablib.compression import layerdrop

    n = len(anatomy.blocks(model))
    layerdrop.layerdrop_(model, layerdrop.optimal_rate(blocks, n))
    recover(model, rows, steps, rate, batch=batch, seed=None)
    return layerdrop.pruned(model, layerdrop.evenly(n, blocks))


def shared(model, rows, blocks: int, keep: float, gain: float = 2.0) -> nn.Module:
    """So many blocks stay and do the work of the others, too, each with thin matrices (lab 804).

    keep: of the parameters of the blocks' projections, thin matrices counted, which get the rank
        that this allows, at least 1. gain: of the others' outputs, at the start.
    """
    share = 1 - blocks / len(anatomy.blocks(model))  # of the blocks that goes
    weights = n_projected(model)
    ends = sum(sum(layer.weight.shape) for layer in anatomy.projections(model).values())
    room = keep * weights - weights * (1 - share)  # for the thin ones, of which a rank has `ends`
    flexigpt.prune_(model, rows[:16], share, max(1, int(room / (ends * share))), gain)
    return model


def n_projected(model: nn.Module) -> int:
    """Weights of the projections of all blocks."""
    return sum(layer.weight.numel() for layer in anatomy.projections(model).values())


def searched(model, rows, keep: float, steps: int, rate: float, distill: float = 0.5,
             batch: int = 8, calibration: int = 64, tries: int = 120, seed: int = 0):  # fmt: skip
    """Train many sizes in one, then take the best that is small enough (lab 805).

    keep: of the parameters of the blocks' projections, at most. Sub-networks have half of the
    blocks or more, block by block half of the groups of heads or all, and neurons by quarters. What
    matters is told on the first `calibration` of the rows; the search looks at 24 of these, and
    `tries` of sub-networks, those that are too large not counted as worth a look.
    """
    from lablib.compression import nas_compression as nas

    size, random = sizes(model), np.random.default_rng(seed)
    nas.sort_by_importance_(model, rows[:calibration])
    order = flexigpt.block_influence(model, rows[:16]).argsort(descending=True).tolist()
    space = nas.Space(
        model,
        blocks=range(size.blocks // 2, size.blocks + 1),
        groups=sorted({-(-size.kv_heads // 2), size.kv_heads}),
        neurons=[size.neurons * quarter // 4 for quarter in range(1, 5)],
        fine=True,
        order=order,
    )
    how = nas.sandwich_loss(space, random, distill=distill)
    recover(model, rows, steps, rate, batch=batch, seed=None, loss=how)
    most = space.parameters(space.largest) - (1 - keep) * n_projected(model)

    def judged(config: nas.Config) -> tuple[float, float]:
        count = space.parameters(config)
        if count > most:
            return count, math.inf
        return most, token_losses(space.cut(config), rows[:24]).mean().item()

    found = {space.smallest: judged(space.smallest)} | nas.evolve(space, judged, tries, random)
    best = min(found, key=lambda config: found[config][1])
    if math.isinf(found[best][1]):
        raise ValueError(f"the smallest sub-network has more than {keep:.3g} of the parameters")
    return space.cut(best)


def tuned(model, rows, steps: int, rate: float, batch: int = 8) -> nn.Module:
    """Train on text, through the constraints; of shared blocks what is their own alone."""
    what = flexigpt.learning(model) or "all"
    recover(model, rows, steps, rate, batch=batch, seed=None, trainable=what)
    return model


def taught(model, rows, steps: int, rate: float, teacher: nn.Module, share: float = 0.5,
           temperature: float = 1.0, batch: int = 8) -> nn.Module:  # fmt: skip
    """White-box distillation: text, and the teacher's distribution over each next token."""

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        with torch.no_grad():
            target = anatomy.logits(teacher, rows[:, :-1])
        found = anatomy.logits(model, rows[:, :-1])
        soft, hard = divergence(found, target, temperature), cross_entropy(found, rows)
        return share * soft + (1 - share) * hard

    recover(model, rows, steps, rate, batch=batch, seed=None, loss=loss)
    return model


def imitating(model, rows, steps: int, rate: float, teacher: nn.Module, seed: int = 0,
              batch: int = 8) -> nn.Module:  # fmt: skip
    """Black-box distillation: what the teacher writes on from a few tokens of each text."""
    written = writings(teacher, rows[: batch * steps], seed)
    recover(model, written, steps, rate, batch=batch, seed=None)
    return model


def writings(teacher: nn.Module, rows: Tensor, seed: int, prompt: int = 8) -> Tensor:
    """(n, length + 1): each row's first tokens, and the teacher's sampled continuation."""
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for some in rows[:, :prompt].split(128):
            new = rows.shape[1] - prompt
            parts.append(teacher.generate(some, new, temperature=1.0))
    return torch.cat(parts)


STEPS: Mapping[str, Callable[..., nn.Module]] = {
    "round": rounded,
    "round adaptively": rounded_adaptively,
    "sparse": sparse,
    "cherries": with_cherries,
    "2:4": two_of_four,
    "2:4, moved": two_of_four_moved,
    "narrow": narrow,
    "shared": shared,
    "empty": emptied,
    "shed": shed,
    "search": searched,
    "tune": tuned,
    "teach": taught,
    "imitate": imitating,
}
LEARNS = ("empty", "shed", "search", "tune", "teach", "imitate")  # read all of the text
Recipe = Sequence[tuple[str, Mapping[str, object]]]


def compress(
    model: nn.Module,
    recipe: Recipe,
    rows: Tensor,
    calibration: int = 64,
    budget: float | None = None,
) -> nn.Module:
    """A compressed copy. recipe: steps in order, each a name of STEPS and its options.

    rows: (n, length + 1) to train on, in order, the first `calibration` of them to choose by.
    budget: bits that may be stored, at most, for each weight that the blocks' projections had.
    The model itself teaches where a step distils. Raises ValueError for an unknown step, and for a
    recipe that takes more than its budget.
    """
    small = copy.deepcopy(model)
    for name, options in recipe:
        if name not in STEPS:
            raise ValueError(f"{name!r} is none of {', '.join(STEPS)}")
        teaches = {"teacher": model} if name in ("teach", "imitate") else {}
        text = rows if name in LEARNS else rows[:calibration]
        small = STEPS[name](small, text, **options, **teaches)
    if budget is not None and (bits := bits_a_weight(small, model)) > budget:
        raise ValueError(f"this recipe stores {bits:.2f} bits a weight, more than {budget:g}")
    return small


# What it costs.


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a file of the model holds: codes, scales, places, and 16 bits for all else."""
    found: dict[str, Tensor] = {}
    layers = anatomy.projections(model)
    for name, layer in layers.items():
        found |= {f"{name}.{k}": part for k, part in _parts(layer).items()}
    seen = set()
    for name, parameter in model.named_parameters():
        if not any(name.startswith(f"{layer}.") for layer in layers) and id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter.detach().half()
    return found


def _parts(layer: nn.Module) -> dict[str, Tensor]:
    if isinstance(layer, flexigpt.SharedLinear):  # its weight is another layer's
        own = {"a": layer.a, "b": layer.b} | ({} if layer.gain is None else {"gain": layer.gain})
        return {name: part.detach().half() for name, part in own.items()}
    rule = constrained(layer)
    weight = layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else (
        layer.weight
    )  # fmt: skip
    weight, parts = weight.detach(), {}
    if isinstance(rule, Cherries):
        return rule.parts(weight)
    if rule.mask is not None:
        parts["places"] = _places(rule.mask, rule.pattern)
    if rule.bits is None:
        kept = weight if rule.mask is None else weight[rule.mask]
        return parts | {"values": kept.half()}
    small = rule.quantized(weight)
    codes = small.codes if rule.mask is None else small.codes[rule.mask].view(1, -1)
    parts |= {"codes": naive.pack(codes, rule.bits), "scale": small.scale}
    return parts | ({"zero": small.zero} if small.zero.numel() > 1 else {})


def _places(mask: Tensor, pattern: str) -> Tensor:
    """A bit a weight, eight to a byte; or two bits for each of the two that stay of four."""
    if pattern == "bitmap":
        bits = nn.functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
        return (bits * (2 ** torch.arange(8))).sum(1).to(torch.uint8)
    places = mask.unflatten(1, (-1, 4)).nonzero()[:, 2].to(torch.uint8)
    return naive.pack(places.view(1, -1), 2)


def stored_bytes(model: nn.Module, blocks_alone: bool = False) -> int:
    """Of `stored`; of the blocks' projections alone, where a budget is theirs."""
    layers = tuple(f"{name}." for name in anatomy.projections(model))
    parts = stored(model)
    return sum(p.nbytes for n, p in parts.items() if not blocks_alone or n.startswith(layers))


def bits_a_weight(small: nn.Module, whole: nn.Module) -> float:
    """What is stored of a compressed model's blocks, for each weight of the whole one's."""
    return 8 * stored_bytes(small, blocks_alone=True) / n_projected(whole)


def save(model: nn.Module, path: Path) -> int:
    """Write a safetensors file; its size in bytes."""
    from safetensors.torch import save_file

    save_file({name: part.contiguous() for name, part in stored(model).items()}, path)
    return path.stat().st_size


def deployed(model: nn.Module) -> nn.Module:
    """A copy to run: rounded layers multiply from their codes, pruned ones hold zeros."""
    ready = copy.deepcopy(model)
    for name, layer in anatomy.projections(ready).items():
        if isinstance(layer, flexigpt.SharedLinear):
            continue
        rule = constrained(layer)
        if rule.bits is not None and rule.mask is None and not isinstance(rule, Cherries):
            weight = layer.parametrizations.weight.original
            plain: nn.Module = QuantizedLinear(rule.quantized(weight), layer.bias)
        else:
            plain = nn.Linear(*reversed(layer.weight.shape), bias=False)
            plain.weight, plain.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
        anatomy.replace(ready, name, plain)
    return ready


def frontier(model: nn.Module, recipes: Mapping[str, Recipe], train: Tensor, rows: Tensor) -> list:
    """A row for each recipe: its name, bytes, nats above the whole model, ms a token, steps.

    rows: (n, length + 1) to score; the time is that of one row, the best of three.
    """
    whole = token_losses(model, rows).mean().item()
    table = []
    for name, recipe in recipes.items():
        small = compress(model, recipe, train)
        over = token_losses(small, rows).mean().item() - whole
        steps = sum(options.get("steps", 0) for _, options in recipe)
        row = {"name": name, "bytes": stored_bytes(small), "over": over, "steps": steps}
        table.append(row | {"ms": 1e3 * _seconds(deployed(small), rows[:1, :-1])})
    return table


def _seconds(model: nn.Module, tokens: Tensor) -> float:
    """A token, reading."""
    with torch.no_grad():
        times = measure({"read": lambda: anatomy.logits(model, tokens)}, repeats=3)
    return min(times["read"]) / tokens.numel()
