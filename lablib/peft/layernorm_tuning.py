"""LayerNorm tuning (Zhao et al., 2023): a language model learns to see, and only its norms train.

Lab 706. A frozen decoder gets rows of an image before its text. Stage one trains the connector that
makes these rows; stage two tunes a part of the decoder: in the paper, the gains of its norms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.digits import NAMES
from lablib.models import GPT, anatomy
from lablib.models.gpt import rotary_table
from lablib.peft.adapter import trainable
from lablib.peft.lora import lora_
from lablib.peft.subset import attention_, norms_, only_


class VisionLanguage(nn.Module):
    """A decoder that reads an image's rows, then text.

    decoder: `GPT` or transformers'. encoder: images -> (batch, rows, encoder.width); it is frozen.
    """

    def __init__(self, decoder: nn.Module, encoder: nn.Module):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder
        words = anatomy.embedding(decoder).weight
        self.connector = nn.Linear(encoder.width, words.shape[1])
        with torch.no_grad():  # rows about as large as words
            self.connector.weight.normal_(0, words.std().item() / encoder.width**0.5)
            self.connector.bias.zero_()

    def rows(self, images: Tensor, tokens: Tensor) -> Tensor:
        """What the decoder reads: the image's rows, then the tokens' vectors.

        images: (batch, 8, 8). tokens: (batch, length). Returns (batch, rows + length, dim).
        """
        seen = self.connector(self.encoder(images))  # -> (batch, rows, dim)
        read = anatomy.embedding(self.decoder)(tokens)  # -> (batch, length, dim)
        return torch.cat([seen, read], 1)

    def forward(self, images: Tensor, tokens: Tensor, asked: Tensor) -> Tensor:
        """Logits of the tokens that are asked for, from all that stands before each.

        asked: (batch, length) bool. Returns (number asked for, vocab).
        """
        x = self.rows(images, tokens)[:, :-1]
        start = x.shape[1] - tokens.shape[1]  # where the first token is predicted
        if not isinstance(self.decoder, GPT):
            return self.decoder(inputs_embeds=x).logits[:, start:][asked]
        *_, x = states(self.decoder, x)
        return self.decoder.head(self.decoder.norm(x[:, start:][asked]))


def states(decoder: GPT, x: Tensor) -> Iterator[Tensor]:
    """Each block's output in turn, of rows (batch, length, dim) in the place of tokens."""
    rotary = rotary_table(decoder.config, 0, x.shape[1], x)
    for block in decoder.blocks:
        yield (x := block(x, rotary))


class RandomFeatures(nn.Module):
    """An encoder that nobody trained: row r is max(0, W_r p + b_r) of all pixels p, drawn once."""

    def __init__(self, rows: int = 16, width: int = 64, seed: int = 0):
        super().__init__()
        self.width, random = width, torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(rows, width, 64, generator=random) / 4)
        self.register_buffer("bias", torch.randn(rows, width, generator=random) / 2)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 8, 8) -> (batch, rows, width)."""
        return F.relu(torch.einsum("bp,rwp->brw", images.flatten(1), self.weight) + self.bias)


# What stage two tunes. The paper's ways keep connector, embedding and head open (its Figure 1);
# "norms" is its LayerNorm-simple: nothing else.
WAYS = {
    "norms": lambda decoder, rank: norms_(decoder),
    "lora": lambda decoder, rank: lora_(decoder, ["query", "value"], rank),
    "lora-down": lambda decoder, rank: lora_(decoder, ["down"], rank),
    "lora-thin": lambda decoder, rank: lora_(decoder, (), rank),
    "lora-all": lambda decoder, rank: lora_(decoder, (), rank),
    "layernorm": lambda decoder, rank: norms_(decoder),
    "attention": lambda decoder, rank: attention_(decoder, ["query", "value"]),
    "mlp": lambda decoder, rank: only_(decoder, ["*.mlp.*"]),
    "full": lambda decoder, rank: only_(decoder, ["*"]),
}
# Ways that leave connector, embedding and head as they are.
ALONE = ("norms", "lora", "lora-down", "lora-thin", "lora-all")
CONNECTOR = ("connector.weight", "connector.bias")


def open_(model: VisionLanguage, way: str, rank: int = 1) -> list[str]:
    """Put a way's adapters into the decoder, in place; the names of all that is to train.

    Raises KeyError for an unknown way.
    """
    WAYS[way](model.decoder, rank)
    if way in ALONE:
        return distinct(model)
    names = anatomy.family(model.decoder)
    head = () if way == "full" else (f"{names.embedding}.weight", f"{names.head}.weight")
    only_(model.decoder, head)
    return [*distinct(model), *CONNECTOR]


def distinct(model: nn.Module) -> list[str]:
    """Names of what adapters train; of a parameter with two names, the first."""
    first = {id(p): name for name, p in reversed(trainable(model).items())}
    return [name for name, p in trainable(model).items() if first[id(p)] == name]


class Talk(NamedTuple):
    """Images and what is said of them: n rows.

    images: (n, 8, 8). tokens: (n, length) int64, padded on the right. answer, named: (n, length)
    bool, where the answer stands, and in it the digit's name. kind: (n,) places in KINDS.
    """

    images: Tensor
    tokens: Tensor
    answer: Tensor
    named: Tensor
    kind: Tensor

    def at(self, places: Tensor) -> Talk:
        """Some of the rows."""
        return Talk(*(part[places] for part in self))


# Prompt, the digit's name, and the rest of the answer; what the image shows is filled in.
KINDS = {
    "question": ("What is this number? It is a", "{name}", "."),
    "description": ("The picture: a{ink}", "{name}", " on the{side}."),
    "caption": ("The picture: a", "{name}", "."),  # of stage one
}
MIXED = ("question", "description")


def talk(images: Tensor, labels: Sequence[int], tokenizer, kinds: Sequence[str] = MIXED) -> Talk:
    """All kinds of text about all images, kind by kind. images: (n, 8, 8), from 0 to 1."""
    ids: dict[str, list[int]] = {}
    said = []
    for kind in kinds:
        for image, label in zip(images, labels, strict=True):
            parts = [part.format(**facts(image, int(label))) for part in KINDS[kind]]
            ids |= {part: tokenizer(part)["input_ids"] for part in parts if part not in ids}
            said.append([ids[part] for part in parts])
    length = max(len(prompt + name + rest) for prompt, name, rest in said)
    tokens = torch.zeros(len(said), length, dtype=torch.long)
    answer, named = torch.zeros(2, len(said), length, dtype=torch.bool)
    for row, (prompt, name, rest) in enumerate(said):
        tokens[row, : len(prompt + name + rest)] = torch.tensor(prompt + name + rest)
        answer[row, len(prompt) : len(prompt + name + rest)] = True
        named[row, len(prompt) : len(prompt + name)] = True
    kind = torch.tensor([list(KINDS).index(kind) for kind in kinds]).repeat_interleave(len(images))
    return Talk(images.repeat(len(kinds), 1, 1), tokens, answer, named, kind)


INK, SIDE = 19.5, 3.5  # about half of the scans are darker, and farther right


def facts(image: Tensor, label: int) -> dict[str, str]:
    """What can be said of an image (8, 8): words for the places in KINDS, each after a space."""
    columns = image.sum(0)
    center = (columns * torch.arange(8)).sum() / columns.sum().clamp(min=1e-6)
    words = {
        "name": NAMES[label],
        "ink": "dark" if columns.sum() > INK else "light",
        "side": "right" if center > SIDE else "left",
    }
    return {place: f" {word}" for place, word in words.items()}


def talk_loss(model: VisionLanguage, said: Talk) -> Tensor:
    """Nats a token of the answers."""
    logits = model(said.images, said.tokens, said.answer)
    return F.cross_entropy(logits.float(), said.tokens[said.answer])


@torch.no_grad()
def answers(model: VisionLanguage, said: Talk, batch: int = 256) -> dict[str, Tensor]:
    """How a model answers, row by row: (n,) each.

    loss: nats of the whole answer; count: its tokens; exact: whether greedy decoding gives just it;
    named: whether the digit's name comes out, where what stands before it was right.
    """
    rows = []
    for places in torch.arange(len(said.kind)).split(batch):
        part = said.at(places)
        logits, right = model(part.images, part.tokens, part.answer).float(), part.tokens
        loss, hit = torch.zeros(part.answer.shape), torch.ones(part.answer.shape).bool()
        loss[part.answer] = F.cross_entropy(logits, right[part.answer], reduction="none")
        hit[part.answer] = logits.argmax(-1) == right[part.answer]
        rows.append((loss.sum(1), part.answer.sum(1), hit.all(1), (hit | ~part.named).all(1)))
    keys = ("loss", "count", "exact", "named")
    return {key: torch.cat(parts) for key, parts in zip(keys, zip(*rows), strict=True)}


def gain_gradient(x: Tensor, upstream: Tensor, eps: float) -> Tensor:
    """What the gains of y = g * x / rms(x) get: the sum over tokens of upstream * x / rms(x).

    x: what the norm reads, and upstream: dL/dy; (..., dim) each. Returns (dim,).
    """
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()  # (..., dim)
    return (upstream * normed).flatten(0, -2).sum(0)  # dL/dg_i = sum_t dL/dy_ti * x_ti / rms(x_t)


@torch.no_grad()
def similarity(model: VisionLanguage, said: Talk) -> float:
    """Mean cosine between what neighboring blocks put out, over places and pairs of blocks."""
    outputs = states(model.decoder, model.rows(said.images, said.tokens))
    alike = [F.cosine_similarity(a, b, -1).mean() for a, b in pairwise(outputs)]
    return torch.stack(alike).mean().item()


def gains(decoder: nn.Module) -> dict[str, Tensor]:
    """Dotted name -> gain (dim,), of all norms, in their order."""
    return {name: norm.weight.detach() for name, norm in anatomy.norms(decoder).items()}


@contextlib.contextmanager
def mixed(decoder: nn.Module, share: float) -> Iterator[None]:
    """In its block, each tuned norm's gain is so far on the way from its old one, 0, to 1, its new.

    decoder: its norms are tuned, as `norms_` leaves them. Afterwards the new gains are back.
    """
    tuned = list(anatomy.norms(decoder).values())
    new = [norm.weight.detach().clone() for norm in tuned]
    with torch.no_grad():
        for norm, gain in zip(tuned, new, strict=True):
            norm.weight.copy_(norm.base.weight.lerp(gain, share))
    try:
        yield
    finally:
        with torch.no_grad():
            for norm, gain in zip(tuned, new, strict=True):
                norm.weight.copy_(gain)


def gradient_variance(model: VisionLanguage, batches: Sequence[Talk]) -> float:
    """Variance over batches of a gain's gradient, mean over all gains of all norms."""
    chosen = [norm.weight for norm in anatomy.norms(model.decoder).values()]
    asked = [gain.requires_grad for gain in chosen]
    for gain in chosen:
        gain.requires_grad_(True)
    rows = [torch.cat(torch.autograd.grad(talk_loss(model, said), chosen)) for said in batches]
    for gain, before in zip(chosen, asked, strict=True):
        gain.requires_grad_(before)
    return torch.stack(rows).var(0).mean().item()


class Counts(NamedTuple):
    """Parameters of a Llama and what is put before it."""

    norms: int  # of the blocks, two each
    words: int  # embedding and head
    connector: int
    total: int


def llama_counts(
    dim: int, blocks: int, ffn_dim: int, vocab: int = 32_000, seen: int = 1024, encoder: int = 0
) -> Counts:
    """Of a Llama-2 with one head a key, a linear connector from `seen` features, and an encoder."""
    norms, words, connector = 2 * dim * blocks, 2 * vocab * dim, (seen + 1) * dim
    inner = blocks * (4 * dim**2 + 3 * dim * ffn_dim)
    total = norms + dim + words + inner + connector + encoder  # dim: the final norm
    return Counts(norms, words, connector, total)
