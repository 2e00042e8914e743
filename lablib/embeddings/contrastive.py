"""Learning vectors by contrast: of all texts of a batch, which one belongs to this one?

    L = -mean_i log( e(a_i, b_i) / sum_j (e(a_i, b_j) + e(a_i, c_j)) ),   e(a, b) = exp(s(a, b) / t)

s is the cosine, b_i the text that belongs to a_i, c_j hard negatives: texts that look as if they
did. A symmetric loss asks the same of b.
Sources: van den Oord et al. (2018); Gao et al. (2021) for hard negatives; Gao et al. (2021,
"Scaling deep contrastive learning batch size") for `grad_cache`; Kusupati et al. (2022) for
`matryoshka`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[..., Tensor]  # of vectors a, b and, where there are some, negatives


def info_nce(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None = None,
    temperature: float = 0.05,
    symmetric: bool = False,
) -> Tensor:
    """The loss above, in nats: a, b (n, dim), negatives (m, dim), of any length.

    symmetric: the mean with the loss that asks b for its a; it takes no negatives into that half.
    Raises ValueError when a and b differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"{tuple(a.shape)} and {tuple(b.shape)} are no pairs of vectors")
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    known = b if negatives is None else torch.cat([b, F.normalize(negatives, dim=-1)])
    own = torch.arange(len(a), device=a.device)
    loss = F.cross_entropy(a @ known.t() / temperature, own)  # (n, n + m) scores
    if symmetric:
        loss = (loss + F.cross_entropy(b @ a.t() / temperature, own)) / 2
    return loss


def matryoshka(loss: Loss, dims: Sequence[int], weights: Sequence[float] | None = None) -> Loss:
    """The weighted sum of a loss over the first numbers of each vector: sum_d w_d L(a[:d], b[:d]).

    So that a vector cut short is still a good vector. weights: 1 each where None.
    Raises ValueError for weights that are not one a size, and, when it is called, for a size that
    the vectors don't have.
    """
    weights = [1.0] * len(dims) if weights is None else weights
    if len(weights) != len(dims):
        raise ValueError(f"{len(weights)} weights for {len(dims)} sizes")

    def nested(*vectors: Tensor, **options) -> Tensor:
        if max(dims) > vectors[0].shape[-1]:
            raise ValueError(f"the vectors have {vectors[0].shape[-1]} numbers, not {max(dims)}")
        parts = [loss(*(v[..., :dim] for v in vectors), **options) for dim in dims]
        return sum(weight * part for weight, part in zip(weights, parts))

    return nested


def hard_negatives(
    queries: Tensor,
    documents: Tensor,
    positive: Sequence[int],
    k: int = 1,
    margin: float = 0.0,
) -> Tensor:
    """Places of the k documents nearest to each query that are not its own: (n, k) int64.

    queries: (n, dim), documents: (m, dim), compared by cosine. positive: place of each query's own.
    margin: documents whose cosine lies above that of the own one less the margin are passed over:
    they may be right answers that nobody has marked. Where fewer than k are left, the farthest of
    the nearest, so that each query has its k. Raises ValueError unless 0 < k < m.
    """
    if not 0 < k < len(documents):
        raise ValueError(f"k is {k}: with {len(documents)} documents it is 1 to one fewer")
    near = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).t()  # (n, m)
    places = torch.as_tensor(positive, device=near.device)[:, None]
    own = near.gather(1, places)
    doubtful = near > own - margin if margin else torch.zeros_like(near, dtype=torch.bool)
    ranked = torch.where(doubtful, -near - 2, near)  # doubtful ones last, the farthest first
    return ranked.scatter(1, places, -torch.inf).topk(k, dim=1).indices


def grad_cache(
    embed: Callable[..., Tensor], sides: Sequence[Sequence], loss: Loss, scale: float = 1.0
) -> Tensor:
    """The loss of a large batch, its gradients added to the parameters piece by piece.

    First every piece is embedded without a graph; the loss of all gives each vector's gradient;
    then each piece is embedded once more and handed its part of that. Equal to one backward pass of
    the whole batch, at the memory of one piece. With dropout a piece's random numbers are those of
    its first pass.
    embed: piece -> (n, dim). sides: for each argument of the loss its pieces. Returns the loss,
    detached; scale: of the gradients.
    """
    kept, random = [], []
    for pieces in sides:
        states, parts = [], []
        for piece in pieces:
            states.append(torch.get_rng_state())
            with torch.no_grad():
                parts.append(embed(piece))
        random.append(states)
        kept.append(torch.cat(parts).detach().requires_grad_())
    value = loss(*kept)
    gradients = torch.autograd.grad(value * scale, kept)
    for pieces, states, gradient in zip(sides, random, gradients):
        start = 0
        for piece, state in zip(pieces, states):
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                vectors = embed(piece)
            vectors.backward(gradient[start : start + len(vectors)])
            start += len(vectors)
    return value.detach()
