"""A unified view of efficient tuning (He et al., 2022): each method adds a modification to h.

Lab 701. h is what a frozen part computes, x what it reads. A method adds delta = f(z W_down) W_up:

    form        f is ReLU, softmax, or nothing at all
    insertion   z is h (serial) or x (parallel)
    place       h is what attention, each of its heads, or the feed-forward layer gives, or a weight
    compose     h + delta, h + s delta, or (1 - lambda) h + lambda delta

Section 3.2 and Table 1. Prefix tuning is one of them: softmax, parallel, in the heads, gated.
"""

from __future__ import annotations

import contextlib
import csv
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lablib.models.gpt import GPT, Attention
from lablib.paths import data_dir
from lablib.peft.bottleneck import FORMS, INSERTIONS, bottleneck_, heads_
from lablib.peft.lora import lora_
from lablib.peft.prefix import prefix_


def prefix_as_adapter(
    q: Tensor, k: Tensor, p_k: Tensor, p_v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A prefix as what an adapter does: the gate lambda and the modification delta of a head h,

        Attn(q, [P_k; K], [P_v; V]) = (1 - lambda) h + lambda delta,   h = Attn(q, K, V).

    q: (..., queries, d). k: (..., keys, d). p_k, p_v: (..., length, d).
    mask: (queries, keys), true where a query sees a key.
    Returns lambda (..., queries, 1) and delta (..., queries, d).
    Source: equations 7 to 10; scores are divided by sqrt(d), which they leave out.
    """
    scale = q.shape[-1] ** -0.5
    on_rows = scale * q @ p_k.mT  # q W_1, W_1 = P_k^T: (..., queries, length)
    on_text = scale * q @ k.mT  # (..., queries, keys)
    if mask is not None:
        on_text = on_text.masked_fill(~mask, -torch.inf)
    rows, text = on_rows.logsumexp(-1, True), on_text.logsumexp(-1, True)
    gate = (rows - text).sigmoid()  # lambda = e^rows / (e^rows + e^text)
    return gate, on_rows.softmax(-1) @ p_v  # delta = f(q W_1) W_2, W_2 = P_v


COMPOSE = ("add", "scale", "gate")
WEIGHTS = {  # the projections of a LoRA at each place, in GPT and Llama
    "attention weights": ("query", "value"),
    "mlp weights": ("gate", "up", "down"),
}
PLACES = ("attention", "heads", "mlp", *WEIGHTS)


@dataclass(frozen=True)
class Modification:
    """One row of Table 1. rank: r, or a prefix's length l. scale: s, where it is composed so."""

    form: str
    insertion: str
    place: str
    compose: str
    rank: int
    scale: float = 4.0

    @property
    def factor(self) -> float:
        """What delta is multiplied by."""
        return self.scale if self.compose == "scale" else 1.0

    @property
    def start(self) -> str:
        """How W_down and W_up start: as LoRA's where scaled, as BERT's else (appendix A.3)."""
        return "lora" if self.compose == "scale" else "bert"


def why_not(m: Modification) -> str:
    """Why there is no such modification; empty when there is."""
    menus = (m.form, tuple(FORMS)), (m.insertion, INSERTIONS), (m.place, PLACES)
    for chosen, known in (*menus, (m.compose, COMPOSE)):
        if chosen not in known:
            return f"{chosen!r} is none of {', '.join(known)}"
    if m.insertion == "serial" and m.place not in ("attention", "mlp"):
        return f"serial reads what a whole sublayer gives, so not at {m.place}"
    if m.compose == "gate" and (m.form, m.place) != ("softmax", "heads"):
        return "a gate shares out attention, so it needs softmax in the heads"
    if m.place in WEIGHTS and m.form != "linear":
        return f"only a linear form is a change of weights, {m.form} is none"
    return ""


def modify_(model: nn.Module, *modifications: Modification) -> None:
    """Put modifications into every block, in place. Raises ValueError for one that can't be."""
    for m in modifications:
        options = {"scale": m.factor, "form": m.form, "start": m.start}
        if reason := why_not(m):
            raise ValueError(reason)
        if m.compose == "gate":
            prefix_(model, m.rank)
        elif m.place == "heads":
            heads_(model, m.rank, **options)
        elif m.place in WEIGHTS:
            lora_(model, WEIGHTS[m.place], m.rank, alpha=m.factor * m.rank)
        else:
            bottleneck_(model, m.rank, (m.place,), m.insertion, **options)


def table_1(rank: int = 8, scale: float = 4.0) -> dict[str, Modification]:
    """The rows of Table 1, existing methods first, all of one rank."""
    rows = {
        "prefix tuning": ("softmax", "parallel", "heads", "gate"),
        "adapter": ("relu", "serial", "mlp", "add"),
        "LoRA": ("linear", "parallel", "attention weights", "scale"),
        "parallel adapter": ("relu", "parallel", "mlp", "add"),
        "multi-head parallel adapter": ("relu", "parallel", "heads", "add"),
        "scaled parallel adapter": ("relu", "parallel", "mlp", "scale"),
    }
    return {name: Modification(*row, rank, scale) for name, row in rows.items()}


def mam(prefix: int = 30, rank: int = 512, scale: float = 4.0) -> tuple[Modification, ...]:
    """Mix-and-match: a short prefix, and a scaled parallel adapter at the feed-forward layer."""
    rows = table_1(rank, scale)
    short = Modification("softmax", "parallel", "heads", "gate", prefix)
    return short, rows["scaled parallel adapter"]


def mam_(
    model: nn.Module,
    prefix: int = 30,
    rank: int = 512,
    scale: float = 4.0,
    mlp: int | None = None,
) -> None:
    """Put a MAM adapter into the model. mlp: width of the prefix's MLP, 800 in the paper."""
    _, adapter = mam(prefix, rank, scale)
    prefix_(model, prefix, mlp=mlp)
    modify_(model, adapter)


def parameters(m: Modification, dim: int, ffn_dim: int) -> int:
    """Of one sublayer, biases left out: 2ld, 2rd, 4rd, or 10rd where ffn_dim is 4 dim.

    Counts a feed-forward layer of two matrices, and as many key as query heads.
    Source: Table 10.
    """
    if m.place == "attention weights":
        return 2 * m.rank * (dim + dim)
    if m.place == "mlp weights":
        return 2 * m.rank * (dim + ffn_dim)
    return 2 * m.rank * dim


# Table 9; one of the 12 layers is an encoder's and a decoder's. total: of transformers' bart-large.
BART_LARGE = {"layers": 12, "attention": 3, "mlp": 2, "dim": 1024, "ffn_dim": 4096}
BART_LARGE["total"] = 406_291_456


def share_of_bart(*modifications: Modification) -> float:
    """Added parameters over those of BART-large, 0 to 1."""
    sizes = BART_LARGE["dim"], BART_LARGE["ffn_dim"]
    added = 0
    for m in modifications:
        sublayers_a_layer = BART_LARGE["mlp" if m.place.startswith("mlp") else "attention"]
        added += sublayers_a_layer * BART_LARGE["layers"] * parameters(m, *sizes)
    return added / BART_LARGE["total"]


def published() -> list[dict[str, str]]:
    """The paper's tables: a row a method; share: of parameters, in per cent; scores in points."""
    path = data_dir() / "published" / "unified-peft.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def gates(model: GPT, tokens: Tensor) -> Tensor:
    """lambda of every head: (batch, n) tokens -> (blocks, batch, heads, n).

    Raises ValueError when the model has no prefix.
    """
    seen: list[Tensor] = []

    def look(attention: nn.Module, args: tuple, given: dict, output: Tensor) -> None:
        seen.append(_gate(attention, *args, given["rotary"]))

    with contextlib.ExitStack() as hooks:
        for attention in [m for m in model.modules() if isinstance(m, Attention)]:
            if hasattr(attention, "prefix"):
                handle = attention.register_forward_hook(look, with_kwargs=True)
                hooks.callback(handle.remove)
        model(tokens)
    if not seen:
        raise ValueError("the model has no prefix: put one with prefix_")
    return torch.stack(seen)


def _gate(attention: Attention, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x: (batch, n, dim) -> (batch, heads, n)."""
    q, k, _ = attention.heads(x, rotary)  # (batch, heads or kv_heads, n, head_dim)
    rows = [part.unflatten(1, (k.shape[1], -1)).transpose(0, 1) for part in attention.prefix.rows()]
    group = q.shape[1] // k.shape[1]  # query heads that share a key
    k, p_k, p_v = (part.repeat_interleave(group, -3) for part in (k, *rows))
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril()
    return prefix_as_adapter(q, k, p_k, p_v, causal)[0].squeeze(-1)
