"""BLoB (Wang et al., 2024): LoRA whose matrix A is a distribution, learned by backpropagation.

Lab 704. Each entry of A is normal, with a mean and a standard deviation of its own; B stays a
point. Settings are those of the authors' scripts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.models.classifier import Classifier, Encoded
from lablib.modes import kept_modes
from lablib.peft.adapter import WeightAdapter, adapters, matrix, method
from lablib.peft.tuning import tune

PRIOR = 0.2  # sigma_p, the prior's standard deviation
SPREAD = 0.05  # G starts uniform in [SPREAD / sqrt 2, SPREAD]
GAMMA = 8  # of the cycle's length


class BayesianLoRA(WeightAdapter):
    """W x + (alpha / r) B A x, where q(A) = N(M, Omega^2) in every entry, and Omega = G^2.

    Draws A in training mode; else A is its mean M. alpha: None is the rank. tokenwise: each token
    has signs of its own, as in the authors' code; else each text has, as if read with one A.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        prior: float = PRIOR,
        spread: float = SPREAD,
        tokenwise: bool = False,
    ):
        super().__init__(base)
        n_out, n_in = matrix(base).shape
        if not 0 < rank <= min(n_out, n_in):
            raise ValueError(f"rank {rank} is not 1 to {min(n_out, n_in)}")
        self.factor = (rank if alpha is None else alpha) / rank
        self.prior, self.tokenwise = prior, tokenwise
        self.mean = nn.Parameter(base.weight.new_empty(rank, n_in))  # M
        self.root = nn.Parameter(base.weight.new_empty(rank, n_in))  # G
        self.up = nn.Parameter(base.weight.new_zeros(n_out, rank))  # B
        nn.init.kaiming_uniform_(self.mean, a=math.sqrt(5))
        nn.init.uniform_(self.root, spread / math.sqrt(2), spread)

    @property
    def deviation(self) -> Tensor:
        """Omega: (rank, in)."""
        return self.root * self.root

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        low = F.linear(x, self.mean)  # M x, (..., in) -> (..., r)
        if self.training:
            noise = self.deviation * torch.randn_like(self.mean)  # E
            low = low + flipped(x, noise, self.tokenwise)
        return self.base(x) + self.factor * F.linear(low, self.up)  # r -> out

    def delta(self) -> Tensor:
        """(out, in): the mean of the change, (alpha / r) B M."""
        return self.factor * (self.up @ self.mean)

    def divergence(self) -> Tensor:
        """KL(q(A) || prior), nats: a scalar."""
        return kl(self.mean, self.deviation, self.prior)


def flipped(x: Tensor, noise: Tensor, tokenwise: bool = False) -> Tensor:
    """(E * t s^T) x, with signs s and t for each text of x: (texts, ..., in) -> (texts, ..., r).

    noise: E, (r, in). One draw of E serves all texts, whose perturbations are still uncorrelated.
    Source: flipout (Wen et al., 2018), as the paper applies it.
    """
    rows = x.shape[:-1] if tokenwise else (len(x), *(1 for _ in x.shape[1:-1]))
    s = signs(*rows, noise.shape[1], like=x)
    t = signs(*rows, noise.shape[0], like=x)
    return t * F.linear(s * x, noise)


def signs(*shape: int, like: Tensor) -> Tensor:
    """+1 and -1, each as likely."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_() * 2 - 1


def kl(mean: Tensor, deviation: Tensor, prior: float = PRIOR) -> Tensor:
    """KL of normal entries from N(0, prior^2), summed over entries, nats: a scalar.

    ln(sigma_p / Omega) + (Omega^2 + M^2) / (2 sigma_p^2) - 1/2.
    Source: the paper's divergence in the low-rank space.
    """
    ratio = math.log(prior) - deviation.log()
    return (ratio + (deviation.square() + mean.square()) / (2 * prior**2) - 0.5).sum()


def full_weight_moments(layer: BayesianLoRA) -> tuple[Tensor, Tensor]:
    """Of the whole changed weight W: its mean (out, in), and each column's covariance.

    The covariance is (in, out, out): columns of W don't covary. Source: the paper's theorem on
    the full weight's distribution.
    """
    mean = matrix(layer.base) + layer.delta()  # W_0 + B M
    up = layer.factor * layer.up
    # cov(W_ij, W_kj) = sum_r B_ir Omega_rj^2 B_kr
    return mean, torch.einsum("or,ri,pr->iop", up, layer.deviation.square(), up)


@method
def blob_(
    model: nn.Module,
    roles: Sequence[str] = (),
    rank: int = 8,
    alpha: float | None = None,
    prior: float = PRIOR,
    spread: float = SPREAD,
    tokenwise: bool = False,
) -> None:
    """Put a `BayesianLoRA` in the place of each projection, of all blocks.

    roles: as `anatomy.projections` names them, none for all.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        made = BayesianLoRA(layer, rank, alpha, prior, spread, tokenwise)
        anatomy.replace(model, name, made.train(layer.training))


def layers(model: nn.Module) -> list[BayesianLoRA]:
    """Those that `blob_` brought."""
    return [part for part in adapters(model).values() if isinstance(part, BayesianLoRA)]


# Training: the likelihood by AdamW, the divergence by a second step of plain gradient descent.


def cycle_length(n_examples: int, batch: int) -> int:
    """M, the steps of one cycle of weights: 100 |D|^(pi / gamma) / batch."""
    return max(1, int(100 * n_examples ** (math.pi / GAMMA) / batch))


def kl_weight(step: int, cycle: int) -> float:
    """2^i / (2^(M + 1) - 1) in step i = 1 ... M of each cycle; a cycle's weights sum to nearly 1.

    step: from 0. Source: Blundell et al. (2015), turned round: small ones come first.
    """
    return 2 ** (step % cycle + 1) / (2 ** (cycle + 1) - 1)


def descend_(model: nn.Module, step_size: float) -> None:
    """M and G of every layer go one step of gradient descent down their divergence."""
    for layer in layers(model):
        parts = layer.mean, layer.root
        with torch.enable_grad():
            slopes = torch.autograd.grad(layer.divergence(), parts)
        with torch.no_grad():
            for part, slope in zip(parts, slopes, strict=True):
                part.sub_(step_size * slope)


def tune_blob(
    classifier: Classifier,
    encoded: Encoded,
    labels: Tensor,
    steps: int,
    rate: float,
    kl_rate: float,
    *,
    batch: int = 8,
    seed: int = 0,
) -> list[float]:
    """`tune`, and after each step one down the divergence; the loss of every step.

    kl_rate: of that second step, before its weight in the cycle; it follows the first's schedule.
    Which texts a step sees follows from the seed, what is drawn of A from torch's generator.
    """
    cycle = cycle_length(len(labels), batch)

    def second(step: int, now: float) -> None:
        descend_(classifier, kl_rate * now / rate * kl_weight(step, cycle))

    options = {"batch": batch, "seed": seed, "after_step": second}
    return tune(classifier, encoded, labels, steps, rate, **options)


# What is predicted: an average over draws.


@torch.no_grad()
def draws(classifier: Classifier, encoded: Encoded, n: int, batch: int = 64) -> Tensor:
    """(n, texts, labels) logits: in each of the n passes, adapters draw as they do in training.

    n: 0 gives one pass with nothing drawn, the mean's. Draws come from torch's generator. Works for
    every adapter that draws: with dropout of LoRA it is Monte Carlo dropout.
    """
    starts = range(0, len(encoded.mask), batch)
    with kept_modes(classifier):
        classifier.eval()
        for part in adapters(classifier).values():
            part.train(n > 0)
        passes = [
            torch.cat([classifier(encoded.at(slice(s, s + batch))) for s in starts])
            for _ in range(max(n, 1))
        ]
    return torch.stack(passes)


def averaged(logits: Tensor) -> Tensor:
    """The predictive distribution: (n, texts, labels) logits -> (texts, labels) probabilities."""
    return logits.double().softmax(-1).mean(0)
