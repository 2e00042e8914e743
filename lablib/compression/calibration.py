"""What a little text tells about a model's weights: what they read, and how the loss leans on them.

Sums are float32; hooks are gone afterwards, also when a pass fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.data import load
from lablib.models import anatomy
from lablib.modes import kept_modes


def calibration_tokens(
    corpora: Sequence[str], tokenizer, n_rows: int, length: int, seed: int
) -> Tensor:
    """(n_rows, length + 1) int64: windows drawn without overlap from a few corpora, in turn.

    The same seed gives the same rows, whatever else was drawn before.
    Raises ValueError when a corpus is too short for its share.
    """
    random = np.random.default_rng(seed)
    rows = []
    for place, name in enumerate(corpora):
        wanted = len(range(place, n_rows, len(corpora)))
        text = _some_text(name, 8 * wanted * (length + 1), random)
        ids = torch.tensor(tokenizer.encode(text))
        if len(ids) < wanted * (length + 1):
            raise ValueError(f"{name} has too little text for {wanted} rows of {length} tokens")
        rows.append(ids[: wanted * (length + 1)].view(wanted, length + 1))
    order = torch.from_numpy(random.permutation(n_rows))
    return torch.cat(rows)[order]


def _some_text(name: str, letters: int, random: np.random.Generator) -> str:
    """Documents in random order, until there are so many letters."""
    documents, parts, size = load(name), [], 0
    for place in random.permutation(len(documents)):
        parts.append(documents[place].text)
        size += len(parts[-1])
        if size >= letters:
            break
    return "\n\n".join(parts)[:letters]


def token_losses(model: nn.Module, rows: Tensor, batch: int = 8) -> Tensor:
    """Nats of every token after a row's first: rows (n, length + 1) -> (n, length)."""
    place = next(model.parameters()).device
    found = []
    with kept_modes(model), torch.no_grad():
        model.eval()
        for part in rows.split(batch):
            part = part.to(place)
            logits = anatomy.logits(model, part[:, :-1])
            flat = F.cross_entropy(
                logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="none"
            )
            found.append(flat.view(len(part), -1).cpu())
    return torch.cat(found)


def second_moments(model: nn.Module, rows: Tensor, *roles: str) -> dict[str, Tensor]:
    """Name -> E[x x^T] (in, in) of what each projection reads, a mean over tokens."""
    return _inputs(model, rows, roles, lambda x: x.t() @ x)


def input_norms(model: nn.Module, rows: Tensor, *roles: str) -> dict[str, Tensor]:
    """Name -> root mean square (in,) of each feature that a projection reads."""
    squares = _inputs(model, rows, roles, lambda x: x.square().sum(0))
    return {name: mean.sqrt() for name, mean in squares.items()}


def _inputs(
    model: nn.Module, rows: Tensor, roles: Sequence[str], summary: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sums of summary(x (tokens, in)) over all tokens, divided by their number."""
    sums: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(layer, given):
            part = summary(given[0].detach().float().flatten(0, -2))
            sums[name] = part if name not in sums else sums[name].add_(part)

        return hook

    layers = anatomy.projections(model, *roles)
    with _hooked(layers[name].register_forward_pre_hook(watch(name)) for name in layers):
        token_losses(model, rows)
    return {name: total / rows[:, 1:].numel() for name, total in sums.items()}


@contextlib.contextmanager
def _hooked(handles: Iterable) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: nn.Module, rows: Tensor, *roles: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (mean of g, mean of g * g), g the gradient of one row's mean loss: (out, in) each.

    One backward pass a row: the square of a mean over rows is another quantity. Each gradient is
    squared and freed as it arrives, and nothing but the projections' weights gets one.
    """
    layers = anatomy.projections(model, *roles)
    found = {n: (torch.zeros_like(m.weight), torch.zeros_like(m.weight)) for n, m in layers.items()}

    def take(name: str):
        def hook(weight: Tensor) -> None:
            mean, square = found[name]
            mean.add_(weight.grad, alpha=1 / len(rows))
            square.addcmul_(weight.grad, weight.grad, value=1 / len(rows))
            weight.grad = None

        return hook

    weights = {name: layer.weight for name, layer in layers.items()}
    with _only_these(model, weights.values()), kept_modes(model):
        model.eval()
        hooks = (w.register_post_accumulate_grad_hook(take(name)) for name, w in weights.items())
        with _hooked(hooks), torch.enable_grad():
            for row in rows.to(next(iter(weights.values())).device):
                scores = anatomy.logits(model, row[None, :-1])[0]
                F.cross_entropy(scores.float(), row[1:]).backward()
    return found


@contextlib.contextmanager
def _only_these(model: nn.Module, wanted: Iterable[Tensor]) -> Iterator[None]:
    """Gradients for these parameters alone; afterwards each asks for its own as before."""
    before = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    ids = {id(weight) for weight in wanted}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in ids)
            parameter.grad = None
        yield
    finally:
        for parameter, asked, grad in before:
            parameter.requires_grad_(asked)
            parameter.grad = grad
