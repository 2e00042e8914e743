"""Switch Transformers (Fedus, Zoph and Shazeer, 2021): each token goes to one expert.

Lab 302. The layer (section 2.1, equations 1 and 2 with k = 1), its capacity (equation 3) and its
balancing loss (equations 4 to 6) are `lablib.experts.moe.MoE` with top_k=1. Here: which blocks get
it, and what section 2.4 adds - selective precision, a smaller initialization, expert dropout -
then section 4.2, distillation into a dense model, and the speed-up of section 3.1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.moe import Assignments, Experts, MoE, Record, Router, SwiGLUExperts, moe_layers
from lablib.kernels import grouped_linear
from lablib.models import anatomy


class SwitchExperts(SwiGLUExperts):
    """SwiGLU experts with dropout on what lies between their two products: expert dropout.

    dropout: the rate in training; 0.4 in fine-tuning (section 2.4, Table 4), 0 in pre-training.
    """

    def __init__(self, n_experts: int, dim: int, width: int, dropout: float = 0.0):
        super().__init__(n_experts, dim, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, self.gate_up, counts).chunk(2, -1)
        return grouped_linear(self.dropout(F.silu(gate) * up), self.down, counts)

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        if self.training and self.dropout.p:
            return Experts.mix(self, x, assigned)
        return super().mix(x, assigned)  # the faster kernel has no dropout


def switch_layer(
    dim: int,
    width: int,
    n_experts: int,
    *,
    capacity_factor: float | None = 1.25,
    balance: float = 1e-2,
    jitter: float = 1e-2,
    expert_dropout: float = 0.0,
) -> MoE:
    """A Switch layer: (..., dim) -> (..., dim), each token through one of n_experts.

    width: of each expert; that of the dense layer keeps the FLOPs per token, but for the router's
        2 * dim * n_experts.
    capacity_factor: 1.0 to 1.25 work best (Table 1); None drops no token.
    balance: alpha of equation 4; 1e-2 throughout the paper, from a sweep of 1e-1 to 1e-5.
    jitter: epsilon of the noise on the router's input (appendix C; 1e-2 in its configurations).
    """
    experts = SwitchExperts(n_experts, dim, width, expert_dropout)
    options = {"capacity_factor": capacity_factor, "balance": balance, "jitter": jitter}
    return MoE(dim, experts, n_experts, top_k=1, **options)


def switch_(model: nn.Module, n_experts: int, every: int = 2, **options) -> nn.Module:
    """Put a Switch layer in the place of every second feed-forward layer, in place.

    The second, fourth and so on: "experts at every other feed-forward layer" (Table 1). Experts
    are as wide as the layer they replace, so FLOPs per token stay. The weights are new ones.
    options: as in `switch_layer`. Returns model.
    Works on `GPT` and transformers' Llama-like models. Raises ValueError when no layer is replaced.
    """
    places = range(every - 1, len(anatomy.blocks(model)), every)
    if not places:
        raise ValueError(f"{len(anatomy.blocks(model))} blocks have no {every}th one")
    widths = list(anatomy.projections(model, "gate").values())
    for place in places:
        width, dim = widths[place].weight.shape
        layer = switch_layer(dim, width, n_experts, **options).to(widths[place].weight)
        layer.router.float()
        anatomy.replace_part(model, place, "mlp", layer)
    return model


@torch.no_grad()
def reduced_init_(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Draw all weight matrices but the embeddings again, with standard deviation sqrt(scale / n).

    n: how many inputs the matrix has. A normal distribution cut at two standard deviations.
    scale: 0.1; Transformers use 1.0. Source: section 2.4, "Smaller parameter initialization for
    stability", and Table 3. The paper does not say where the distribution is cut.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in tables:
            std = math.sqrt(scale / parameter.shape[-1])
            nn.init.trunc_normal_(parameter, 0.0, std, -2 * std, 2 * std)
    return model


class BFloat16Router(Router):
    """A router that computes in bfloat16: what selective precision avoids (Table 2)."""

    @classmethod
    def of(cls, router: Router) -> BFloat16Router:
        """The same router, its weights rounded."""
        n_experts, dim = router.weight.shape
        made = cls(dim, n_experts, router.jitter).to(router.weight.device, torch.bfloat16)
        made.weight.data.copy_(router.weight)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x: (tokens, dim) -> logits (tokens, n_experts), bfloat16."""
        return F.linear(x.bfloat16(), self.weight.bfloat16())


def add_dropout(model: nn.Module, rate: float, expert_rate: float) -> list:
    """Dropout for fine-tuning: `rate` on what non-expert layers add, `expert_rate` inside experts.

    Table 4's best is 0.1 and 0.4. Returns handles; `handle.remove()` ends the first kind.
    """
    handles = []
    for place in range(len(anatomy.blocks(model))):
        for role in ("attention", "mlp"):
            part = anatomy.part(model, place, role)
            if isinstance(part, MoE):
                part.experts.dropout.p = expert_rate
            else:
                handles.append(part.register_forward_hook(_dropping(rate)))
    return handles


def _dropping(rate: float) -> Callable:
    return lambda module, inputs, output: F.dropout(output, rate, module.training)


@torch.no_grad()
def copy_non_experts_(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Give a dense student all of the teacher's weights but those of Switch layers, in place.

    Returns the names of what was copied. Works because both have equal sizes outside the Switch
    layers (section 4.2). Raises ValueError when nothing fits.
    """
    own, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    copied = [name for name in own if name in theirs and theirs[name].shape == own[name].shape]
    if not copied:
        raise ValueError("student and teacher have no parameter of one name and shape")
    for name in copied:
        own[name].copy_(theirs[name])
    return copied


def distill_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, teacher_weight: float = 0.25
) -> Tensor:
    """Cross-entropy with a mix of the teacher's probabilities and the labels, in nats.

    logits, teacher_logits: (..., vocab); targets: (...,) int64.
    teacher_weight: 0.25, so that labels have 0.75 (section 4.2, Table 6).
    """
    vocab = logits.shape[-1]
    soft = teacher_logits.detach().softmax(-1).view(-1, vocab)
    flat = logits.reshape(-1, vocab)
    hard = F.cross_entropy(flat, targets.reshape(-1))
    return teacher_weight * F.cross_entropy(flat, soft) + (1 - teacher_weight) * hard


def distilling(teacher: nn.Module, teacher_weight: float = 0.25) -> Callable:
    """The loss of `lablib.training.fit` that distills teacher: (student, tokens) -> scalar.

    tokens: (batch, length + 1). The teacher is put into eval mode.
    """
    teacher.eval()

    def loss(student: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            soft = anatomy.logits(teacher, tokens[:, :-1])
        found = anatomy.logits(student, tokens[:, :-1])
        return distill_loss(found, soft, tokens[:, 1:], teacher_weight)

    return loss


def steps_to(steps: Sequence[float], losses: Sequence[float], target: float) -> float:
    """The step at which a curve first is at or below target, between two points on a line.

    Returns infinity when it never is.
    """
    before = None
    for step, loss in zip(steps, losses):
        if loss <= target:
            if before is None:
                return float(step)
            last_step, last = before
            return last_step + (step - last_step) * (last - target) / (last - loss)
        before = step, loss
    return math.inf


def speed_up(steps: Sequence[float], dense: Sequence[float], switch: Sequence[float]) -> float:
    """Steps of the dense model over steps of the Switch model to one loss: the higher final one.

    steps, dense, switch: curves of held-out loss, taken at the same steps. Above 1 the Switch model
    is faster to the dense model's final loss; below 1 the dense model to that of the Switch model.
    Source: section 3.1, where Switch-Base with 64 experts has 7.5 (450k steps over 60k).
    """
    target = max(dense[-1], switch[-1])
    return steps_to(steps, dense, target) / steps_to(steps, switch, target)


@contextlib.contextmanager
def watched_load(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Within the block, each training step leaves how many tokens asked for each expert.

    name -> list of (n_experts,) int64: what `recorded` keeps whole, small enough for a training.
    Calls in eval mode, such as held-out losses, are not counted.
    """
    layers = moe_layers(model)
    loads: dict[str, list[Tensor]] = {name: [] for name in layers}
    try:
        for name, layer in layers.items():
            layer.records = _Counts(layer, loads[name])
        yield loads
    finally:
        for layer in layers.values():
            layer.records = None


class _Counts:
    def __init__(self, layer: MoE, kept: list[Tensor]):
        self.layer, self.kept = layer, kept

    def append(self, record: Record) -> None:
        if self.layer.training:
            self.kept.append(record.experts.flatten().bincount(minlength=self.layer.n_experts))


def dropped_at(asked: Tensor, capacity_factor: float) -> Tensor:
    """Share of tokens that would find no place at another capacity factor: (...,).

    asked: (..., n_experts), tokens that asked for each expert. Source: equation 3.
    """
    tokens = asked.sum(-1, keepdim=True)
    places = (capacity_factor * tokens / asked.shape[-1]).ceil().clamp(min=1)
    return (asked - places).clamp(min=0).sum(-1) / tokens.squeeze(-1)
