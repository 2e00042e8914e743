"""LayerDrop (Fan, Grave and Joulin, 2019): leave blocks out in training, and any will do later.

Lab 801. In training each forward pass runs a random subset of the blocks (section 3.2); in use all
of them run, or those that a rule picks (section 3.2.2), with nothing trained again. Dropped blocks
are skipped, not zeroed: what they would have added is missing, and they get no gradient.

In the formula of "every other", depths count from 1: the authors' own flags keep 0, 2, 4, ... of
blocks that count from 0.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import GPT, anatomy
from lablib.models.gpt import rotary_table
from lablib.modes import kept_modes
from lablib.paths import data_dir


class LayerDrop(nn.ModuleList):
    """A model's list of blocks that, in training, leaves some out each time it is gone through.

    rate: the chance of a block to be left out, one for all or one a block; seed: of the draws.
    Names of parameters stay as they are, so weights move freely to and from a plain list.
    fixed: None, or which blocks run in training and in use, one bool a block.
    Raises ValueError for rates that are no chances, or of another number than blocks.
    """

    def __init__(self, blocks: Iterable[nn.Module], rate: float | Sequence[float], seed: int = 0):
        super().__init__(blocks)
        self.rates = [rate] * len(self) if isinstance(rate, (int, float)) else list(rate)
        if len(self.rates) != len(self) or not all(0 <= p <= 1 for p in self.rates):
            raise ValueError(f"{len(self)} blocks need a rate from 0 to 1 each, not {rate}")
        self.random = random.Random(seed)
        self.fixed: list[bool] | None = None

    def stays(self) -> list[bool]:
        """Which blocks run now: all in use; in training a new draw, Bernoulli(1 - p) a block."""
        if self.fixed is not None:
            return self.fixed
        return [not self.training or self.random.random() >= p for p in self.rates]

    def __iter__(self) -> Iterator[nn.Module]:
        # x -> x + f_d(x) for blocks d that stay, x -> x for the others
        return itertools.compress(super().__iter__(), self.stays())

    def __getitem__(self, index):
        if isinstance(index, slice):  # how transformers' models go through their blocks
            places = range(len(self))[index]
            stays = self.stays()
            return [super(LayerDrop, self).__getitem__(i) for i in places if stays[i]]
        return super().__getitem__(index)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"rates={self.rates}"


def layerdrop_(model: nn.Module, rate: float | Sequence[float], seed: int = 0) -> nn.Module:
    """Put a `LayerDrop` in the place of the model's list of blocks; returns the model."""
    before = anatomy.blocks(model)
    blocks = LayerDrop(_all(before), rate, seed)
    blocks.training = before.training
    anatomy.replace(model, anatomy.family(model).blocks, blocks)
    return model


def _all(blocks: nn.ModuleList) -> list[nn.Module]:
    return [blocks[place] for place in range(len(blocks))]


@contextlib.contextmanager
def only(model: nn.Module, keep: Sequence[int]) -> Iterator[nn.Module]:
    """Within the block, the model consists of some of its blocks, in order; then of all again.

    keep: places, from 0. Raises IndexError for a place that the model doesn't have.
    """
    whole = anatomy.blocks(model)
    name = anatomy.family(model).blocks
    some = nn.ModuleList(whole[place] for place in sorted(set(keep)))
    some.training = whole.training
    anatomy.replace(model, name, some)
    try:
        yield model
    finally:
        anatomy.replace(model, name, whole)


def pruned(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """A smaller copy that has only some of the blocks, in a plain list. keep: as in `only`."""
    with only(model, keep):
        return copy.deepcopy(model)


# Which blocks to keep.


def every_other(n_layers: int, rate: float) -> list[int]:
    """Places that stay, from 0, when depths d with d = 0 mod floor(1 / rate) go.

    Above a rate of 1/2 the formula drops all; `evenly` goes on there.
    Source: section 3.2.2, "every other".
    """
    if not 0 < rate <= 1:
        raise ValueError(f"a rate of {rate} is not above 0 and at most 1")
    period = math.floor(1 / rate)
    return [d - 1 for d in range(1, n_layers + 1) if d % period]


def evenly(n_layers: int, n_keep: int) -> list[int]:
    """So many places, spread evenly over the depth, the first among them.

    As `every_other` where both can. Source: the authors' README, third tip.
    """
    return [i * n_layers // n_keep for i in range(n_keep)]


def optimal_rate(n_keep: int, n_layers: int) -> float:
    """The rate whose expected depth N (1 - p) is the depth r that is wanted: p = 1 - r / N."""
    return 1 - n_keep / n_layers


class DataDrivenRates(nn.Module):
    """A rate for each block that is learned, by what the block adds; their mean is fixed.

    rate: the mean. Source: section 3.2.2, "data driven pruning": a rate is a non-linear function of
    its layer's activation, then a softmax. The function, and how gradients reach it, are ours.
    Raises ValueError for a mean at which a block's rate could be above 1.
    """

    def __init__(self, n_layers: int, dim: int, rate: float, width: int = 16):
        super().__init__()
        if not 0 <= rate <= 1 - 1 / n_layers:
            raise ValueError(f"{n_layers} blocks can have a mean rate up to {1 - 1 / n_layers:g}")
        self.rate = rate
        layers = (nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, 1))
        self.score = nn.ModuleList(copy.deepcopy(nn.Sequential(*layers)) for _ in range(n_layers))

    def shares(self, added: Tensor) -> Tensor:
        """added: (n_layers, dim), what each adds, a mean over tokens -> (n_layers,), sum 1."""
        scores = [score(x) for score, x in zip(self.score, added, strict=True)]
        return torch.cat(scores).softmax(0)

    def forward(self, added: Tensor) -> Tensor:
        """The rates (n_layers,), lowest for the largest share: for `LayerDrop.rates`."""
        # p_d = p N (1 - a_d) / (N - 1), whose mean is p, since the shares a_d sum to 1
        n = len(self.score)
        return self.rate * n * (1 - self.shares(added)) / (n - 1)

    def keep(self, added: Tensor, n_keep: int) -> list[int]:
        """The fixed blocks that run in use: those of the largest shares, in order."""
        return self.shares(added).topk(n_keep).indices.sort().values.tolist()


def gated(x: Tensor, y: Tensor, rate: Tensor) -> Tensor:
    """What a block made of x, y, with a gradient to its rate: as if it had run by its chance.

    The value is y; straight through, d y' / d (1 - rate) is what the block added, y - x.
    """
    chance = 1 - rate
    return x + (1 + chance - chance.detach()) * (y - x)


def search_on_valid(
    model: nn.Module, n_keep: int, rows: Tensor, most: int = 70, beam: int = 4
) -> tuple[list[int], float]:
    """The subset of n_keep blocks with the least loss on rows, and that loss in nats a token.

    rows: (n, length + 1) token ids. All subsets are tried if there are at most `most`; else blocks
    go one by one, and of each size the `beam` best subsets are kept.
    """
    n = len(anatomy.blocks(model))
    if math.comb(n, n_keep) <= most:
        candidates = itertools.combinations(range(n), n_keep)
        return _best((list(keep) for keep in candidates), model, rows, 1)[0]
    alive = [list(range(n))]
    ranked = [(alive[0], math.nan)]
    for size in range(n - 1, n_keep - 1, -1):
        smaller = {tuple(k) for a in alive for k in itertools.combinations(a, size)}
        ranked = _best(map(list, sorted(smaller)), model, rows, beam)
        alive = [keep for keep, _ in ranked]
    return ranked[0]


def _best(candidates, model: nn.Module, rows: Tensor, count: int) -> list[tuple[list[int], float]]:
    found = [(keep, loss_of(model, keep, rows)) for keep in candidates]
    return sorted(found, key=lambda pair: pair[1])[:count]


@torch.no_grad()
def loss_of(model: nn.Module, keep: Sequence[int], rows: Tensor) -> float:
    """The loss with some blocks alone: nats a token of rows (n, length + 1)."""
    with kept_modes(model), only(model, keep):
        model.eval()
        logits = anatomy.logits(model, rows[:, :-1])  # (n, length, vocab)
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


@torch.no_grad()
def all_losses(model: GPT, rows: Tensor) -> Tensor:
    """The losses of all 2^N sub-networks, nats a token: (2^N,), N blocks.

    Bit d of an index says whether block d runs. What two sub-networks have in common up to a depth
    is computed once, so that this takes 2^N - 1 blocks in the place of N 2^(N - 1).
    """
    found, target = torch.empty(2 ** len(model.blocks)), rows[:, 1:].flatten()
    x = model.embedding(rows[:, :-1])  # (n, length, dim)
    rotary = rotary_table(model.config, 0, x.shape[1], x)
    blocks = _all(model.blocks)

    def walk(x: Tensor, depth: int, index: int) -> None:
        if depth == len(blocks):
            logits = model.head(model.norm(x)).flatten(0, 1)
            found[index] = F.cross_entropy(logits, target)
            return
        walk(x, depth + 1, index)
        walk(blocks[depth](x, rotary), depth + 1, index | 1 << depth)

    with kept_modes(model):
        model.eval()
        walk(x, 0, 0)
    return found


def index_of(keep: Iterable[int]) -> int:
    """Where `all_losses` has the sub-network of these blocks."""
    return sum(1 << place for place in set(keep))


# Other groups than blocks.


class _Groups:
    """A hook that zeroes groups of neighboring features in training, drawn anew each pass."""

    def __init__(self, rate: float, n_groups: int, draw: random.Random):
        self.rate, self.n_groups, self.draw = rate, n_groups, draw

    def masked(self, x: Tensor) -> Tensor:
        """x: (..., features), the same groups gone in all rows and places."""
        stays = [float(self.draw.random() >= self.rate) for _ in range(self.n_groups)]
        return x * x.new_tensor(stays).repeat_interleave(x.shape[-1] // self.n_groups)

    def before(self, module: nn.Module, args: tuple):
        return (self.masked(args[0]), *args[1:]) if module.training else args

    def after(self, module: nn.Module, args: tuple, made: Tensor):
        return self.masked(made) if module.training else made


def structured_dropout_(
    model: nn.Module, rate: float, unit: str = "block", seed: int = 0
) -> nn.Module:
    """One mask value for each group of weights, drawn each forward pass in training, in place.

    unit: a group is a "block" (that is LayerDrop, which computes less; the others don't), a block's
        "mlp", or each of its attention's "heads". Nothing is scaled up to make up for what is gone.
    Raises ValueError for another unit. Source: section 3.2.1.
    """
    if unit == "block":
        return layerdrop_(model, rate, seed)
    if unit not in ("mlp", "heads"):
        raise ValueError(f"{unit!r} is none of block, mlp, heads")
    draw = random.Random(seed)
    for place in range(len(anatomy.blocks(model))):
        if unit == "mlp":
            whole = _Groups(rate, 1, draw)
            anatomy.part(model, place, "mlp").register_forward_hook(whole.after)
        else:
            attention = anatomy.part(model, place, "attention")
            heads = _Groups(rate, _heads(model, attention), draw)
            output = anatomy.projection(model, place, "output")
            output.register_forward_pre_hook(heads.before)
    return model


def _heads(model: nn.Module, attention: nn.Module) -> int:
    return getattr(attention, "n_heads", None) or model.config.num_attention_heads


# The paper's own model.


def wikitext103_model(n_layers: int) -> nn.Module:
    """The paper's language model as torch's modules, without memory: what has parameters in it.

    Adaptive input (Baevski and Auli, 2018): rarer words have narrower embeddings, each band with a
    projection of its own; the softmax shares both and adds a row for each of the two rare bands.
    Source: appendix A.1.2 and the released model's sizes.
    """
    dim, bands = 1024, (20_000, 40_000, 267_744 - 60_000)
    with torch.device("meta"):
        widths = [dim // 4**i for i in range(len(bands))]  # 1024, 256, 64
        words = [nn.Embedding(*sizes) for sizes in zip(bands, widths)]
        projections = [nn.Linear(width, dim, bias=False) for width in widths]
        rows = nn.Linear(dim, len(bands) - 1, bias=False)
        layers = [nn.TransformerEncoderLayer(dim, 8, 4096) for _ in range(n_layers)]
        return nn.ModuleList([*words, *projections, rows, *layers])


def published(what: str) -> float:
    """A figure of the paper or its README; `data/published/layerdrop.csv` says where it stands."""
    path = data_dir() / "published" / "layerdrop.csv"
    rows = csv.DictReader(path.read_text("utf-8").splitlines())
    return next(float(row["value"]) for row in rows if row["what"] == what)
