"""L3Prune (Thennal D K et al., 2024): a text encoder out of the first blocks of a language model.

    e^(l)(x) = pool(norm(h^(l)(x)))             what the model gives when it is cut after block l
    L(l) = -mean_i log( e(q_i, d_i) / sum_j (e(q_i, d_j) + e(q_i, n_j)) ),  e(a, b) = exp(20 cos)
    small = argmin_{l <= N/2} L(l),  large = argmin_{l > N/2} L(l)

Lab 1003. One pass without training gives L for every depth l of N, since all cuts share their lower
blocks. The blocks above the chosen depth go, and then the rest is trained. From the authors'
repository (thennal10/l3prune): rank 16, rate 2e-4, 1,000 steps, position-weighted means, every
layer normed by the final norm, and which half the middle block is in.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.embeddings.contrastive import info_nce
from lablib.embeddings.encode import Encoder, batches, hidden_layers, pool
from lablib.models import GPT, GPTConfig, anatomy
from lablib.models.gpt import Block
from lablib.modes import kept_modes

SCALE = 20.0  # of the cosines, 1 / temperature
BATCH = 64  # triples


def truncate(model: nn.Module, n: int) -> nn.Module:
    """A copy of the model that ends after its first n blocks; final norm and head stay.

    Raises ValueError unless it has so many blocks.
    """
    blocks = anatomy.blocks(model)
    if not 1 <= n <= len(blocks):
        raise ValueError(f"{n} blocks are to stay, of {len(blocks)}")
    gone = {id(block): None for block in blocks[n:]}  # which are not copied
    shorter = copy.deepcopy(model, gone)
    del anatomy.blocks(shorter)[n:]
    _count_blocks(shorter)
    return shorter


def layer_vectors(encoder: Encoder, texts: Sequence[str], batch_tokens: int = 1024) -> Tensor:
    """(n_layers, n, dim): each text's vector of length 1 for every depth, from one pass."""
    encoded, parts = encoder.tokens(texts), []
    order = batches(encoded.mask.sum(1).tolist(), batch_tokens)
    with torch.inference_mode(), kept_modes(encoder.model):
        encoder.model.eval()
        for places in order:
            some = encoded.at(places)
            h = hidden_layers(encoder.model, some, encoder.causal)[1:-1]  # a state a block
            normed = _final_norm(encoder.model)(h)  # (n_layers, n, length, dim)
            parts.append(pool(normed, some.mask, encoder.pooling))  # -> (n_layers, n, dim)
    back = torch.tensor([place for places in order for place in places]).argsort()
    return F.normalize(torch.cat(parts, 1)[:, back].float(), dim=-1)


def layer_losses(
    encoder: Encoder, triples: Sequence[Sequence[str]], batch: int = BATCH, scale: float = SCALE
) -> Tensor:
    """L(l) of every depth, (n_layers,): the mean over batches of triples.

    triples: (query, document, hard negative) texts. The encoder's layer is left aside.
    Raises ValueError without triples. Source: the authors' code, which takes 100 batches of 64.
    """
    if not triples:
        raise ValueError("there are no triples to compute losses of")
    groups = [triples[start : start + batch] for start in range(0, len(triples), batch)]
    rows = [losses_of(*(layer_vectors(encoder, side) for side in zip(*g)), scale) for g in groups]
    return torch.stack(rows).mean(0)


def losses_of(q: Tensor, d: Tensor, n: Tensor, scale: float = SCALE) -> Tensor:
    """L(l) of one batch: q, d, n (n_layers, batch, dim) -> (n_layers,)."""
    return torch.stack([info_nce(*layer, temperature=1 / scale) for layer in zip(q, d, n)])


class Depths(NamedTuple):
    """How many blocks stay."""

    small: int
    large: int


def choose(losses: Sequence[float] | Tensor) -> Depths:
    """The depths of least loss in the lower half of the blocks, and in the upper half.

    losses: (n_layers,), that of one block first. Of an odd number, the upper half has one more.
    Raises ValueError for fewer than two.
    """
    values = torch.as_tensor(losses)
    if len(values) < 2:
        raise ValueError(f"two halves need two blocks at least, not {len(values)}")
    half = len(values) // 2
    return Depths(1 + int(values[:half].argmin()), 1 + half + int(values[half:].argmin()))


def cut(encoder: Encoder, n: int) -> Encoder:
    """The same encoder over a copy of the model that ends after its first n blocks."""
    return replace(encoder, model=truncate(encoder.model, n), layer=None)


def _final_norm(model: nn.Module) -> nn.Module:
    """Nothing in BERT, whose blocks end with a norm."""
    return anatomy.final_norm(model) if anatomy.family(model).final_norm else nn.Identity()


def _count_blocks(model: nn.Module) -> None:
    n = len(anatomy.blocks(model))
    if isinstance(model, GPT):
        model.config = replace(model.config, n_layers=n)
    else:
        model.config.num_hidden_layers = n


# What goes, counted from shapes alone.

PHI = {"dim": 3072, "n_layers": 32, "n_heads": 32, "ffn_dim": 8192, "tied": False}
FOUR = {  # the paper's models, as their published configurations have them
    "Llama-3-8B": GPTConfig(128_256, 4096, 32, 32, 8, ffn_dim=14_336, tied=False),
    "Mistral-7B": GPTConfig(32_000, 4096, 32, 32, 8, ffn_dim=14_336, tied=False),
    "Qwen2-7B": GPTConfig(152_064, 3584, 28, 28, 4, ffn_dim=18_944, qkv_bias=True, tied=False),
    "Phi-3-mini": GPTConfig(32_064, **PHI),
}
# Of the authors' training configurations, key percent_prune: above 1 it is a number of blocks.
CONFIGURED = {"Llama-3-8B": 25, "Mistral-7B": 22, "Qwen2-7B": 25, "Phi-3-mini": 25}
SMOLLM2 = GPTConfig(49_152, 576, 30, 9, 3, ffn_dim=1536, tied=True)


def removed(config: GPTConfig, n: int, embedding: bool = True, head: bool = False) -> float:
    """Per cent of the parameters that go when the first n blocks stay.

    embedding, head: whether these count; a tied head is the embedding and counts once. An encoder
    has no head. Nothing is allocated.
    """
    with torch.device("meta"):
        block = sum(p.numel() for p in Block(config).parameters())
    table = config.vocab_size * config.dim * (embedding + (head and not config.tied))
    whole = config.n_layers * block + config.dim + table  # dim: of the final norm
    return 100 * (config.n_layers - n) * block / whole
