"""A critical review of efficient tuning (Xu et al., 2023): five families, and what each one saves.

Lab 713. A family is read off the modules that a method leaves in a model. Numbers are counted in
three ways, since what asks for gradients, what changes, and what has to be kept are not the same;
memory by account, on the meta device too, so that a model of any size needs none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import language_loss
from lablib.models import GPT, GPTConfig, anatomy
from lablib.peft import catalogue, sparse
from lablib.peft.adapter import (
    Adapter,
    WeightAdapter,
    adapters,
    freeze_base_,
    n_trainable,
    remove_,
)
from lablib.peft.bottleneck import Bottleneck
from lablib.peft.lora import LoRALinear, lora_
from lablib.peft.lora_variants import AdaLoRALinear
from lablib.peft.measure import ADAM, Loss
from lablib.peft.propelt import MaskedLoRA, Shared, propelt_adapter_, storage_bits
from lablib.peft.qlora import NF4Linear, QLoRALinear, nf4_, qlora_
from lablib.peft.rescale import Rescaled
from lablib.peft.sparse import Child, DiffLinear, MaskedLinear, SparseLinear
from lablib.peft.subset import Tuned

OWN = (Tuned, SparseLinear, DiffLinear, MaskedLinear)  # the base's own numbers, all or some


def family(model: nn.Module) -> str:
    """The family of what a method left in a model, one of `catalogue.FAMILIES`.

    Raises ValueError for a model without an adapter.
    """
    kinds = {type(adapter) for adapter in adapters(model).values()}
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no adapter, so it is of no family")
    if len(kinds) > 1:
        return "hybrid"  # several methods in one model
    (kind,) = kinds
    if issubclass(kind, Shared):
        return "unified"  # one module for all blocks: theta * m_block
    if issubclass(kind, OWN):
        return "partial"  # W + m * delta: numbers that the base has
    if issubclass(kind, WeightAdapter):
        return "reparameterized"  # W + delta(theta): a weight, changed through fewer numbers
    return "additive"  # h + f(h), [P; x]: something new among the activations


ELEVEN = (  # the methods of the paper's experiments
    "serial adapter",
    "prompt",
    "prefix",
    "(IA)3",
    "BitFit",
    "child tuning",
    "LoRA",
    "AdaLoRA",
    "MAM",
    "ProPELT adapter",
    "ProPELT LoRA",
)


def leaves(family: str) -> dict[str, catalogue.Method]:
    """Name -> method, of a family as the paper has it; those that are built come first."""
    found = {n: m for n, m in catalogue.METHODS.items() if m.family == family}
    return dict(sorted(found.items(), key=lambda item: item[1].put is None))


def places() -> dict[str, tuple[int, int]]:
    """Name -> (column, row) on the map: a family a column, in the order of `leaves`."""
    columns = enumerate(catalogue.FAMILIES)
    return {name: (x, y) for x, family in columns for y, name in enumerate(leaves(family))}


def six_leaves(n: int = 12, seed: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> what a leaf computes of random numbers, and its equation written out.

    Of child tuning it is the gradient of the sum of W x. n: inputs and outputs.
    """
    torch.manual_seed(seed)
    x, base = torch.randn(5, n), nn.Linear(n, n)
    thin = nn.Module()
    thin.down, thin.up = nn.Parameter(torch.zeros(4, n)), nn.Parameter(torch.zeros(n, 4))
    low, ada, scaled = LoRALinear(base, 3), AdaLoRALinear(base, 3), Rescaled(base)
    serial, child = Bottleneck(n, 4), Child(base, 0.3, driven=True)
    shared = MaskedLoRA(base, thin, True, 0.5, 1.0)
    for layer in (low, ada, scaled, serial, child, shared):
        for parameter in layer.own().values():
            nn.init.normal_(parameter)
    child.mask.bernoulli_(0.3)

    def half(m: Tensor, scores: Tensor) -> Tensor:
        return m * (scores.abs() > scores.abs().median())  # the half of largest scores

    w, b = base.weight, base.bias
    down, up = half(thin.down, shared.down_mask.scores), half(thin.up, shared.up_mask.scores)
    inner = (x @ serial.down.weight.T + serial.down.bias).clamp(min=0)
    (gradient,) = torch.autograd.grad(child(x).sum(), child.weight)
    return {
        "LoRA": (low(x), x @ (w + low.up @ low.down).T + b),  # W + B A
        "AdaLoRA": (ada(x), x @ (w + ada.left @ ada.values.diag() @ ada.right).T + b),
        "(IA)3": (scaled(x), scaled.scale * (x @ w.T + b)),  # l * (W x + b)
        "serial adapter": (serial(x, x), x + inner @ serial.up.weight.T + serial.up.bias),
        "ProPELT LoRA": (shared(x), x @ (w + up @ down).T + b),  # (B * m_B) (A * m_A)
        "child tuning": (gradient, child.mask * x.sum(0).expand(n, n)),  # m * gradient
    }


# Numbers, counted three ways.


def counted(model: nn.Module) -> dict[str, int]:
    """How many numbers a method's adapters hold, in a model that has them.

    Keys: asks (for gradients, each with Adam's moments), moves (changes in training), kept_bits
    (must be stored for the task: float32 numbers, and masks of one bit). Positions of sparse
    changes that are no mask are left out. Works on the meta device.
    """
    n = n_trainable(model)
    children = [a for a in adapters(model).values() if isinstance(a, Child)]
    if children:  # a fixed mask over the gradient
        moves = sum(round(child.share * child.weight.numel()) for child in children)
        return {"asks": n, "moves": moves, "kept_bits": 32 * moves + n}
    if any(isinstance(a, Shared) for a in adapters(model).values()):
        return {"asks": n, "moves": n, "kept_bits": storage_bits(model)["total"]}
    return {"asks": n, "moves": n, "kept_bits": 32 * n}


def put_shapes_(model: nn.Module, name: str) -> None:
    """A method of the catalogue, on a model that may have no numbers to choose by."""
    if name == "child tuning":
        sparse.child_(model, 0.1, driven=True)  # which numbers is open; how many is not
    else:
        catalogue.put_(model, name)


ROBERTA_BASE = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def roberta(n_labels: int | None = None) -> nn.Module:
    """RoBERTa-base on the meta device: its shapes alone; with a classification head, or without."""
    from transformers import RobertaConfig, RobertaForSequenceClassification, RobertaModel

    config = RobertaConfig(**ROBERTA_BASE, num_labels=n_labels or 2)
    with torch.device("meta"):
        if n_labels is None:
            return RobertaModel(config, add_pooling_layer=False)
        return RobertaForSequenceClassification(config)


def n_parameters(model: nn.Module) -> int:
    """All of a model's numbers."""
    return sum(p.numel() for p in model.parameters())


def on_roberta(names: Sequence[str] = ELEVEN) -> dict[str, dict[str, float]]:
    """Name -> `counted` on RoBERTa-base, and share: per cent of its numbers, those that ask."""
    model, rows = roberta(), {}
    whole = n_parameters(model)
    for name in names:
        with torch.device("meta"):
            put_shapes_(model, name)
        rows[name] = counted(model)
        rows[name]["share"] = 100 * rows[name]["asks"] / whole
        remove_(model)
    return rows


def propelt_share(n_labels: int = 2) -> dict[str, float]:
    """What ProPELT's adapter trains of RoBERTa-base with a head, per cent of full tuning.

    At the authors' size, rank 64. Keys: prototype, scores (of its masks), head, total; kept, the
    prototype and one bit for each score.
    """
    model = roberta(n_labels)
    whole, head = n_parameters(model), n_parameters(model.classifier)
    with torch.device("meta"):
        propelt_adapter_(model)
    bits = storage_bits(model)
    prototype = bits["prototype"] // 32
    parts = {"prototype": prototype, "scores": n_trainable(model) - prototype, "head": head}
    parts |= {"total": sum(parts.values()), "kept": bits["total"] / 32}
    return {key: 100 * n / whole for key, n in parts.items()}


def by_formula(name: str, d: int = 768, f: int = 3072, blocks: int = 12) -> int:
    """Numbers that ask for gradients, from a configuration alone, at the catalogue's sizes.

    d: width. f: of the feed-forward layer. For an encoder such as RoBERTa, with biases and with two
    norms a block, and one norm for the embedding.
    """
    pair = 2 * (d + d)  # in and out of queries and of values
    of = {
        "serial adapter": blocks * 2 * (2 * 8 * d + 8 + d),
        "prompt": 20 * d,
        "prefix": blocks * 16 * 2 * d,
        "(IA)3": blocks * (2 * d + f),
        "BitFit": blocks * (4 * d + f + d + 2 * d) + d,
        "child tuning": blocks * (4 * d * d + 2 * d * f),
        "LoRA": blocks * 8 * pair,
        "AdaLoRA": blocks * 12 * (pair + 2),
        "MAM": blocks * (8 * 2 * d + 2 * 8 * d + 8 + d),
        "ProPELT adapter": 2 * 32 * d + 32 + d + blocks * 2 * 32 * d,
        "ProPELT LoRA": 16 * pair + blocks * 16 * pair,
    }
    return of[name]


# Memory by account.


def held(model: nn.Module, loss: Loss) -> dict[str, int]:
    """`measure.account` for a model on any device, the meta device too.

    Each storage counts once. Attention on the meta device is computed as products, one after the
    other, so its weights (length x length) are held; a fused kernel holds less.
    """
    kept = {storage._cdata: storage.nbytes() for storage in _storages(model)}
    training = [p for p in model.parameters() if p.requires_grad]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept:
            saved[storage._cdata] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(model)  # holds what was saved, so that no storage comes twice
    del value
    bytes_of = {
        "parameters": sum(kept.values()),
        "gradients": sum(p.numel() * p.element_size() for p in training),
        "optimizer": sum(p.numel() * ADAM for p in training),
        "saved": sum(saved.values()),
    }
    return bytes_of | {"total": sum(bytes_of.values())}


def _storages(model: nn.Module) -> list:
    return [t.untyped_storage() for t in [*model.parameters(), *model.buffers()]]


TINY = GPTConfig(4096, 128, 3, 4, 2, head_dim=32, ffn_dim=352, max_length=256, tied=True)
SMOLLM2 = GPTConfig(49_152, 576, 30, 9, 3, ffn_dim=1536, tied=True)
LLAMA_2_7B = GPTConfig(32_000, 4096, 32, 32, 32, ffn_dim=11_008, tied=False)
SIZES = {"tiny-1m": TINY, "SmolLM2-135M": SMOLLM2, "Llama-2-7B": LLAMA_2_7B}
WAYS = ("full", "LoRA", "QLoRA", "QLoRA, as written")


def training(config: GPTConfig, way: str, batch: int, length: int) -> dict[str, int]:
    """`held` by one training step of a decoder of these shapes, float32; nothing is computed.

    way: one of WAYS; all projections get LoRA of rank 8. "QLoRA, as written" leaves to autograd
    what is kept for the backward pass. Raises ValueError for another way.
    """
    if way not in WAYS:
        raise ValueError(f"{way!r} is none of {', '.join(WAYS)}")
    with torch.device("meta"):
        model = GPT(config)
        rows = torch.zeros(batch, length + 1, dtype=torch.int64)
    put_way_(model, way)
    return held(model, lambda m: language_loss(m, rows))


def put_way_(model: nn.Module, way: str, rank: int = 8) -> None:
    """One of WAYS, and only what it brings asks for gradients."""
    if way == "full":
        return
    if way == "LoRA":
        lora_(model, rank=rank)
    else:
        nf4_(model)
        qlora_(model, rank=rank)
    if way == "QLoRA":
        recompute_(model)
    freeze_base_(model)


class _Dequantized(torch.autograd.Function):
    """x W^T + b for a weight in 4 bits, which is computed a second time for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer  # the codes, which are there anyway; of x, nothing
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight, None  # dx = dy W


class Recomputed(nn.Module):
    """A projection in 4 bits whose dequantized weight isn't kept for the backward pass.

    Autograd keeps what a product needs for the gradient of its input: the weight, in full size.
    """

    def __init__(self, base: NF4Linear):
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """(out, in), computed from the codes."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return _Dequantized.apply(x, self.base)


def recompute_(model: nn.Module) -> None:
    """Let every projection of QLoRA compute its weight again when it goes backward."""
    for adapter in adapters(model).values():
        if isinstance(adapter, QLoRALinear) and isinstance(adapter.base, NF4Linear):
            adapter.base = Recomputed(adapter.base)


def growth(config: GPTConfig, way: str) -> Callable[[int, int], float]:
    """(batch, length) -> bytes of a training step, fast enough to draw.

    From `training` of one block and of two, since each block holds as much as another. What is
    saved grows with the batch, and with the length and its square, which is attention's.
    """
    one, two = (_terms(replace(config, n_layers=n), way) for n in (1, 2))
    fixed, *by_length = one + (config.n_layers - 1) * (two - one)
    return lambda batch, length: fixed + batch * float(np.polyval(by_length, length))


def _terms(config: GPTConfig, way: str) -> np.ndarray:
    """(4,): bytes that no batch changes, then those of a text's squared length, length and 1."""
    lengths = (32, 64, 128)
    rows = [training(config, way, 1, length) for length in lengths]
    saved = np.polyfit(lengths, [row["saved"] for row in rows], 2)
    return np.array([rows[0]["total"] - rows[0]["saved"], *saved])


# Prompt tuning, where lower blocks are computed once.


class StatePrompt(Adapter):
    """Rows that train before the states that a model's first block reads.

    A prompt for `catalogue.upper` models, which begin in the middle: those rows go through all of
    their blocks, and only the text's states come back. rows: (length, dim), the start.
    """

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone())
        self.handles: tuple = ()

    def put(self, model: nn.Module) -> None:
        """Watch the blocks of a BERT-like model, which are called with states and a mask."""
        blocks = list(anatomy.blocks(model))
        model.state_prompt = self
        widen = [block.register_forward_pre_hook(self.widen) for block in blocks]
        before = blocks[0].register_forward_pre_hook(self.before)
        self.handles = (*widen, before, blocks[-1].register_forward_hook(self.trim))

    def widen(self, block: nn.Module, args: tuple) -> tuple | None:
        """Let every token see the rows: a mask (n, 1, 1, length) of numbers to add."""
        if not self.enabled:
            return None
        return args[0], F.pad(args[1], (len(self.rows), 0)), *args[2:]

    def before(self, block: nn.Module, args: tuple) -> tuple | None:
        """(n, length, dim) -> (n, rows + length, dim)."""
        if not self.enabled:
            return None
        rows = self.rows.expand(len(args[0]), -1, -1)
        return torch.cat([rows, args[0]], 1), *args[1:]

    def trim(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Drop what the rows became."""
        return output[:, len(self.rows) :] if self.enabled else output

    def take_out(self, model: nn.Module, name: str) -> None:
        """Delete rows and hooks."""
        for handle in self.handles:
            handle.remove()
        del model.state_prompt


def state_prompt_(model: nn.Module, length: int, states: Tensor) -> None:
    """Put a `StatePrompt` into a model; its rows start as states of tokens drawn at random.

    states: (n, dim), to draw from, as a prompt starts as embeddings of words.
    """
    rows = states[torch.randperm(len(states))[:length]]
    StatePrompt(rows).put(model)


# Equations, side by side.

_SIGNS = {
    r"\leftarrow": "←",
    r"\odot": "⊙",
    r"\otimes": "⊗",
    r"\cdot": "·",
    r"\alpha": "α",
    r"\delta": "δ",
    r"\gamma": "γ",
    r"\lambda": "λ",
    r"\Lambda": "Λ",
    r"\mu": "μ",
    r"\eta": "η",
    r"\theta": "θ",
    r"\tau": "τ",
    r"\nabla": "∇",
    r"\sum": "Σ",
    r"\sim": "~",
    r"\approx": "≈",
    r"\lVert": "‖",
    r"\rVert": "‖",
    r"\mid": "|",
}
_ATOM = r"(?:\\[a-zA-Z]+\s*\{[^{}]*\}|\\[a-zA-Z]+|[A-Za-z\xa0]+|\d+|[^\s])"
_PIECE = rf"{_ATOM}(?:[_^](?:\{{[^{{}}]*\}}|\\[a-zA-Z]+|\S))*"


def pieces(equation: str) -> list[str]:
    """An equation's LaTeX as pieces of HTML, a symbol with its indices each."""
    text = re.sub(r"\\[td]?frac\s*\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", equation)
    text = re.sub(r"\\text\{([^{}]*)\}", lambda m: m[1].replace(" ", "\xa0"), text)
    text = re.sub(r"([_^])\{([^{}]*)\}", lambda m: m[1] + "{" + _closed(m[2]) + "}", text)
    text = re.sub(r"\\[,;! ]|\\quad|\\textstyle", " ", text)
    return [_shown(part) for part in re.findall(_PIECE, text)]


def _closed(index: str) -> str:
    return index.replace("\\ ", "\xa0").replace(" ", "")


def _shown(piece: str) -> str:
    """One piece: signs for commands, and tags for what stands below and above."""
    for mark, tag in (("_", "sub"), ("^", "sup")):
        piece = re.sub(
            rf"\{mark}(?:\{{([^{{}}]*)\}}|(\\[a-zA-Z]+|\S))",
            lambda m, tag=tag: f"<{tag}>{m[1] or m[2]}</{tag}>",
            piece,
        )
    piece = re.sub(r"\\math(?:rm|bb|cal)", "", piece)
    piece = re.sub(r"\\[a-zA-Z]+", lambda m: _SIGNS.get(m[0], m[0][1:]), piece)
    return re.sub(r"[{}\\]", "", piece).strip()


def side_by_side(first: str, second: str) -> tuple[list[tuple[str, bool]], ...]:
    """Of two equations' pieces, each with whether the other has it too, in the same order."""
    a, b = pieces(first), pieces(second)
    common = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    in_a = {place for match in common for place in range(match.a, match.a + match.size)}
    in_b = {place for match in common for place in range(match.b, match.b + match.size)}
    return _marked(a, in_a), _marked(b, in_b)


def _marked(parts: Sequence[str], common: set[int]) -> list[tuple[str, bool]]:
    return [(part, place in common) for place, part in enumerate(parts)]


def inked(name: str, parts: list[tuple[str, bool]], color: str) -> str:
    """An equation as HTML: bold where the other has the piece too, else in the color."""
    own = f"<span style='color:{color}'>"
    return f"{own}{name}:</span>  " + " ".join(
        f"<b>{piece}</b>" if same else f"{own}{piece}</span>" for piece, same in parts
    )


# Points and curves.

SIDES = {"top center": (0, 0.06), "bottom center": (0, -0.06)}
SIDES |= {"middle right": (0.04, 0), "middle left": (-0.04, 0)}


def label_sides(x: Mapping[str, float], y: Mapping[str, float], log: bool = False) -> dict:
    """Name -> the side of its point, one of `SIDES`, that is farthest from other points and names.

    log: whether x is drawn logarithmically. Sides are chosen in the order of the names.
    """
    both = np.stack([np.log10(list(x.values())) if log else list(x.values()), list(y.values())], 1)
    spots = (both - both.min(0)) / np.ptp(both, axis=0) * (0.4, 1)  # names are wider than high
    taken, sides = list(zip(x, spots)), {}
    for name, spot in zip(x, spots):
        others = [at for owner, at in taken if owner != name]
        far = {w: min(np.hypot(*(spot + d - at)) for at in others) for w, d in SIDES.items()}
        sides[name] = max(far, key=far.get)
        taken.append((name, spot + SIDES[sides[name]]))
    return sides


def ends(values: Collection[float], log: bool = False) -> list[float]:
    """An axis that has room for names beside the values."""
    low, high = np.log10([min(values), max(values)]) if log else (min(values), max(values))
    both = low - 0.18 * (high - low), high + 0.18 * (high - low)
    return [float(10**end if log else end) for end in both]


def nearest(curves: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Name -> whose mean curve is nearest, by the mean distance. curves: (seeds, points) each."""
    means = {name: np.mean(runs, 0) for name, runs in curves.items()}

    def gap(a: str, b: str) -> float:
        return float(np.abs(means[a] - means[b]).mean())

    return {a: min((b for b in means if b != a), key=lambda b, a=a: gap(a, b)) for a in means}
