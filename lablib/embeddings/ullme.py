"""ULLME (Man et al., 2024): one decoder represents and writes, and each teaches the other.

    L = w_CL L_CL + w_DPO L_DPO + w_KL L_KL

    L_CL   contrast of e(q) with e(p+), e(p-) and the batch's others; e reads both ways
    L_DPO  -log sigmoid(beta (log p(p+|q) - log p(p-|q))): prefer the right passage as a writer
    L_KL   KL(g || r), r = softmax(cos(e(q), e(p)) / t) and g = softmax of the passages' mean log
           p of a token, over the candidates p of q; g is taken as given

The same weights serve both: an embedding sees all of its text, a writer only what came before.
L_KL moves the embedding towards what the writer knows and leaves the writer alone.
Source: Man et al., "ULLME: A Unified Framework for Large Language Model Embeddings with
Generation-Augmented Learning"; settings (t = 0.05, beta = 0.1, sums of log p for preferences,
means for the KL) from the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import recover
from lablib.embeddings.contrastive import info_nce
from lablib.embeddings.encode import Encoder, pad
from lablib.models import anatomy
from lablib.models.classifier import Encoded

PREFERENCES = ("dpo", "ipo", "kto", "sft")


class LogLikelihood(NamedTuple):
    """Of each passage given its query, in nats, both (n,): over all its tokens, and a token."""

    total: Tensor
    mean: Tensor


class Written(NamedTuple):
    """Queries with their passages as one text each. wrote: true where the passage's tokens are."""

    encoded: Encoded
    wrote: Tensor

    def at(self, places: Tensor) -> Written:
        """Those alone."""
        part = self.encoded.at(places)
        return Written(part, self.wrote[places][:, : part.mask.shape[1]])


def grl(
    q: Tensor,
    positive: Tensor,
    negative: Tensor,
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    preference: str = "dpo",
    beta: float = 0.1,
    temperature: float = 0.05,
) -> Tensor:
    """The loss above: q, positive and negative (n, dim); log-likelihoods of (n,) passages.

    weights: of L_CL, L_DPO and L_KL. preference: of PREFERENCES, in the place of DPO.
    """
    contrast = info_nce(q, positive, negative, temperature)
    prefer = preference_loss(chosen, rejected, preference, beta)
    candidates = torch.stack([positive, negative], 1)  # (n, 2, dim)
    cosines = F.cosine_similarity(q[:, None], candidates, dim=-1)  # (n, 2)
    agree = consistency(cosines, torch.stack([chosen.mean, rejected.mean], 1), temperature)
    return weights[0] * contrast + weights[1] * prefer + weights[2] * agree


def preference_loss(
    chosen: LogLikelihood,
    rejected: LogLikelihood,
    kind: str = "dpo",
    beta: float = 0.1,
    reference: tuple[LogLikelihood, LogLikelihood] | None = None,
) -> Tensor:
    """How little the writer prefers the right passage: a mean over the batch.

    reference: the same two of a frozen model; None is reference-free, as the released code has it.
    kind: "dpo", -log sigmoid(beta m) of the margin m in nats (Rafailov et al., 2023); "ipo",
        (m - 1 / 2 beta)^2, m a token's (Azar et al., 2023); "kto", in pairs (Ethayarajh et al.,
        2024); "sft", the right passage's nats a token, without the wrong one.
    Raises ValueError for another kind.
    """
    if kind == "sft":
        return -chosen.mean.mean()
    if kind not in PREFERENCES:
        raise ValueError(f"{kind!r} is no preference loss: {', '.join(PREFERENCES)}")
    which = "mean" if kind == "ipo" else "total"
    good, bad = getattr(chosen, which), getattr(rejected, which)
    if reference is not None:
        good = good - getattr(reference[0], which)
        bad = bad - getattr(reference[1], which)
    if kind == "dpo":
        return -F.logsigmoid(beta * (good - bad)).mean()
    if kind == "ipo":
        return (good - bad - 1 / (2 * beta)).square().mean()
    # Each half's distance from the reference is what the other half is measured against.
    right = 1 - torch.sigmoid(beta * (good - bad.mean().clamp(min=0)))
    wrong = 1 - torch.sigmoid(beta * (good.mean().clamp(min=0) - bad))
    return torch.cat([right, wrong]).mean()


def consistency(represented: Tensor, generated: Tensor, temperature: float = 0.05) -> Tensor:
    """KL(softmax(generated) || softmax(represented / t)), a mean over queries, in nats.

    represented: cosines (n, candidates). generated: log p of a token (n, candidates), through
    which no gradient goes.
    """
    known = F.log_softmax(generated.detach(), dim=-1)
    ours = F.log_softmax(represented / temperature, dim=-1)
    return F.kl_div(ours, known, reduction="batchmean", log_target=True)


def written(
    tokenizer, queries: Sequence[str], passages: Sequence[str], max_length: int = 96
) -> Written:
    """Each query, a line's end, its passage: as tokens, cut at max_length, a query at half of that.

    Raises ValueError for a passage without a token.
    """
    rows, starts = [], []
    for query, passage in zip(queries, passages, strict=True):
        before = tokenizer(query + "\n", verbose=False)["input_ids"][: max_length // 2]
        after = tokenizer(passage, verbose=False, add_special_tokens=False)["input_ids"]
        if not after:
            raise ValueError(f"the passage of {query[:30]!r} has no token: nothing to write")
        rows.append((before + after)[:max_length])
        starts.append(len(before))
    encoded = pad(rows)
    place = torch.arange(encoded.mask.shape[1])
    return Written(encoded, encoded.mask & (place >= torch.tensor(starts)[:, None]))


def log_likelihood(model: nn.Module, rows: Written) -> LogLikelihood:
    """log p(passage | query) by the model as a writer; padding and query count for nothing.

    Computed where the model lies, whose results stay there.
    """
    device = anatomy.embedding(model).weight.device
    tokens, wrote = (part.to(device) for part in (rows.encoded.inputs, rows.wrote))
    log_p = -F.cross_entropy(
        anatomy.logits(model, tokens[:, :-1]).float().transpose(1, 2), tokens[:, 1:],
        reduction="none",
    )  # (n, length - 1), of each next token  # fmt: skip
    total = (log_p * wrote[:, 1:]).sum(1)
    return LogLikelihood(total, total / wrote[:, 1:].sum(1))


@dataclass(frozen=True)
class Objective:
    """What `train_grl` minimizes: the three weights, the kind of preference, t and beta."""

    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    preference: str = "dpo"
    beta: float = 0.1
    temperature: float = 0.05

    @property
    def writes(self) -> bool:
        """Whether the model has to write at all."""
        return any(self.weights[1:])


def train_grl(
    encoder: Encoder,
    triples: Sequence[tuple[str, str, str]],
    steps: int,
    rate: float,
    objective: Objective = Objective(),
    *,
    batch: int = 16,
    seed: int = 0,
    trainable="all",
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train encoder.model in place on (query, right passage, wrong passage); the loss of each step.

    Which of them a step sees follows from the seed alone, whatever the objective. The encoder says
    how a text is represented (both ways, where encoder.causal is False); writing is always causal.
    """
    sides = [encoder.tokens(texts) for texts in zip(*triples)]
    queries, right, wrong = zip(*triples)
    both = [
        written(encoder.tokenizer, queries, passages, encoder.max_length)
        for passages in ((right, wrong) if objective.writes else ())
    ]

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        places = rows[:, 0]
        vectors = [encoder.vectors(side.at(places)) for side in sides]
        if not objective.writes:
            return objective.weights[0] * info_nce(*vectors, objective.temperature)
        scores = [log_likelihood(model, rows_.at(places)) for rows_ in both]
        options = {k: getattr(objective, k) for k in ("preference", "beta", "temperature")}
        return grl(*vectors, *scores, objective.weights, **options)

    options = {"batch": batch, "seed": seed, "trainable": trainable, "after_step": after_step}
    rows = torch.arange(len(triples))[:, None]
    return recover(encoder.model, rows, steps, rate, loss=loss, **options)


@torch.no_grad()
def two_rankings(encoder: Encoder, query: str, passages: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(n,) cosines and (n,) nats a token of passages for a query: the same model, asked twice.

    Both come back on the CPU, wherever the model lies.
    """
    cosines = encoder([query]) @ encoder(passages).t()
    rows = written(encoder.tokenizer, [query] * len(passages), passages, encoder.max_length)
    return cosines[0], log_likelihood(encoder.model, rows).mean.cpu()
