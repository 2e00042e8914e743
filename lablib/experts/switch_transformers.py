"""Switch Transformers (Fedus, Zoph and Shazeer, 2021): each token goes to one expert.

Lab 302. `SwitchFFN` is the layer as the paper defines it; `switch_layer` makes the same layer of
fast parts from `lablib.experts.moe`. Then which blocks get it, and what section 2.4 adds -
selective precision, a smaller initialization, expert dropout - section 4.2, distillation into a
dense model, and the speed-up of section 3.1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.experts.moe import Experts, MoE, SwiGLUExperts, moe_layers, observed, recorded
from lablib.experts.routing import Assignments, LeavesLoss, Record, TokenChoice, capacity
from lablib.kernels import grouped_linear
from lablib.models import anatomy
from lablib.modes import kept_modes
from lablib.training.losses import next_token_loss


class SwitchFFN(LeavesLoss):
    """A Switch layer, written as in sections 2.1 and 2.2: (..., dim) -> (..., dim).

    experts: modules (n, dim) -> (n, dim). capacity_factor: of training; in eval mode no token is
    dropped. alpha: weight of the balancing loss that training leaves in `auxiliary_loss`.
    """

    def __init__(
        self,
        dim: int,
        experts: Iterable[nn.Module],
        capacity_factor: float = 1.25,
        alpha: float = 1e-2,
    ):
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = nn.Linear(dim, len(self.experts), bias=False)  # W_r
        self.capacity_factor, self.alpha = capacity_factor, alpha

    def forward(self, x: Tensor) -> Tensor:
        tokens, n = x.reshape(-1, x.shape[-1]), len(self.experts)  # (tokens, dim)
        # Equation 1: p(x) = softmax(W_r x), in float32.
        p = self.router(tokens.float()).softmax(-1)  # (tokens, n)
        gate, chosen = p.max(-1)  # (tokens,), (tokens,)
        # Equation 3: expert capacity = tokens / n * capacity factor.
        places = capacity(len(tokens), n, self.capacity_factor) if self.training else len(tokens)
        y = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            row = (chosen == i).nonzero()[:places, 0]  # (kept,): later tokens are dropped
            # Equation 2: y = p_i(x) E_i(x).
            y[row] = gate[row, None].to(y.dtype) * expert(tokens[row])
        if self.training:
            # Equations 4 to 6: loss = alpha n sum_i f_i P_i, tokens' shares, mean probabilities.
            f = chosen.bincount(minlength=n) / len(tokens)  # (n,)
            self.auxiliary_loss = self.alpha * n * (f * p.mean(0)).sum()
        return y.view(x.shape)


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
    eval_capacity_factor: float | None = None,
    balance: float = 1e-2,
    jitter: float = 1e-2,
    expert_dropout: float = 0.0,
) -> MoE:
    """A Switch layer: (..., dim) -> (..., dim), each token through one of n_experts.

    width: of each expert; that of the dense layer keeps the FLOPs per token, but for the router's
        2 * dim * n_experts.
    capacity_factor: of training; 1.0 to 1.25 work best (Table 1); None drops no token.
    eval_capacity_factor: of eval mode; None drops no token, see `TokenChoice`.
    balance: alpha of equation 4; 1e-2 throughout the paper, from a sweep of 1e-1 to 1e-5.
    jitter: epsilon of the noise on the router's input (appendix C; 1e-2 in its configurations).
    """
    router = TokenChoice(
        dim,
        n_experts,
        capacity_factor=capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        balance=balance,
        jitter=jitter,
    )
    return MoE(router, SwitchExperts(n_experts, dim, width, expert_dropout))


def switch_(model: nn.Module, n_experts: int, every: int = 2, **options) -> nn.Module:
    """Put a Switch layer in the place of every second feed-forward layer, in place.

    The second, fourth and so on: "experts at every other feed-forward layer" (Table 1). Experts
    are as wide as the layer they replace, so FLOPs per token stay. The weights are new ones.
    options: as in `switch_layer`. Returns model.
    Works on `GPT` and transformers' Llama-like models. Raises ValueError, and leaves the model as
    it was, when no layer is replaced or one of them is a mixture of experts already.
    """
    places = range(every - 1, len(anatomy.blocks(model)), every)
    if not places:
        raise ValueError(f"{len(anatomy.blocks(model))} blocks have no {every}th one")
    for place in places:
        if isinstance(anatomy.part(model, place, "mlp"), (MoE, SwitchFFN)):
            raise ValueError(f"block {place} is a mixture of experts already: switch a dense model")
    for place in places:
        weight = anatomy.projection(model, place, "gate").weight  # (width, dim)
        width, dim = weight.shape
        layer = switch_layer(dim, width, n_experts, **options).to(weight)
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


class BFloat16Router(TokenChoice):
    """A router that computes in bfloat16: what selective precision avoids (Table 2)."""

    @classmethod
    def of(cls, router: TokenChoice) -> BFloat16Router:
        """The same router, its weights rounded."""
        made = cls(
            router.weight.shape[1],
            router.n_experts,
            router.top_k,
            router.softmax,
            capacity_factor=router.capacity_factor,
            eval_capacity_factor=router.eval_capacity_factor,
            capacity_of=router.capacity_of,
            balance=router.balance,
            z=router.z,
            jitter=router.jitter,
        ).to(router.weight.device, torch.bfloat16)
        made.weight.data.copy_(router.weight)
        return made.train(router.training)

    def logits(self, x: Tensor) -> Tensor:
        """x: (tokens, dim) -> (tokens, n_experts), bfloat16."""
        return F.linear(self.noisy(x.bfloat16()), self.weight.bfloat16())


def add_dropout(model: nn.Module, rate: float, expert_rate: float) -> None:
    """Dropout for fine-tuning: `rate` on what non-expert layers add, `expert_rate` inside experts.

    Table 4's best is 0.1 and 0.4. A second call sets new rates; 0 ends it.
    Raises ValueError for experts that have no dropout.
    """
    for place in range(len(anatomy.blocks(model))):
        for role in ("attention", "mlp"):
            part = anatomy.part(model, place, role)
            if not isinstance(part, MoE):
                _drop_output(part, rate)
            elif isinstance(part.experts, SwitchExperts):
                part.experts.dropout.p = expert_rate
            else:
                raise ValueError(f"block {place}: {type(part.experts).__name__} have no dropout")


def _drop_output(part: nn.Module, rate: float) -> None:
    """Drop a share of what part returns, in training; transformers' attention returns a tuple."""
    if hasattr(part, "output_dropout"):
        part.output_dropout.p = rate
        return

    def drop(part: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):
            return part.output_dropout(output[0]), *output[1:]
        return part.output_dropout(output)

    part.output_dropout = nn.Dropout(rate)
    part.register_forward_hook(drop)


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
        logits = anatomy.logits(student, tokens[:, :-1])
        return distill_loss(logits, soft, tokens[:, 1:], teacher_weight)

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
    loads: dict[str, list[Tensor]] = {name: [] for name in moe_layers(model)}

    def count(name: str, layer: MoE, record: Record) -> None:
        if layer.training:
            asked = record.experts.flatten().bincount(minlength=layer.router.n_experts)
            loads[name].append(asked)

    with observed(model, count):
        yield loads


def dropped_at(asked: Tensor, capacity_factor: float) -> Tensor:
    """Share of tokens that would find no place at another capacity factor: (...,).

    asked: (..., n_experts), tokens that asked for each expert. Source: equation 3.
    """
    tokens = asked.sum(-1)  # (...,)
    n_experts = asked.shape[-1]
    places = [capacity(int(n), n_experts, capacity_factor) for n in tokens.flatten()]
    places = asked.new_tensor(places).view(*tokens.shape, 1)  # (..., 1)
    return (asked - places).clamp(min=0).sum(-1) / tokens.clamp(min=1)


@torch.no_grad()
def routes(model: nn.Module, tokens: Tensor) -> Tensor:
    """Which expert each token asks for in each layer of experts: (layers, batch * length) int64.

    tokens: (batch, length). The model is in eval mode for it, and as it was afterwards.
    """
    with kept_modes(model), recorded(model) as records:
        anatomy.logits(model.eval(), tokens)
    return torch.stack([record.experts[:, 0].cpu() for (record,) in records.values()])


def watching(probe: Tensor, seen: list[Tensor]) -> Callable:
    """The next-token loss of `lablib.training.fit`, which first notes where a probe's tokens go.

    probe: (batch, length). seen: gets the probe's `routes` before each training step.
    """

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        if model.training:
            seen.append(routes(model, probe.to(tokens.device)))
        return next_token_loss(model, tokens)

    return loss
