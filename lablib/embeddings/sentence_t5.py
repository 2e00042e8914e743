"""Multilingual Sentence-T5 (Yano et al., 2024): one vector per sentence, the same in all languages.

Lab 1001. The encoder of mT5, the mean of its states, a linear projection, cosine; trained on
(sentence, entailed sentence, contradicting sentence), in English alone or across languages. The
encoder is that of mT5 (Xue et al., 2020), and loads transformers' `MT5EncoderModel` exactly. The
model card pools by the mean; which projections get LoRA was not found: those of attention, here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.embeddings.encode import batches, pad, pool
from lablib.models import anatomy
from lablib.models.classifier import Encoded, upper_states
from lablib.peft.adapter import trainable
from lablib.peft.lora import LoRALinear


@dataclass(frozen=True)
class T5Config:
    """Shapes of an encoder; attention is n_heads * head_dim wide, whatever dim is."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    ffn_dim: int
    head_dim: int = 64
    n_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


class SentenceT5(nn.Module):
    """Encoded -> (n, dim) vectors of length 1, so that a product is a cosine.

    projected: whether a linear projection follows the mean, without a bias.
    """

    def __init__(self, encoder: T5Encoder, projected: bool = True):
        super().__init__()
        self.encoder = encoder
        dim = encoder.config.dim
        self.projection = nn.Linear(dim, dim, bias=False) if projected else nn.Identity()

    def forward(self, encoded: Encoded) -> Tensor:
        tokens, mask = encoded
        states = self.encoder(tokens, mask)  # (n, length) -> (n, length, dim)
        mean = pool(states, mask, "mean")  # -> (n, dim)
        return F.normalize(self.projection(mean), dim=-1)


class T5Encoder(nn.Module):
    """mT5's encoder: tokens (n, length) and mask -> states (n, length, dim)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.bias = nn.Embedding(config.n_buckets, config.n_heads)  # one for all layers
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.eps)
        if self.embedding.weight.device.type != "meta":
            initialize_(self)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(tokens)  # (n, length) -> (n, length, dim), not scaled
        hidden = (~mask)[:, None, None].to(x.dtype) * torch.finfo(x.dtype).min
        bias = self.position_bias(tokens.shape[1]) + hidden  # (n, heads, length, length)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def position_bias(self, length: int) -> Tensor:
        """(heads, length, length), added to the scores of query i and key j: b[bucket(j - i)]."""
        place = torch.arange(length, device=self.bias.weight.device)
        distance = place[None, :] - place[:, None]  # (length, length), j - i
        buckets = bucket(distance, self.config.n_buckets, self.config.max_distance)
        return self.bias(buckets).permute(2, 0, 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); no linear layer has a bias."""

    def __init__(self, config: T5Config):
        super().__init__()
        d, inner = config.dim, config.n_heads * config.head_dim
        self.n_heads = config.n_heads
        self.attention_norm = nn.RMSNorm(d, config.eps)
        self.q, self.k, self.v = (nn.Linear(d, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, config.eps)
        self.gate, self.up = (nn.Linear(d, config.ffn_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(config.ffn_dim, d, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (self.split(part(h)) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # no 1/sqrt(d)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))  # heads side by side again
        h = self.ffn_norm(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))

    def split(self, x: Tensor) -> Tensor:
        """(n, length, heads * head_dim) -> (n, heads, length, head_dim)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


def bucket(distance: Tensor, n_buckets: int = 32, max_distance: int = 128) -> Tensor:
    """Which bias a distance gets: near ones one each, far ones shared, logarithmically wider.

    distance: int64, key's place minus query's; half of the buckets are for keys that come later.
    """
    side = n_buckets // 2
    exact = side // 2
    far = distance.abs().clamp(min=exact).float() / exact
    grown = exact + (far.log() / math.log(max_distance / exact) * (side - exact)).long()
    near = torch.where(distance.abs() < exact, distance.abs(), grown.clamp(max=side - 1))
    return near + side * (distance > 0)


@torch.no_grad()
def initialize_(encoder: T5Encoder) -> None:
    """T5's start: queries are drawn small, since scores are not divided by anything."""
    c = encoder.config
    inner = c.n_heads * c.head_dim
    encoder.embedding.weight.normal_()
    encoder.bias.weight.normal_(std=c.dim**-0.5)
    for block in encoder.blocks:
        block.q.weight.normal_(std=(c.dim * c.head_dim) ** -0.5)
        for layer in (block.k, block.v, block.gate, block.up):
            layer.weight.normal_(std=c.dim**-0.5)
        block.o.weight.normal_(std=inner**-0.5)
        block.down.weight.normal_(std=c.ffn_dim**-0.5)


# The family, and transformers' models.

_MT5 = {
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
    "XL": (2048, 24, 32, 5120),
    "XXL": (4096, 24, 64, 10_240),
}
MT5 = {name: T5Config(250_112, *sizes) for name, sizes in _MT5.items()}


def n_parameters(config: T5Config) -> dict[str, int]:
    """Numbers of an encoder by its configuration: "embedding", "blocks" and "total"."""
    inner = config.n_heads * config.head_dim
    attention = 4 * config.dim * inner  # queries, keys, values, output
    ffn = 3 * config.dim * config.ffn_dim  # gate, up, down
    blocks = config.n_layers * (attention + ffn + 2 * config.dim)
    embedding = config.vocab_size * config.dim
    rest = config.n_buckets * config.n_heads + config.dim
    return {"embedding": embedding, "blocks": blocks, "total": embedding + blocks + rest}


_PLACES = {
    "SelfAttention.": "",
    "DenseReluDense.": "",
    "wi_0": "gate",
    "wi_1": "up",
    "wo": "down",
    "block.": "blocks.",
    "layer.0.layer_norm": "attention_norm",
    "layer.1.layer_norm": "ffn_norm",
    "layer.0.": "",
    "layer.1.": "",
    "final_layer_norm": "norm",
}


def from_transformers(model: nn.Module) -> T5Encoder:
    """Our encoder with the numbers of a `MT5EncoderModel`, or of a T5's with a gated GELU.

    Raises ValueError for one whose feed-forward layer isn't gated.
    """
    c = model.config
    if not c.is_gated_act:
        raise ValueError(f"{c.feed_forward_proj!r}: only a gated feed-forward layer is built here")
    buckets = c.relative_attention_num_buckets, c.relative_attention_max_distance
    shapes = c.vocab_size, c.d_model, c.num_layers, c.num_heads, c.d_ff, c.d_kv
    encoder = T5Encoder(T5Config(*shapes, *buckets, c.layer_norm_epsilon))
    state = {"embedding.weight": model.get_input_embeddings().weight}
    for name, tensor in model.encoder.state_dict().items():
        if "relative_attention_bias" in name:
            state["bias.weight"] = tensor
        elif "embed_tokens" not in name:
            state[_renamed(name)] = tensor
    encoder.load_state_dict(state)
    return encoder.to(model.dtype).train(model.training)


def _renamed(name: str) -> str:
    for theirs, ours in _PLACES.items():
        name = name.replace(theirs, ours)
    return name


def lora_attention_(encoder: T5Encoder, rank: int = 8, alpha: float | None = None) -> list[str]:
    """Put a low-rank change beside every projection of attention; names of what trains then."""
    for block in encoder.blocks:
        for name in ("q", "k", "v", "o"):
            setattr(block, name, LoRALinear(getattr(block, name), rank, alpha))
    return list(trainable(encoder))


# Texts as bytes: no vocabulary, so that all languages share what they have in common.

N_BYTES = 259  # 0 pads, 1 ends a text, 2 is not used, as in ByT5; then the 256 bytes


def byte_tokens(texts: Sequence[str], length: int = 64) -> Encoded:
    """Texts as UTF-8 bytes, cut at `length`, an end included.

    Raises ValueError when there is no text.
    """
    if not texts:
        raise ValueError("there is no text to encode")
    return pad([[3 + byte for byte in text.encode()][: length - 1] + [1] for text in texts])


def byte_config(dim: int, n_layers: int = 2) -> T5Config:
    """A small encoder of bytes, in the family's proportions: heads of 32, a layer of 2.5 dim."""
    return T5Config(N_BYTES, dim, n_layers, max(1, dim // 32), dim * 5 // 2, head_dim=32)


def vectors(model: SentenceT5, encoded: Encoded, budget: int = 2048) -> Tensor:
    """(n, dim), differentiable; texts of like length share a batch, padding included in budget.

    Computed where the model lies, and left there.
    """
    device, parts = next(model.parameters()).device, batches(encoded.mask.sum(1).tolist(), budget)
    moved = [Encoded(*(part.to(device) for part in encoded.at(places))) for places in parts]
    made = torch.cat([model(part) for part in moved])
    order = torch.tensor([place for places in parts for place in places])
    return made[order.argsort()]


def term_by_term(
    anchor: Sequence, positive: Sequence, negative: Sequence, temperature: float = 0.05
) -> float:
    """The contrastive loss of unit vectors (n, dim) as the paper's sum has it, one exp at a time.

    -log exp(h_i h_i+ / t) / sum_j [exp(h_i h_j+ / t) + exp(h_i h_j- / t)], a mean over i. It is
    what `contrastive.info_nce`, which trains, is compared with.
    """

    def weight(h: Sequence, other: Sequence) -> float:
        return math.exp(sum(float(x) * float(y) for x, y in zip(h, other)) / temperature)

    losses = [
        -math.log(weight(h, own) / sum(weight(h, other) for other in [*positive, *negative]))
        for h, own in zip(anchor, positive)
    ]
    return sum(losses) / len(losses)


# What texts share that no one had to learn.

_COPIED = re.compile(
    r"%\(\w+\)\w|%\w|<[^>]*>|\{[^}]*\}|[A-Z]{2,}\w*|[A-Z]\w*[A-Z]\w*|Django|[\w.:/]*\d[\w.:/]*"
)


def masked(text: str) -> str:
    """The text without what translators copy: placeholders, tags, numbers, words of capitals."""
    return " ".join(_COPIED.sub("_", text).split()) or text


def grams(text: str) -> frozenset[str]:
    """Its pieces of three letters, in lower case, with a space around it."""
    padded = f" {text.lower()} "
    return frozenset(padded[at : at + 3] for at in range(len(padded) - 2))


def overlap(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """(len(first), len(second)): the share of pieces of three letters that two texts share."""
    a, b = (list(map(grams, texts)) for texts in (first, second))
    return np.array([[len(x & y) / len(x | y) for y in b] for x in a])


def by_letters(columns: Sequence[Sequence[str]]) -> list[float]:
    """% of the texts of column 0 whose partner shares most pieces with them, in each other one."""
    english, *others = columns
    shared = (overlap(english, other).argmax(1) for other in others)
    return [100 * float((best == np.arange(len(english))).mean()) for best in shared]


# LoRA in the upper blocks of an encoder that transformers has, its lower ones computed once.


def lora_above_(model: nn.Module, below: int, rank: int = 8) -> list[str]:
    """Put a low-rank change beside attention's projections, above so many blocks; what trains."""
    roles = ("query", "key", "value", "output")
    chosen = list(anatomy.projections(model, *roles).items())[len(roles) * below :]
    for name, layer in chosen:
        anatomy.replace(model, name, LoRALinear(layer, rank))
    return list(trainable(model))


def upper_vectors(model: nn.Module, encoded: Encoded, below: int) -> Tensor:
    """(n, dim) of length 1, from the states (n, length, dim) after so many blocks: their mean."""
    states = upper_states(model, encoded, below)
    return F.normalize(pool(states, encoded.mask, "mean"), dim=-1)
