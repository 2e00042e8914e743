"""GLaM (Du et al., 2021): two experts a token in every other layer, and text that was filtered.

Lab 303. `GLaMFFN` is the layer as section 4 defines it; `glam_` makes the same layer of fast parts
from `lablib.experts.moe` and puts it into a model. Then what section 3 does to web pages - a linear
classifier on hashed words, and a draw that keeps some of the doubtful pages - and the arithmetic of
Tables 1 and 4: parameters from hyperparameters, energy from chips and hours.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.moe import FeedForwardExperts, MoE
from lablib.experts.routing import LeavesLoss, TokenChoice
from lablib.models import anatomy


class GLaMFFN(LeavesLoss):
    """A GLaM layer, written as in section 4: (..., dim) -> (..., dim), two experts a token.

    experts: modules (n, dim) -> (n, dim). alpha: weight of the balancing loss that training leaves
    in `auxiliary_loss`; 0.01 in section 5.1.
    """

    def __init__(self, dim: int, experts: Iterable[nn.Module], alpha: float = 1e-2):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(dim, len(self.experts), bias=False)  # W_g
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        tokens, n = x.reshape(-1, x.shape[-1]), len(self.experts)  # (tokens, dim)
        # The gate: a probability for each expert, in float32.
        p = self.gate(tokens.float()).softmax(-1)  # (tokens, n)
        # The two best; their shares are made to sum to 1.
        best, chosen = p.topk(2)  # (tokens, 2), (tokens, 2)
        share = best / best.sum(-1, keepdim=True)
        # y = sum over the two of share_i E_i(x).
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            row, place = (chosen == i).nonzero(as_tuple=True)  # (rows,): who chose expert i
            y[row] += share[row, place, None].to(y.dtype) * expert(tokens[row])
        if self.training:
            # GShard's balancing loss: alpha n sum_i f_i P_i, where f counts first choices alone.
            f = chosen[:, 0].bincount(minlength=n) / len(tokens)  # (n,)
            self.auxiliary_loss = self.alpha * n * (f * p.mean(0)).sum()
        return y.view(x.shape)


class TopTwo(TokenChoice):
    """The gate of `GLaMFFN` as a router: top-2, shares sum to 1, first choices are balanced.

    options: of `TokenChoice`. Its capacity_factor is GShard's capacity: first choices find a place
    before second ones, and shares stay as they were when the other expert has none. No second
    expert is left out at random, as GShard's may be.
    """

    def __init__(self, dim: int, n_experts: int, balance: float = 1e-2, **options):
        super().__init__(dim, n_experts, top_k=2, softmax="after", balance=balance, **options)

    def _losses(self, logits: Tensor, probs: Tensor, counts: Tensor) -> Tensor | None:
        first = logits.argmax(-1).bincount(minlength=self.n_experts)  # (n_experts,)
        return super()._losses(logits, logits.softmax(-1), first)


class GEGLU(nn.Module):
    """down(gelu(gate(x)) * up(x)): the feed-forward layer of GLaM's other blocks (Shazeer, 2020).

    x: (..., dim) -> (..., dim).
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x)) * self.up(x))


def glam_layer(dim: int, width: int, n_experts: int, **options) -> MoE:
    """A GLaM layer of fast parts. Experts have two matrices and a GELU between them.

    They are not gated: only so do Table 4's counts come out. options: of `TopTwo`.
    """
    experts = FeedForwardExperts(n_experts, dim, width, F.gelu)
    return MoE(TopTwo(dim, n_experts, **options), experts)


def glam_(model: nn.Module, n_experts: int, width: int | None = None, **options) -> nn.Module:
    """Make a dense model a GLaM, in place: experts in every other block, GEGLU in the rest.

    The first, third, ... block get experts, as in Figure 2. n_experts: 0 makes the dense baseline,
    GEGLU everywhere. width: of an expert; None: as wide as the layer it replaces, as in Table 4.
    With three quarters of that, two experts have as many weights as one GEGLU.
    Returns model. Raises ValueError for one expert, of which no two can be chosen.
    """
    if n_experts == 1:
        raise ValueError("top-2 gating needs two experts at least, or 0 for a dense model")
    for place in range(len(anatomy.blocks(model))):
        weight = anatomy.projection(model, place, "gate").weight  # (ffn width, dim)
        ffn, dim = weight.shape
        sparse = n_experts and place % 2 == 0
        part = glam_layer(dim, width or ffn, n_experts, **options) if sparse else GEGLU(dim, ffn)
        anatomy.replace_part(model, place, "mlp", part.to(weight))
    return model


class QualityClassifier(nn.Module):
    """How much a page looks like curated text: a linear function of its hashed words (section 3).

    buckets: how many weights there are; words share one when their hashes do.
    """

    def __init__(self, buckets: int = 2**14):
        super().__init__()
        self.weight = nn.EmbeddingBag(buckets, 1, mode="mean")
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.weight.weight)

    def forward(self, pages: Sequence[np.ndarray]) -> Tensor:
        """Logits of `hashed` pages: (pages,)."""
        starts = np.cumsum([0, *map(len, pages)])[:-1]
        words = torch.from_numpy(np.concatenate(pages))  # (words of all pages,)
        return self.weight(words, torch.from_numpy(starts))[:, 0] + self.bias

    @torch.no_grad()
    def scores(self, pages: Sequence[str]) -> np.ndarray:
        """Quality of each page, from 0 to 1: (pages,) float64."""
        return self(hashed(pages, self.weight.num_embeddings)).double().sigmoid().numpy()

    @classmethod
    def trained(
        cls, curated: Sequence[str], others: Sequence[str], *, epochs: int = 5, seed: int = 0
    ) -> QualityClassifier:
        """A classifier that tells curated pages from others, by logistic regression.

        others need no label: good pages may be among them. As many of each make the scores those
        of even odds. The paper does not say how it trains.
        """
        model = cls()
        pages = hashed([*curated, *others], model.weight.num_embeddings)
        labels = torch.cat([torch.ones(len(curated)), torch.zeros(len(others))])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
        random = np.random.default_rng(seed)
        for _ in range(epochs):
            for batch in np.array_split(random.permutation(len(pages)), max(1, len(pages) // 32)):
                logits = model([pages[place] for place in batch])
                loss = F.binary_cross_entropy_with_logits(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model


def hashed(pages: Sequence[str], buckets: int) -> list[np.ndarray]:
    """Each page's words as bucket numbers: (words,) int64.

    A word is a run of letters or digits, or one other sign; a page without any is one empty word.
    """
    rows = [[zlib.crc32(word.encode()) % buckets for word in _words(page)] for page in pages]
    return [np.array(row) for row in rows]


def _words(page: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", page) or [""]


def keep_probability(scores: np.ndarray, alpha: float) -> np.ndarray:
    """The chance that `pareto_kept` keeps a page of each score.

    A page stays when a draw from a Pareto distribution, x with P(x > t) = (1 + t)^-alpha, is above
    1 - score: so with (2 - score)^-alpha.
    """
    return (2.0 - np.asarray(scores)) ** -alpha


def pareto_kept(scores: np.ndarray, alpha: float = 9.0, seed: int = 0) -> np.ndarray:
    """Which pages stay: (pages,) bool. Doubtful ones stay now and then, against a biased judge.

    Source: section 3 for the Pareto distribution; its alpha is not given there, 9 is that of
    GPT-3 (Brown et al., 2020, appendix A).
    """
    draws = np.random.default_rng(seed).pareto(alpha, len(scores))
    return draws > 1.0 - np.asarray(scores)


class Sizes(NamedTuple):
    """The hyperparameters of a row of Table 4; experts 0: dense."""

    layers: int
    dim: int
    ffn: int
    heads: int
    head_dim: int
    experts: int


class Row(NamedTuple):
    """Sizes, and how many parameters the paper gives them, in millions."""

    sizes: Sizes
    total: float
    active: float


def _rows(sizes: tuple, counts: dict[str, tuple[int, float, float]]) -> dict[str, Row]:
    return {name: Row(Sizes(*sizes, n), *numbers) for name, (n, *numbers) in counts.items()}


# Table 4: n_params and n_act-params of all models, in millions.
TABLE_4 = {
    **_rows((12, 768, 3072, 12, 64), {"0.1B": (0, 130, 130), "0.1B/64E": (64, 1900, 145)}),
    **_rows(
        (24, 2048, 8192, 16, 128),
        {
            "1.7B": (0, 1700, 1700),
            "1.7B/32E": (32, 20_000, 1878),
            "1.7B/64E": (64, 27_000, 1879),
            "1.7B/128E": (128, 53_000, 1881),
            "1.7B/256E": (256, 105_000, 1886),
        },
    ),
    **_rows((32, 4096, 16_384, 32, 128), {"8B": (0, 8700, 8700), "8B/64E": (64, 143_000, 9800)}),
    **_rows((64, 8192, 65_536, 128, 128), {"137B": (0, 137_000, 137_000)}),
    **_rows((64, 8192, 32_768, 128, 128), {"64B/64E": (64, 1_200_000, 96_600)}),
}
VOCABULARY = 256_000  # "256K" pieces
GPT3 = {"layers": 96, "dim": 12_288, "vocabulary": 50_257, "length": 2048}  # Brown et al., 2020


def parameters(sizes: Sizes, vocabulary: int = VOCABULARY, top_k: int | None = None) -> int:
    """How many weights a GLaM has, or how many of them work on a token that asks top_k experts.

    Norms and biases of relative positions, far below a thousandth, are left out; the embedding,
    which is also the output layer, counts once and as active.
    """
    layers, dim, ffn, heads, head_dim, experts = sizes
    sparse = layers // 2 if experts else 0
    used = experts if top_k is None else min(top_k, experts)
    attention = 4 * dim * heads * head_dim * layers  # queries, keys, values, output
    dense = 3 * dim * ffn * (layers - sparse)  # GEGLU: gate, up, down
    moe = (2 * dim * ffn * used + dim * experts) * sparse  # up and down of each, and the gate
    return attention + dense + moe + vocabulary * dim


def gpt3_parameters() -> int:
    """GPT-3's: 4 dim^2 of attention and 8 dim^2 of feed-forward layer a block, two embeddings."""
    layers, dim, vocabulary, length = GPT3.values()
    return 12 * layers * dim**2 + (vocabulary + length) * dim


def training_energy(chips: int, hours: float, watts: float, overhead: float) -> float:
    """Energy of a training, in MWh.

    watts: of one chip with its host, measured. overhead: what the data center takes for each watt
    that its machines take (PUE), 1.11 where GLaM was trained.
    """
    return chips * hours * watts * overhead / 1e6
