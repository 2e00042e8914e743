"""DReSS (Feng et al., 2025): empty what will be cut before it is cut.

Lab 803. What carries little is chosen first, on a little text; a short training on more of it then
drives the chosen rows and columns towards zero, so that the rest takes over what they did; only
then they are cut, and the smaller model is tuned. The usual order is to cut, then tune.

The penalty's form follows the abstract: the paper's own equations were not found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lablib.compression import importance
from lablib.compression.calibration import token_losses
from lablib.compression.llm_surgeon import costs_by_blocks
from lablib.compression.recover import recover
from lablib.compression.structures import Keep, remaining, sizes
from lablib.models import anatomy

Masks = Mapping[str, Tensor]


def choose(
    model: nn.Module, rows: Tensor, ratio: float, parts: str = "neurons", by: str = "activation"
) -> Keep:
    """What stays when this share of each block's parts goes.

    rows: (n, length + 1), a little text. parts: "neurons", "heads" or "channels"; of heads whole
        key-value groups go, ranked by the sum of their squares; channels are those of the residual
        stream, the same for all blocks. by: "activation", what a part adds to the residual stream;
        "magnitude", the norm of its weights in the output's columns; or "curvature", what the
        removal of these columns costs by The LLM Surgeon (lab 802); channels go by what is read
        from them.
    Raises ValueError for a ratio that leaves a block nothing.
    """
    if parts == "channels":
        return Keep(channels=_largest(importance.of_channels(model, rows), ratio))
    scores = _scores(model, rows, parts, by)
    if parts == "heads":
        share = sizes(model).heads // sizes(model).kv_heads
        scores = [score.square().unflatten(0, (-1, share)).sum(1) for score in scores]
    chosen = [_largest(score, ratio) for score in scores]
    if parts == "heads":
        chosen = [[g * share + k for g in groups for k in range(share)] for groups in chosen]
    return Keep(**{parts: chosen})


def _scores(model: nn.Module, rows: Tensor, parts: str, by: str) -> list[Tensor]:
    if by == "activation":
        return {"neurons": importance.of_neurons, "heads": importance.of_heads}[parts](model, rows)
    role = {"neurons": "down", "heads": "output"}[parts]
    if by == "curvature":
        costs = costs_by_blocks(model, rows, "surgeon", role)
        norms = [costs[name][1].sqrt() for name in anatomy.projections(model, role)]
    else:
        columns = [layer.weight.detach() for layer in anatomy.projections(model, role).values()]
        norms = [weight.norm(dim=0) for weight in columns]
    if parts == "heads":
        width = sizes(model).head_dim
        norms = [norm.square().unflatten(0, (-1, width)).sum(1).sqrt() for norm in norms]
    return norms


def _largest(score: Tensor, ratio: float) -> list[int]:
    n = len(score) - round(ratio * len(score))
    if not 0 < n <= len(score):
        raise ValueError(f"a share of {ratio} of {len(score)} parts leaves {n}")
    return score.topk(n).indices.sort().values.tolist()


def doomed(model: nn.Module, keep: Keep) -> dict[str, Tensor]:
    """Parameter name -> bool of its shape, true where it will be cut; those alone with some."""
    found = {}
    stays = remaining(model, keep)
    for name, parameter in model.named_parameters():
        mask = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
        if name in stays:
            mask[torch.meshgrid(*stays[name], indexing="ij")] = False
        if mask.any():
            found[name] = mask
    return found


def streamlining_penalty(model: nn.Module, masks: Masks, norm: int = 2) -> Tensor:
    """Sum over what will be cut of w^2 (norm 2) or |w| (norm 1). masks: from `doomed`."""
    weights = {name: model.get_parameter(name) for name in masks}
    # P = sum over doomed rows and columns of ||w||_2^2, or of ||w||_1
    size = torch.square if norm == 2 else torch.abs
    return sum((size(weights[name]) * mask).sum() for name, mask in masks.items())


@torch.no_grad()
def shrink_(model: nn.Module, masks: Masks, amount: float, norm: int = 2) -> None:
    """The same pull as a step of its own, as weight decay is in AdamW (ours, not the paper's).

    Weights that will be cut are multiplied by 1 - amount (norm 2), or come nearer to zero by the
    amount and stop there (norm 1).
    """
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        if norm == 2:
            small = weight * (1 - amount)
        else:
            small = weight.sign() * (weight.abs() - amount).clamp_min(0)
        weight.copy_(torch.where(mask, small, weight))


def empty(
    model: nn.Module,
    rows: Tensor,
    keep: Keep,
    steps: int,
    rate: float,
    phase: int,
    weight: float,
    *,
    norm: int = 2,
    decoupled: bool = False,
    after_step: Callable[[int, float], None] | None = None,
    **options,
) -> list[float]:
    """Empty, cut, tune, in place and in one training; the losses on the text.

    phase: steps before the cut, in which what will go is driven towards zero; 0 cuts first. From
        then on it is zero, which computes what the sliced model does and keeps the optimizer's
        averages. weight: of the penalty beside the loss, lambda; if decoupled, of `shrink_` in
        units of the step's rate; 0 empties nothing. options: as `recover` takes them.
    """
    masks = doomed(model, keep)

    def penalty(step: int) -> Tensor:
        pull = weight if step < phase else 0.0
        return pull * streamlining_penalty(model, masks, norm)

    def after(step: int, now: float) -> None:
        if step + 1 >= phase:
            shrink_(model, masks, 1.0)
        elif decoupled:
            shrink_(model, masks, now * weight, norm)
        if after_step is not None:
            after_step(step, now)

    if phase == 0:
        shrink_(model, masks, 1.0)
    inside = penalty if weight and not decoupled else None
    return recover(model, rows, steps, rate, penalty=inside, after_step=after, **options)


def leak(model: nn.Module, rows: Tensor, keep: Keep) -> list[float]:
    """How much of each feed-forward layer's output comes from neurons that will be cut, 0 to 1.

    The root of the share of squares, with the output taken apart into what stays and what goes:
    rms(out_go) / sqrt(rms(out_go)^2 + rms(out_stay)^2). 0 where a block keeps all.
    """
    layers, sums = anatomy.projections(model, "down"), {}

    def watch(name: str, stays: Sequence[int]):
        goes = torch.ones(layers[name].weight.shape[1], dtype=torch.bool)
        goes[list(stays)] = False
        sums[name] = torch.zeros(2)

        def hook(layer: nn.Module, given: tuple) -> None:
            hidden, weight = given[0].detach().float().flatten(0, -2), layer.weight.detach().float()
            for place, part in enumerate((goes, ~goes)):
                out = hidden[:, part] @ weight[:, part].t()  # (tokens, dim), of these neurons alone
                sums[name][place] += out.square().sum().cpu()

        return hook

    each = dict(zip(layers, keep.neurons, strict=True))
    handles = [
        layers[name].register_forward_pre_hook(watch(name, stays))
        for name, stays in each.items()
        if stays is not None
    ]
    try:
        token_losses(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    nothing = torch.tensor([0.0, 1.0])
    squares = [sums.get(name, nothing) for name in layers]
    return [(go / (go + stay).clamp_min(1e-30)).sqrt().item() for go, stay in squares]


def norms_of_neurons(model: nn.Module, block: int, neurons: Sequence[int]) -> Tensor:
    """Norm of each neuron's column in a block's `down`: (neurons,)."""
    return anatomy.projection(model, block, "down").weight.detach()[:, list(neurons)].norm(dim=0)
