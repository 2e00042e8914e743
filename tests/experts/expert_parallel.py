"""Run by test_parallel.py: train a small MoE, write this process's losses and weights.

Process r of n, RANK of WORLD_SIZE, trains on rows r, r + n, ... of every batch.
"""

import ipaddress
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.experts.parallel import parallelize
from lablib.experts.routing import TokenChoice
from lablib.models import GPT, GPTConfig
from lablib.training import fit
from lablib.training.clipping import clip_gradients
from lablib.training.losses import auxiliary_loss, next_token_loss, padded_next_token_loss


def build() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=23, dim=16, n_layers=2, n_heads=2, max_length=16))
    for block in model.blocks:
        router = TokenChoice(16, 4, top_k=2, balance=0.1, z=0.01)
        block.mlp = MoE(router, SwiGLUExperts(4, 16, 12))
    return model


def gradients(model: GPT, tokens: torch.Tensor) -> tuple[dict, float]:
    """Of the first batch, others than experts' averaged over processes, and their norm."""
    (next_token_loss(model, tokens) + auxiliary_loss(model)).backward()
    for parameter in model.parameters():
        if not hasattr(parameter, "process_group"):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
    norm = clip_gradients(model.parameters(), 0.5).item()
    found = named((key, p.grad) for key, p in model.named_parameters())
    model.zero_grad()
    return found, norm


def named(tensors) -> dict:
    return {key.replace(".local", ""): t.tolist() for key, t in tensors if "mlp" in key}


def padded_gradients(model: GPT, batches: torch.Tensor, rank: int, processes: int) -> dict:
    """Of rows of which some are cut, so that processes hold different numbers of tokens.

    The gradients that `fit` makes: of the sums of all, over the number of all.
    """
    rows = batches.flatten(0, 1)[rank::processes]
    lengths = torch.arange(rank, 20 * 8, processes)[: len(rows)] % 2 * 7 + 5  # 5, 12, 5, 12, ...
    mask = torch.arange(rows.shape[1]) < lengths[:, None]
    total, count = padded_next_token_loss(model.train(), (rows, mask))
    (total + auxiliary_loss(model) * count).backward()
    if processes > 1:
        dist.all_reduce(count)
    for parameter in model.parameters():
        if not hasattr(parameter, "process_group"):
            dist.all_reduce(parameter.grad)
            parameter.grad /= processes
        parameter.grad *= processes / count
    made = named((key, p.grad) for key, p in model.named_parameters())
    model.zero_grad()
    return made


def listening() -> list[str] | None:
    """Addresses that this process listens on; None where Linux's tables are not there."""
    if not (tables := [p for p in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")) if p.exists()]):
        return None
    mine = {os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()}
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    own = [row for row in rows if any(link.endswith(f"socket:[{row[9]}]") for link in mine)]
    return [_address(row[1]) for row in own if row[3] == "0A"]


def _address(text: str) -> str:
    """An address of /proc/net/tcp: words of four bytes, each in the machine's own order."""
    words = [text[i : i + 8] for i in range(0, len(text.partition(":")[0]), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    return str(ipaddress.ip_address(packed))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(f"{folder}/{processes}-store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    model = build()
    start = torch.randint(23, (20, 8, 1), generator=torch.Generator().manual_seed(1))
    batches = (start + torch.arange(13)) % 23
    options = {}
    if processes > 1:
        parallelize(model)
        options = {"devices": processes, "strategy": DDPStrategy(process_group_backend="gloo")}
    padded = padded_gradients(model, batches, rank, processes)
    batches = list(batches[:, rank::processes])
    grads, norm = gradients(model, batches[0])
    history = fit(
        model, batches, steps=20, lr=0.01, warmup=1, clip=0.5,
        progress=False, **options,
    )  # fmt: skip
    weights = named(model.state_dict().items())
    found = {
        "losses": history.losses,
        "weights": weights,
        "grads": grads,
        "norm": norm,
        "padded": padded,
    }
    found["listening"] = listening()
    with open(f"{folder}/{processes}-{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
