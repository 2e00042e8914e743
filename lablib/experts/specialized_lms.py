"""Specialized language models with cheap inference (Grangier et al., 2024): plan early.

Lab 309. A small model must do well on a domain of which there is little text. Before the domain is
known, a large network can be trained that holds many small ones (`ProjectedLinear`, equation of
section 2.5); after it is known, generic text can be resampled to look like it
(`importance_weights`, section 2.4). Both go by clusters of the generic text.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.data.batches import Batches
from lablib.models import GPT
from lablib.training import adamw, evaluate, next_token_loss


def histogram(labels: np.ndarray, clusters: int) -> np.ndarray:
    """P(c): the share of documents in each cluster, (clusters,)."""
    return np.bincount(labels, minlength=clusters) / len(labels)


def importance_weights(generic: np.ndarray, special: np.ndarray, clusters: int) -> np.ndarray:
    """How much more often each generic document should be seen: (documents,).

    generic, special: each document's cluster, (n,). Documents of one cluster are taken to be alike,
    so that the weight is a ratio of two histograms, mean 1 over the generic documents where every
    special document's cluster has a generic one.
    """
    ratio = histogram(special, clusters) / np.maximum(histogram(generic, clusters), 1e-12)
    # w(x) = P(c(x) | special) / P(c(x) | generic)
    return ratio[generic]


class ProjectedLinear(nn.Module):
    """The weights of k small linear layers, linear in few parameters that they share.

    capacity: h, how many matrices are stored; n_experts: k, how many are made of them.
    size: m, of what is known about an expert, one vector for all its layers.
    """

    def __init__(self, in_features: int, out_features: int, capacity: int, size: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(capacity, out_features, in_features))  # T
        self.mixing = nn.Parameter(torch.empty(size, capacity))  # M
        nn.init.normal_(self.table, 0.0, 0.02)
        nn.init.normal_(self.mixing, 0.0, size**-0.5)

    def weights(self, experts: Tensor) -> Tensor:
        """experts: E, (k, m) -> (k, out, in)."""
        # W^(i)_ab = sum_q E_iq sum_r M_qr T_abr
        return torch.einsum("kq,qr,rab->kab", experts, self.mixing, self.table)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x: (k, tokens, in), a part for each expert -> (k, tokens, out)."""
        return x @ self.weights(experts).mT


class ProjectedMLP(nn.Module):
    """A SwiGLU layer for each expert, of projected weights; rows come sorted by expert."""

    def __init__(self, dim: int, width: int, capacity: int, experts: nn.Parameter):
        super().__init__()
        self.experts = experts  # E, (k, m), one for the whole network
        size = experts.shape[1]
        self.gate = ProjectedLinear(dim, width, capacity, size)
        self.up = ProjectedLinear(dim, width, capacity, size)
        self.down = ProjectedLinear(width, dim, capacity, size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (rows, length, dim), as many rows of each expert, the first's first -> x's shape."""
        parts = x.reshape(len(self.experts), -1, x.shape[-1])  # (k, tokens, dim)
        hidden = F.silu(self.gate(parts, self.experts)) * self.up(parts, self.experts)
        return self.down(hidden, self.experts).view(x.shape)


class ProjectedNetwork(nn.Module):
    """A model that is trained large and used small: one small model for each cluster.

    Feed-forward layers are projected, all else is shared, as in the paper. small: a GPT that says
    the sizes; its weights but those of the feed-forward layers are where training starts.
    """

    def __init__(self, small: GPT, n_experts: int, capacity: int = 4, size: int = 8):
        super().__init__()
        self.small = copy.deepcopy(small)
        self.experts = nn.Parameter(torch.randn(n_experts, size) * 0.5 + 1.0)  # E
        for block, plain in zip(self.small.blocks, small.blocks):
            width, dim = plain.mlp.gate.weight.shape
            block.mlp = ProjectedMLP(dim, width, capacity, self.experts)
            for role in ("gate", "up", "down"):
                start_like_(getattr(block.mlp, role), getattr(plain.mlp, role).weight, self.experts)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (rows, length), as many rows of each cluster, sorted -> logits."""
        return self.small(tokens)

    @torch.no_grad()
    def instance(self, expert: int) -> GPT:
        """The small model of one cluster: ordinary layers, and nothing of the others."""
        model = GPT(self.small.config)
        state = {k: v for k, v in self.small.state_dict().items() if ".mlp." not in k}
        for place, block in enumerate(self.small.blocks):
            for role in ("gate", "up", "down"):
                weight = getattr(block.mlp, role).weights(self.experts[expert : expert + 1])[0]
                state[f"blocks.{place}.mlp.{role}.weight"] = weight
        model.load_state_dict(state)
        return model


@torch.no_grad()
def start_like_(layer: ProjectedLinear, weight: Tensor, experts: Tensor) -> None:
    """Scale the table so that the made weights are as large as `weight`, an initialized layer's."""
    layer.table.mul_(weight.std() / layer.weights(experts).std())


def by_cluster(
    parts: Sequence[np.ndarray], rows: int, length: int, seed: int = 0
) -> Iterator[Tensor]:
    """Batches for a projected network: `rows` windows of each cluster, sorted by cluster.

    parts: each cluster's tokens. Yields (clusters * rows, length + 1) without end.
    """
    streams = [Batches(tokens, rows, length, seed + j) for j, tokens in enumerate(parts)]
    return (torch.cat(rows) for rows in zip(*streams))


def resampled(documents: np.ndarray, weights: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """n documents drawn with probabilities proportional to weights, end to end: (n * length,)."""
    draw = np.random.default_rng(seed)
    return documents[draw.choice(len(documents), n, p=weights / weights.sum())].reshape(-1)


class Special(NamedTuple):
    """A domain with little text: ids to train on, and windows to stop by and to be judged on."""

    train: np.ndarray
    valid: list[Tensor]
    test: list[Tensor]


def specialize(
    model: GPT, domain: Special, *, lr: float, rounds: int = 6, steps: int = 10, seed: int = 0
) -> GPT:
    """Fine-tune a copy, and keep it where the loss on `domain.valid` was least.

    rounds of `steps` steps each, at a constant rate; after two rounds without a gain it ends.
    """
    model = copy.deepcopy(model)
    best, kept, since = evaluate(model, domain.valid), copy.deepcopy(model.state_dict()), 0
    batches, optimizer = iter(Batches(domain.train, 8, 64, seed)), adamw(lr)(model)
    for _ in range(rounds):
        for tokens in itertools.islice(batches, steps):
            optimizer.zero_grad()
            next_token_loss(model, tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss, since = evaluate(model, domain.valid), since + 1
        if loss < best:
            best, kept, since = loss, copy.deepcopy(model.state_dict()), 0
        if since == 2:
            break
    model.load_state_dict(kept)
    return model


def total_cost(generic: float, special: float, domains: int) -> float:
    """What it costs to serve so many domains, equation 1: C_generic + C_special * N."""
    return generic + special * domains
