"""HyperTuning (Phang et al., 2022): a model that reads a few examples and writes an adapter.

Lab 708. phi = H((x_1, y_1), ..., (x_K, y_K)), and the frozen model's loss is
-log p(y | x; theta, phi): only H trains, and a new task costs one pass through it, no gradient.
A phi is {place: (rows, rows)}: A and B of a LoRA, or keys and values of a prefix, a set a task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.models.classifier import Classifier, Encoded
from lablib.peft.adapter import Adapter, adapters, matrix
from lablib.peft.lora import LoRALinear
from lablib.peft.prefix import Prefix, _attentions, _Rows

Phi = dict[str, tuple[Tensor, Tensor]]
KINDS = ("lora", "prefix")


class HyperModel(nn.Module):
    """H: reads labelled examples, in any order, and writes `rows` rows of each kind and place.

    places: name -> features of its two kinds of rows, as `slots_` returns them. dim: of an
    example's vector. rows: a LoRA's rank, or a prefix's length.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[int, int]],
        dim: int,
        rows: int,
        width: int = 128,
        n_layers: int = 4,
        n_labels: int = 2,
        heads: int = 4,
    ):
        super().__init__()
        self.places = tuple(places)
        layer = {"dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
        size = (width, heads, 4 * width)
        self.read = nn.Linear(dim, width)
        self.sign = nn.Parameter(torch.ones(n_labels, width))
        self.label = nn.Parameter(0.3 * torch.randn(n_labels, width))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(*size, **layer), n_layers, enable_nested_tensor=False
        )
        self.asked = nn.Parameter(0.1 * torch.randn(rows, width))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*size, **layer), 1)
        self.writers = nn.ModuleList(
            nn.ModuleList(_writer(width, features) for features in pair) for pair in places.values()
        )
        self.start()

    def forward(self, examples: Tensor, labels: Tensor) -> Phi:
        """phi of some tasks. examples: (tasks, k, dim). labels: (tasks, k) int64.

        Returns {place: two tensors of (tasks, rows, features)}.
        """
        told = self.read(examples) * self.sign[labels] + self.label[labels]  # (t, k, width)
        memory = self.encoder(told)  # every example sees all others
        asked = self.asked.expand(len(told), -1, -1)  # (t, rows, width): fixed, learned inputs
        made = self.decoder(asked, memory)  # (t, rows, width)
        return {
            place: tuple(writer(made) for writer in pair)  # width -> features, a row each
            for place, pair in zip(self.places, self.writers, strict=True)
        }

    @torch.no_grad()
    def start(self) -> None:
        """Let the first rows point from the mean of label 0's examples to that of the last label's.

        The second rows start at zero, as B does in LoRA. Nothing but a start: all of it trains.
        """
        width, layers = self.read.out_features, [*self.encoder.layers, *self.decoder.layers]
        nn.init.orthogonal_(self.read.weight)
        self.sign.copy_(torch.linspace(-1, 1, len(self.sign))[:, None].expand_as(self.sign))
        for layer in layers:  # each adds nothing to what passes by
            for last in (layer.self_attn.out_proj, layer.linear2):
                last.weight.zero_(), last.bias.zero_()
        for layer in self.decoder.layers:  # but this: the mean over examples
            layer.multihead_attn.in_proj_weight[2 * width :] = torch.eye(width)
            layer.multihead_attn.out_proj.weight.copy_(torch.eye(width))
        for first, second in self.writers:
            nn.init.orthogonal_(first[0].weight)
            if len(first[2].weight) == self.read.in_features:  # back to where it was read from
                back = (first[0].weight @ self.read.weight).T
                first[2].weight.copy_(3 * back / len(back) ** 0.5)
            second[2].weight.zero_()


def _writer(width: int, features: int) -> nn.Module:
    """A two-layer MLP: one output of the decoder -> one row."""
    writer = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, features))
    nn.init.normal_(writer[2].weight, std=features**-0.5)
    nn.init.zeros_(writer[2].bias)
    return writer


class HyperTuned(nn.Module):
    """H and the frozen model that it adapts.

    hyper: a `HyperModel`, or what stands in its place. frozen: a model with slots, `slots_`, or a
    classifier on one.
    """

    def __init__(self, hyper: nn.Module, frozen: nn.Module):
        super().__init__()
        self.hyper, self.frozen = hyper, frozen

    def forward(self, examples: Tensor, labels: Tensor, texts: Encoded | Tensor) -> Tensor:
        """What the frozen model makes of each task's texts under the task's own phi."""
        backbone = self.frozen.model if isinstance(self.frozen, Classifier) else self.frozen
        with given(backbone, self.hyper(examples, labels)):
            return self.frozen(texts)

    def learning(self) -> list[str]:
        """Names of the parameters that train: H's, none of the frozen model's."""
        return [name for name, _ in self.named_parameters() if name.startswith("hyper.")]


class Segments(NamedTuple):
    """A stretch of text in four parts. H sees a and d; the frozen model sees b and predicts c."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


def segments(text: Tensor, sizes: Sequence[int]) -> Segments:
    """Cut the text's last axis, (..., n), into A, B, C, D of these sizes, one after another.

    Raises ValueError unless the four sizes are positive and fill it.
    """
    if len(sizes) != 4 or min(sizes) < 1 or sum(sizes) != text.shape[-1]:
        raise ValueError(f"{list(sizes)} are no four parts of {text.shape[-1]} tokens")
    return Segments(*text.split(list(sizes), -1))


def conditional_loss(
    tuned: HyperTuned, text: Tensor, sizes: Sequence[int], ends: Tensor | None = None
) -> Tensor:
    """Hyperpretraining's loss: nats a token of C after B, under what H writes from A and D.

    tuned: its frozen model is a decoder that returns logits. text: (n, sum of sizes) tokens.
    ends: other text, of the same shape, that A and D are taken from instead.
    """
    _, b, c, _ = segments(text, sizes)
    a, _, _, d = segments(text if ends is None else ends, sizes)
    side = torch.cat([torch.zeros_like(a), torch.ones_like(d)], 1)  # (n, a + d): of A, or of D
    table = anatomy.embedding(tuned.frozen).weight
    words = table[torch.cat([a, d], 1)] / table.std()  # (n, a + d, dim)
    logits = tuned(words, side, torch.cat([b, c[:, :-1]], 1))  # (n, b + c - 1, vocab)
    return F.cross_entropy(logits[:, b.shape[1] - 1 :].flatten(0, 1), c.flatten())


# What H learns from.


class Tasks(NamedTuple):
    """Tasks as places in a `Bank`: examples with labels, and texts asked about with answers."""

    examples: Tensor  # (tasks, k)
    labels: Tensor
    asked: Tensor  # (tasks, q)
    answers: Tensor

    def at(self, places) -> Tasks:
        """Those tasks alone."""
        return Tasks(*(part[places] for part in self))


class Bank(NamedTuple):
    """Pieces of text, by group as they come: `size` a group.

    encoded: their states below the last block. vectors: (n, dim), what H reads of each. kinds: what
    each group is from. center: (dim,), what is taken off.
    """

    encoded: Encoded
    vectors: Tensor
    kinds: list[str]
    size: int
    center: Tensor


# Where a phi goes.


class LoRASlot(Adapter):
    """A projection that adds, of each task in turn, the low-rank change that `given` names."""

    phi: tuple[Tensor, Tensor] | None = None

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """x: (tasks * texts, length, in) -> (..., out), a task's texts one after another."""
        if self.phi is None or not self.enabled:
            return self.base(x)
        down, up = self.phi  # A (t, r, in), B^T (t, r, out)
        of_tasks = x.reshape(len(down), -1, x.shape[-1])  # (t, texts * length, in)
        change = of_tasks @ down.mT @ up  # x A^T B^T: in -> r -> out
        return self.base(x) + change.reshape(*x.shape[:-1], -1)

    def take_out(self, model: nn.Module, name: str) -> None:
        """Put the base back."""
        anatomy.replace(model, name, self.base)


class PrefixSlot(Prefix):
    """Key and value rows of each task in turn before those of one attention."""

    phi: tuple[Tensor, Tensor] | None = None

    def __init__(self):
        Adapter.__init__(self)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values: each (tasks, length, width)."""
        return self.phi

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """As `Prefix.look`, with every task's own rows."""
        if self.phi is None:
            return None
        self.length = self.phi[0].shape[1]
        changed = super().look(module, args, kwargs)
        if changed is not None:
            rest = changed[1]
            cache = next(name for name, value in rest.items() if isinstance(value, _Rows))
            rest[cache] = _TaskRows(rest[cache].rows, rest[cache].cache)
        return changed


class _TaskRows(_Rows):
    """The rows of several tasks, whose texts stand one after another in the batch."""

    def _before(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, _, dim = keys.shape
        both = []
        for rows, there in zip(self.rows, (keys, values), strict=True):
            split = rows.to(there.dtype).unflatten(-1, (heads, dim)).transpose(1, 2)  # (t, h, l, d)
            each = split.repeat_interleave(batch // len(rows), 0)
            both.append(torch.cat([each, there], 2))
        return both[0], both[1]


def slots_(
    model: nn.Module, kind: str = "lora", roles: Sequence[str] = (), below: int = 0
) -> dict[str, tuple[int, int]]:
    """Make places for a phi in the blocks from number `below` on; empty, they change nothing.

    kind: "lora", in the projections of these roles, none for all, or "prefix", in all attentions.
    Returns each place's name with the features of its two kinds of rows.
    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
    upper = {id(part) for block in anatomy.blocks(model)[below:] for part in block.modules()}
    layers = anatomy.projections(model, *roles) if kind == "lora" else _attentions(model)
    names = [name for name in layers if id(model.get_submodule(name)) in upper]
    if kind == "lora":
        for name in names:
            anatomy.replace(model, name, LoRASlot(layers[name]))
        return {name: tuple(reversed(matrix(layers[name]).shape)) for name in names}
    for name in names:
        attention, slot = model.get_submodule(name), PrefixSlot()
        attention.prefix = slot
        attention.register_forward_pre_hook(slot.look, with_kwargs=True)
    return {name: (layers[name], layers[name]) for name in names}


@contextlib.contextmanager
def given(model: nn.Module, phi: Phi) -> Iterator[None]:
    """The model with a phi in its slots.

    A batch holds the texts of the first task, then as many of the second, and so on.
    Raises ValueError when a place of phi is no slot of the model.
    """
    slots = slots_of(model)
    if strange := phi.keys() - slots.keys():
        raise ValueError(f"{min(strange)} is no slot: put them in with slots_")
    try:
        for place, pair in phi.items():
            slots[place].phi = pair
        yield
    finally:
        for slot in slots.values():
            slot.phi = None


def slots_of(model: nn.Module) -> dict[str, LoRASlot | PrefixSlot]:
    """Place -> slot: a prefix's place is its attention."""
    found = adapters(model).items()
    lora = {name: slot for name, slot in found if isinstance(slot, LoRASlot)}
    prefix = {n.removesuffix(".prefix"): s for n, s in found if isinstance(s, PrefixSlot)}
    return lora | prefix


@torch.no_grad()
def install_(model: nn.Module, phi: Phi, task: int = 0) -> None:
    """Put one task's phi into a plain model as ordinary adapters, from which tuning can start.

    The same function as under `given`: LoRA of factor 1, or a prefix. `trainable`, `remove_` and,
    of LoRA, `merge_` then do what they do to any adapter.
    """
    for place, pair in phi.items():
        first, second = (rows[task].detach().clone() for rows in pair)  # (rows, features)
        layer = model.get_submodule(place)
        if hasattr(layer, "weight"):
            adapter = LoRALinear(layer, len(first))
            adapter.down, adapter.up = nn.Parameter(first), nn.Parameter(second.T.contiguous())
            anatomy.replace(model, place, adapter)
        else:
            adapter = Prefix(*first.shape)
            adapter.keys, adapter.values = nn.Parameter(first), nn.Parameter(second)
            layer.prefix = adapter
            layer.register_forward_pre_hook(adapter.look, with_kwargs=True)


class OwnPhi(nn.Module):
    """A phi whose rows train, each task's by themselves: ordinary tuning, of many tasks at once."""

    def __init__(self, phi: Phi):
        super().__init__()
        self.places = tuple(phi)
        self.pairs = nn.ModuleList(
            nn.ParameterList(rows.detach().clone() for rows in pair) for pair in phi.values()
        )

    def forward(self, examples: Tensor, labels: Tensor) -> Phi:
        """The rows, whatever the examples are."""
        return {place: tuple(pair) for place, pair in zip(self.places, self.pairs, strict=True)}


class SharedPhi(nn.Module):
    """The control: one phi for all tasks, which trains as H does and reads no example.

    A starts drawn and B zero, as LoRA's do; a prefix's rows start drawn.
    """

    def __init__(self, places: Mapping[str, tuple[int, int]], rows: int, kind: str = "lora"):
        super().__init__()
        self.places = tuple(places)
        pairs = [[torch.randn(rows, n) / n**0.5 for n in pair] for pair in places.values()]
        self.pairs = nn.ModuleList(
            nn.ParameterList([first, 0 * second if kind == "lora" else second])
            for first, second in pairs
        )

    def forward(self, examples: Tensor, labels: Tensor) -> Phi:
        """The same rows for each task; see `HyperModel.forward`."""
        return {
            place: tuple(rows.expand(len(examples), -1, -1) for rows in pair)
            for place, pair in zip(self.places, self.pairs, strict=True)
        }


class InContext(nn.Module):
    """The other control: the examples themselves as a prefix, beside one shared phi.

    An example's vector and its label's go through the frozen attention's own key and value
    projections, so every text attends to all examples. Only label vectors and the shared LoRA
    train.
    """

    def __init__(self, shared: SharedPhi, dim: int, n_labels: int = 2):
        super().__init__()
        self.shared = shared
        self.label = nn.Parameter(torch.randn(n_labels, dim))
        self.place, self.projections = "", ()

    def attend(self, model: nn.Module, place: str) -> None:
        """Put the examples before this attention's keys."""
        attention = model.get_submodule(place)
        self.place, self.projections = place, (attention.key, attention.value)

    def forward(self, examples: Tensor, labels: Tensor) -> Phi:
        """The shared rows, and keys and values of the examples: each (tasks, k, width)."""
        marked = examples + self.label[labels]
        key, value = self.projections
        return self.shared(examples, labels) | {self.place: (key(marked), value(marked))}
