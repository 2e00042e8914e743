"""A Survey on Mixture of Experts (Cai et al., 2024): one sum, and the many ways to gate it.

Lab 311. `mixture` is the sum that all of the survey's layers share; each family of its Figure 3 is
a function that makes the gates of it. `survey_layer` makes the same layers of the fast parts of
`lablib.experts`, every one of equal work a token. Then what no table of losses shows - whether a
layer looks at later tokens, and what its model is worth when it can not - and the taxonomy, with
the place of each leaf in this package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.experts.routing import (
    ExpertChoice,
    HashChoice,
    RandomChoice,
    SigmoidChoice,
    SoftSlots,
    TokenChoice,
    hash_by_token,
    random_table,
)
from lablib.models import GPTConfig, SwiGLU, anatomy
from lablib.modes import kept_modes


def mixture(x: Tensor, gates: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """y = sum_i G(x)_i E_i(x): x (tokens, dim), gates (tokens, n) -> (tokens, dim).

    Where a gate is 0 an expert need not be computed; here all are.
    """
    each = torch.stack([expert(x) for expert in experts], 1)  # (tokens, n, dim)
    return (gates[:, :, None] * each).sum(1)


def dense(scores: Tensor) -> Tensor:
    """G = softmax(scores): every expert works on every token. (tokens, n) -> (tokens, n)."""
    return scores.softmax(-1)


def token_choice(scores: Tensor, k: int) -> Tensor:
    """G = softmax(TopK(scores)): each token keeps its k best experts."""
    best, chosen = scores.topk(k)  # (tokens, k) each
    return torch.zeros_like(scores).scatter(1, chosen, best.softmax(-1))


def expert_choice(scores: Tensor, places: int) -> Tensor:
    """Each expert keeps the `places` tokens that want it most: a column's best, not a row's."""
    p = scores.softmax(-1)
    best, chosen = p.topk(places, dim=0)  # (places, n) each
    return torch.zeros_like(p).scatter(0, chosen, best)


def hashed(ids: Tensor, table: Tensor, n: int) -> Tensor:
    """Non-trainable: a token's expert is written in a table. ids: (tokens,), table: (vocab,)."""
    return F.one_hot(table[ids], n).float()


def token_merging(x: Tensor, scores: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """Soft: each expert works on one mean of all tokens, and each token takes a mean of experts.

    x: (tokens, dim) of one sequence, scores: (tokens, n) -> (tokens, dim). No gates of `mixture`
    give it, since no expert ever sees a token.
    """
    slots = scores.softmax(0).t() @ x  # (n, dim): for each expert a mean of tokens
    each = torch.stack([expert(slot[None])[0] for expert, slot in zip(experts, slots)])
    return scores.softmax(1) @ each  # (tokens, dim)


ROUTERS = ("none", "dense", "token", "sigmoid", "hash", "random", "expert", "soft")


def survey_layer(
    dim: int,
    ffn: int,
    router: str,
    n_experts: int = 8,
    top_k: int = 1,
    shared: bool = False,
    *,
    vocabulary: int = 0,
    length: int = 0,
    balance: float = 1e-2,
) -> nn.Module:
    """A layer of the survey in which a token meets ffn hidden units, whatever the router.

    router: "none" is a dense layer; "dense" asks all experts; "token", "sigmoid", "hash" and
        "random" ask top_k; an "expert" has so many places that top_k is the mean; "soft" has as
        many slots.
    shared: one more expert, which works on every token. All have ffn / (top_k + shared) units.
    vocabulary, length: of the model, for "hash" and for "soft". balance: weight of the balancing
        loss, where a router has one.
    Raises ValueError for another router, or when ffn can't be divided so.
    """
    if router not in ROUTERS:
        raise ValueError(f"router {router!r} is none of {', '.join(ROUTERS)}")
    if router == "none":
        return _feed_forward(dim, ffn)
    asked = n_experts if router == "dense" else top_k
    if ffn % (asked + shared):
        raise ValueError(f"{ffn} hidden units can't be divided among {asked + shared} experts")
    width = ffn // (asked + shared)
    beside = _feed_forward(dim, width) if shared else None
    made = _router(router, dim, n_experts, asked, vocabulary, length, balance)
    return MoE(made, SwiGLUExperts(n_experts, dim, width), shared=beside)


def _feed_forward(dim: int, width: int) -> SwiGLU:
    return SwiGLU(GPTConfig(dim=dim, head_dim=2, ffn_dim=width))


def _router(name, dim, n_experts, top_k, vocabulary, length, balance):
    if name == "sigmoid":
        return SigmoidChoice(dim, n_experts, top_k, balance=balance)
    if name == "hash":
        return HashChoice(random_table(vocabulary, n_experts, top_k), n_experts)
    if name == "random":
        return RandomChoice(n_experts, top_k)
    if name == "expert":
        return ExpertChoice(dim, n_experts, float(top_k), capacity_of="sequence")
    if name == "soft":
        return SoftSlots(dim, n_experts, max(1, top_k * length // n_experts))
    if name == "dense":
        return TokenChoice(dim, n_experts, n_experts)
    # With one expert softmax after the choice would leave a weight of 1, and no gradient.
    softmax = "before" if top_k == 1 else "after"
    return TokenChoice(dim, n_experts, top_k, softmax, balance=balance)


def survey_(model: nn.Module, router: str, **parts) -> nn.Module:
    """Put a layer of `survey_layer` into every block of a dense model, in place. Returns model."""
    parts.setdefault("vocabulary", model.config.vocab_size)
    parts.setdefault("length", model.config.max_length)
    for place in range(len(anatomy.blocks(model))):
        weight = anatomy.projection(model, place, "gate").weight  # (ffn, dim)
        ffn, dim = weight.shape
        layer = survey_layer(dim, ffn, router, **parts).to(weight)
        anatomy.replace_part(model, place, "mlp", layer)
    if router == "hash":
        hash_by_token(model)
    return model


@torch.no_grad()
def influence(model: nn.Module, tokens: Tensor, at: int, instead: int) -> Tensor:
    """How far each position's logits move when the token at one place is another: (length,).

    tokens: (length,) int64; instead: the id put at `at`. The largest difference over the
    vocabulary. A causal model has zeros before `at`. Random draws are the same in both calls.
    """
    other = tokens.clone()
    other[at] = instead
    with kept_modes(model):
        sides = []
        for text in (tokens, other):
            torch.manual_seed(0)
            sides.append(anatomy.logits(model.eval(), text[None])[0])  # (length, vocab)
    return (sides[0] - sides[1]).abs().amax(-1)


@torch.no_grad()
def blindfold(model: nn.Module, windows: Tensor, places: Sequence[int]) -> tuple[float, float]:
    """Loss at some places of a text: as it is taken in training, and with later tokens cut off.

    windows: (rows, length + 1) int64; places: how many tokens have been read. A model that does not
    look ahead has the same loss twice. What it writes it must write with later tokens cut off.
    """
    seeing, blind = [], []
    with kept_modes(model):
        whole = anatomy.logits(model.eval(), windows[:, :-1])  # (rows, length, vocab)
        for place in places:
            target = windows[:, place]
            cut = anatomy.logits(model, windows[:, :place])[:, -1]
            seeing.append(F.cross_entropy(whole[:, place - 1], target))
            blind.append(F.cross_entropy(cut, target))
    return torch.stack(seeing).mean().item(), torch.stack(blind).mean().item()


def importance_loss(gates: Tensor) -> Tensor:
    """The squared coefficient of variation of the experts' summed gates: (tokens, n) -> scalar.

    Source: equations 9 and 10, after Shazeer et al. (2017); weight 0.1 in Table 1.
    """
    importance = gates.sum(0)  # (n,)
    return importance.var(correction=0) / importance.mean() ** 2


def balanced_share(load: Sequence[float]) -> float:
    """Entropy of a load over its largest value: 1 when even, 0 when one expert takes all."""
    entropy = -sum(part * math.log(part) for part in load if part > 0)
    return entropy / math.log(len(load)) if len(load) > 1 else 1.0


# Figure 3: branch > branch > leaf, and where this package has it; "" where it is not here.
TAXONOMY = {
    "algorithm": {
        "gating function": {
            "dense": "experts.moe_survey.dense",
            "sparse, token choice": "experts.routing.TokenChoice",
            "sparse, non-trainable": "experts.routing.HashChoice",
            "sparse, expert choice": "experts.routing.ExpertChoice",
            "soft, token merging": "experts.routing.SoftSlots",
            "soft, expert merging": "",
            "auxiliary losses": "experts.routing.load_balancing_loss",
        },
        "experts": {
            "network: feed-forward": "experts.moe.SwiGLUExperts",
            "network: attention": "",
            "network: others": "experts.moe.ExpertList",
            "count": "experts.switch_transformers.switch_",
            "size": "experts.olmoe.olmoe_layer",
            "frequency": "experts.glam.glam_",
            "activation function": "experts.moe.FeedForwardExperts",
            "shared expert": "experts.moe.MoE",
            "parameter-efficient": "experts.moe_redundancy.PartialExperts",
        },
        "training and inference": {
            "original": "experts.switch_transformers.SwitchFFN",
            "dense to sparse": "experts.upcycling",
            "sparse to dense": "experts.switch_transformers.distill_loss",
            "merging expert models": "experts.domain_experts",
        },
        "derivatives": {"conditional depth": "experts.learning_to_skip"},
    },
    "system": {
        "computation": {
            "grouped products": "kernels.grouped_linear",
            "dropless": "kernels.moe_mlp",
        },
        "communication": {"expert parallel": "experts.parallel"},
        "storage": {"experts on disk": ""},
    },
    "application": {
        "language": {"language models": "experts.olmoe"},
        "vision": {"vision models": ""},
        "recommendation": {"recommenders": ""},
        "several modalities": {"text and image": "experts.moe_redundancy"},
    },
}


def leaves(tree: dict = TAXONOMY, path: tuple = ()) -> list[tuple[tuple[str, ...], str]]:
    """Every leaf of a taxonomy: (its path, its place in this package or "")."""
    rows = []
    for name, below in tree.items():
        if isinstance(below, dict):
            rows += leaves(below, (*path, name))
        else:
            rows.append(((*path, name), below))
    return rows
