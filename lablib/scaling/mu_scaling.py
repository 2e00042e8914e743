"""Research without Re-search (Yao and Wang, 2023): muScaling, the loss of a model never tuned.

Lab 408. Under the maximal update parametrization (Yang et al., 2022) one learning rate serves
models of every width, so that a law through a few narrow ones can foretell a wide one. `mup_` makes
it of a model that is freshly drawn with deviation 1/sqrt(fan_in), for Adam; then come the check
that it works, and the law.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy


class Rule(NamedTuple):
    """How a matrix W is kept: as V, which begins as `start` times what was drawn; W = times V."""

    start: float
    times: float


def rules(m: float) -> dict[str, Rule]:
    """The rule for each kind of matrix in a model m times as wide as the base.

    Adam moves each entry of V by about the rate, so W by times the rate.
    Source: Yang et al. (2022); as in their package mup.
    """
    return {
        # sums of m times as many terms: W begins as drawn, and moves 1/m as far
        "hidden": Rule(start=m, times=1 / m),
        # no sum: begins and moves as in the base
        "embedding": Rule(start=math.sqrt(m), times=1),
        # V is as in the base, and its m times as many terms are divided by m
        "readout": Rule(start=math.sqrt(m), times=1 / m),
    }


@torch.no_grad()
def mup_(model: nn.Module, base_dim: int, base_head_dim: int | None = None) -> nn.Module:
    """Put a freshly drawn model into muP, in place: the rate of a model of base_dim then fits it.

    The base has the model's depth and proportions. base_head_dim: None where heads have the base's
    width and only their number grows; else scores are divided by head_dim / sqrt(base_head_dim) in
    place of sqrt(head_dim). Norms stay. An optimizer needs one rate and no decay of weights.
    Raises ValueError for trained weights, TypeError for a projection that is no `nn.Linear`.
    """
    _refuse_trained(model)
    embedding, head = anatomy.embedding(model), anatomy.head(model)
    rule = rules(embedding.embedding_dim / base_dim)
    for name, layer in anatomy.projections(model).items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is a {type(layer).__name__}: mup_ knows nn.Linear alone")
        layer.weight.mul_(rule["hidden"].start)
        times = rule["hidden"].times * _score_scale(model, name, base_head_dim)
        anatomy.replace(model, name, Multiplied(layer, times))
    embedding.weight.mul_(rule["embedding"].start)
    if head.weight is not embedding.weight:  # tied weights are one matrix
        head.weight.mul_(rule["readout"].start)
    anatomy.replace(model, anatomy.family(model).head, Multiplied(head, rule["readout"].times))
    return model


class Multiplied(nn.Module):
    """y = (times V) x + bias: a linear layer whose parameter is V."""

    def __init__(self, layer: nn.Linear, times: float):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.times = layer.weight, layer.bias, times

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.times * x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, times={self.times:.4g}"


def _refuse_trained(model: nn.Module) -> None:
    """Norms' scales begin as ones, so others tell of training."""
    for name, norm in anatomy.norms(model).items():
        if not torch.equal(norm.weight, torch.ones_like(norm.weight)):
            raise ValueError(
                f"{name} is no longer all ones, so this model has been trained: mup_ sets how a "
                "model begins; build a new one with its configuration"
            )


def _score_scale(model: nn.Module, name: str, base_head_dim: int | None) -> float:
    """sqrt(d_base / d) for queries whose heads are wider than the base's, else 1."""
    names = anatomy.family(model).projections
    if base_head_dim is None or not name.endswith(names.get("query", "query")):
        return 1.0
    return math.sqrt(base_head_dim / head_dim(model))


def head_dim(model: nn.Module) -> int:
    """The width of one attention head, from the model's configuration."""
    config: Any = model.config
    width = getattr(config, "dim", None) or config.hidden_size
    heads = getattr(config, "n_heads", None) or config.num_attention_heads
    return getattr(config, "head_dim", None) or width // heads


def coordinate_check(
    make: Callable[[int], nn.Module],
    train: Callable[[nn.Module], Any],
    widths: list[int],
    tokens: Tensor,
) -> dict[int, dict[str, float]]:
    """How far outputs move while each width's model is trained: root mean square, by layer.

    make: width -> a new model. train: a few steps on a model, in place. tokens: (batch, length).
    Under muP no entry's move grows with the width. Source: the check of package mup.
    """
    checked = {}
    for width in widths:
        model = make(width)
        before = coordinates(model, tokens)
        train(model)
        checked[width] = moved(before, coordinates(model, tokens))
        del model
        gc.collect()  # a trainer and its model refer to each other, and would stay beside the next
    return checked


def coordinates(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What the embedding, each block and the head give for these tokens."""
    blocks = {f"block {i + 1}": block for i, block in enumerate(anatomy.blocks(model))}
    places = {"embedding": anatomy.embedding(model), **blocks, "logits": anatomy.head(model)}
    with _outputs(places) as outputs, torch.no_grad():
        model(tokens)
    return outputs


@contextmanager
def _outputs(places: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Outputs of modules by name, filled by the next forward pass."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            outputs[name] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in places.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of the change, by name."""
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def growth(checked: Mapping[int, Mapping[str, float]], name: str) -> float:
    """The exponent with which a layer's move grows with the width: 0 when it does not."""
    widths, moves = zip(*((width, row[name]) for width, row in checked.items()))
    return float(np.polyfit(np.log(widths), np.log(moves), 1)[0])


class PowerPlus(NamedTuple):
    """L = a N^b + c."""

    a: float
    b: float
    c: float

    def __call__(self, n: float | np.ndarray) -> float | np.ndarray:
        return self.a * n**self.b + self.c


EXPONENTS = -np.geomspace(0.01, 3, 2000)


def fit_power(n: np.ndarray, loss: np.ndarray) -> PowerPlus:
    """Least squares over a, b and c, none held above zero, as in the authors' program.

    n, loss: (m,), three different n at least, else ValueError. For each b the best a and c are a
    straight line's, so b alone is searched, from -0.01 to -3.
    """
    n, loss = np.asarray(n, float), np.asarray(loss, float)
    if len(np.unique(n)) < 3:
        raise ValueError("three numbers need losses at three sizes at least")
    x = (n / n.max())[None] ** EXPONENTS[:, None]  # (exponents, m)
    off_x, off_loss = x - x.mean(1, keepdims=True), loss - loss.mean()
    slope = off_x @ off_loss / (off_x**2).sum(1)
    left = ((off_loss - slope[:, None] * off_x) ** 2).sum(1)
    best = int(left.argmin())
    a, b = slope[best] / n.max() ** EXPONENTS[best], EXPONENTS[best]
    return PowerPlus(float(a), float(b), float(loss.mean() - slope[best] * x[best].mean()))


def predict_loss(small: Mapping[float, float], large: float) -> float:
    """The loss at a size never trained, from the losses of smaller ones at one step count.

    small: N -> loss, four or more are wise. large: N. Source: the authors' fit program.
    """
    n, loss = zip(*small.items())
    return float(fit_power(np.array(n), np.array(loss))(large))
