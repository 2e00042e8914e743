"""How good predictions are, and how far their probabilities can be believed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest of (n, classes) is the label's (n,)."""
    return (probabilities.argmax(1) == labels).double().mean().item()


def macro_f1(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN); over those that occur or are predicted."""
    predicted, scores = probabilities.argmax(1), []
    for label in range(probabilities.shape[1]):
        hit = ((predicted == label) & (labels == label)).sum().item()
        total = (predicted == label).sum().item() + (labels == label).sum().item()
        if total:
            scores.append(2 * hit / total)
    return sum(scores) / len(scores)


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-probability of the label, nats."""
    chosen = probabilities.double().gather(1, labels[:, None])
    return -chosen.clamp(min=1e-45).log().mean().item()


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over rows of sum over classes (p - [class is the label])^2 (Brier, 1950)."""
    truth = F.one_hot(labels, probabilities.shape[1])
    return (probabilities.double() - truth).square().sum(1).mean().item()


def reliability(
    probabilities: Tensor, labels: Tensor, bins: int = 15
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the equal bins of confidence: (how many, mean confidence, accuracy), (bins,).

    Confidence is the largest probability; bin b holds ((b - 1) / bins, b / bins].
    """
    confidence, predicted = probabilities.double().max(1)
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, place, torch.ones_like(confidence))
    sums = [
        torch.zeros(bins, dtype=torch.float64).index_add(0, place, value)
        for value in (confidence, (predicted == labels).double())
    ]
    return count, *(total / count.clamp(min=1) for total in sums)


def ece(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean over rows of |accuracy - confidence| of their bin.

    Source: Guo et al. (2017), equation 3.
    """
    count, confidence, right = reliability(probabilities, labels, bins)
    return ((count / count.sum()) * (confidence - right).abs()).sum().item()


def spearman(predicted: Tensor, truth: Tensor) -> float:
    """Correlation of ranks, ties sharing theirs. (n,) each; nan where either is constant."""
    import warnings

    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(predicted.cpu().numpy(), truth.cpu().numpy()).statistic)


def scored(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Every score of logits (n, classes) and labels (n,); of (n, 1), a regression, Spearman's.

    Keys: accuracy, macro_f1, nll (nats), brier, ece; or spearman.
    """
    if logits.shape[1] == 1:
        return {"spearman": spearman(logits[:, 0], labels)}
    probabilities = logits.double().softmax(1)
    scores = (accuracy, macro_f1, nll, brier, ece)
    return {score.__name__: score(probabilities, labels) for score in scores}
