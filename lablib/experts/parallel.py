"""Experts spread over processes: tokens travel to their experts and back by all-to-all.

Each process holds its own tokens, a copy of everything but the experts, and n_experts / processes
of those. Sources: GShard (Lepikhin et al., 2020), section 3.2; Switch Transformers, section 5.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lablib.experts.moe import Experts, FeedForwardExperts, SwiGLUExperts, moe_layers
from lablib.experts.routing import Assignments
from lablib.kernels import merge_tokens


class _AllToAll(torch.autograd.Function):
    """Send the first sends[0] rows to process 0, the next sends[1] to process 1, ..."""

    @staticmethod
    def forward(ctx, rows, sends, receives, group):
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        out = rows.new_empty(sum(receives), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), receives, sends, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.receives, ctx.sends, ctx.group), None, None, None


class ParallelExperts(Experts):
    """One process's experts, called with the rows that all processes have for them.

    local: the experts of this process, n_experts / processes of them, in the order of ranks.
    Their parameters carry `process_group`, by which `fit` knows not to average them over processes
    and to take the gradient's norm over all of them. Their gradients are those of the mean of the
    processes' losses, as DistributedDataParallel makes the others'.
    """

    def __init__(self, local: Experts, group: dist.ProcessGroup | None = None):
        group = group or dist.group.WORLD
        processes = dist.get_world_size(group)
        super().__init__(processes * local.n_experts)
        self.local, self.group, self.processes = local, group, processes
        for parameter in local.parameters():
            parameter.process_group = self.group
            parameter.register_hook(lambda grad: grad / self.processes)

    def mix(self, x: Tensor, assigned: Assignments) -> Tensor:
        sent = assigned.counts.view(self.processes, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        sends, receives = sent.sum(1).tolist(), received.sum(1).tolist()
        rows = x.index_select(0, assigned.token)
        rows = _AllToAll.apply(rows, sends, receives, self.group)
        rows = _AllToAll.apply(self._run(rows, received), receives, sends, self.group)
        return merge_tokens(rows.new_zeros(x.shape), rows, assigned.token, assigned.weight)

    def _run(self, rows: Tensor, received: Tensor) -> Tensor:
        """rows: sorted by sender, then expert; received: (processes, local experts) of them."""
        expert = torch.arange(received.numel(), device=rows.device) % received.shape[1]
        order = expert.repeat_interleave(received.flatten()).argsort(stable=True)
        out = self.local(rows.index_select(0, order), received.sum(0))
        return torch.empty_like(out).index_copy(0, order, out)


def parallelize(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Keep only this process's share of the experts in every MoE layer of the model, in place.

    Their routers balance the tokens of all processes as one batch. Every process calls it with the
    same model. Raises ValueError when a layer's number of experts is not a multiple of the number
    of processes, TypeError for experts that can't be split.
    """
    group = group or dist.group.WORLD
    rank, processes = dist.get_rank(group), dist.get_world_size(group)
    for name, layer in moe_layers(model).items():
        experts = layer.experts
        if experts.n_experts % processes:
            raise ValueError(f"{name}: {experts.n_experts} experts over {processes} processes")
        if not isinstance(experts, (FeedForwardExperts, SwiGLUExperts)):
            raise TypeError(f"{name}: {type(experts).__name__} can't be split over processes")
        share = experts.n_experts // processes
        mine = slice(rank * share, (rank + 1) * share)
        for key, weight in list(experts.named_parameters()):
            setattr(experts, key, nn.Parameter(weight.detach()[mine].clone()))
        experts.n_experts = share
        layer.experts, layer.router.group = ParallelExperts(experts, group), group
