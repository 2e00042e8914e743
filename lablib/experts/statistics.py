"""What routers do: load, entropy, dropped share, co-activation, saturation, specialization.

Each takes plain tensors, such as the fields of a `lablib.experts.routing.Record` concatenated over
batches. Source of the last four: OLMoE (Muennighoff et al., 2024), section 5.
"""

import torch
from torch import Tensor


def load(experts: Tensor, n_experts: int) -> Tensor:
    """Each expert's share of all assignments: (n_experts,), sums to 1.

    experts: int64 of any shape, as (tokens, top_k).
    """
    counts = experts.flatten().bincount(minlength=n_experts)
    return counts / max(1, experts.numel())


def router_entropy(probs: Tensor) -> Tensor:
    """Mean entropy of the tokens' router distributions, in nats: 0 to log n_experts.

    probs: (tokens, n_experts). Returns a scalar.
    """
    return torch.special.entr(probs).sum(-1).mean()


def load_entropy(experts: Tensor, n_experts: int) -> Tensor:
    """Entropy of `load`, in nats: log n_experts when even, 0 when one expert takes all."""
    return torch.special.entr(load(experts, n_experts)).sum()


def dropped_share(asked: int, counts: Tensor) -> float:
    """Share of the asked-for assignments (tokens * top_k) that found no place.

    counts: (n_experts,), the rows that experts computed.
    """
    return 1.0 - int(counts.sum()) / asked if asked else 0.0


def _chosen(experts: Tensor, n_experts: int) -> Tensor:
    """(tokens, top_k) -> (tokens, n_experts), 1 where an expert is among a token's."""
    return torch.zeros(len(experts), n_experts, device=experts.device).scatter_(1, experts, 1.0)


def co_activation(experts: Tensor, n_experts: int) -> Tensor:
    """Of the tokens that chose expert i, the share that also chose j: (n_experts, n_experts).

    experts: (tokens, top_k), distinct in a row. The diagonal is 1, or 0 for an expert without
    tokens, whose row is all zero.
    """
    chosen = _chosen(experts, n_experts)
    together = chosen.t() @ chosen
    return together / together.diagonal().clamp(min=1)[:, None]


def saturation(early: Tensor, late: Tensor) -> float:
    """Mean share of each token's experts that two checkpoints have in common: 0 to 1.

    early, late: (tokens, top_k), the same tokens in the same order, distinct in a row.
    Raises ValueError when shapes differ.
    """
    if early.shape != late.shape:
        raise ValueError(f"{tuple(early.shape)} and {tuple(late.shape)} are not the same tokens")
    return (early[:, :, None] == late[:, None, :]).any(2).float().mean().item()


def specialization(experts: Tensor, groups: Tensor, n_experts: int, n_groups: int) -> Tensor:
    """Share of each group's tokens that each expert takes: (n_groups, n_experts).

    experts: (tokens, top_k); groups: (tokens,) int64, a token's domain or its vocabulary id.
    Rows sum to top_k, or to 0 for a group without tokens; even routing gives top_k / n_experts.
    Raises ValueError when the two disagree on the number of tokens.
    """
    if len(experts) != len(groups):
        raise ValueError(f"{len(groups)} groups for {len(experts)} tokens")
    place = groups[:, None] * n_experts + experts
    counts = place.flatten().bincount(minlength=n_groups * n_experts).view(n_groups, n_experts)
    return counts / groups.bincount(minlength=n_groups).clamp(min=1)[:, None]
