"""Write limited-data.safetensors: sentence-transformers' cosine loss, and the pairs SetFit draws.

For an environment of its own:
    python -m venv peer && peer/bin/pip install sentence-transformers==6.2.0 setfit==1.2.0
    peer/bin/python tests/peft/record_limited_data.py data/published/limited-data.safetensors
The inputs are in the file, too, so that lab 711 compares with it and needs no such library.
"""

import json
import sys
from importlib.metadata import version

import torch
from safetensors.torch import save_file
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from setfit.sampler import ContrastiveDataset

PACKAGES = ("sentence-transformers", "setfit", "torch")
LABELS = (0, 0, 0, 0, 1, 1, 1, 2, 2)
PAIRS, DIM = 14, 6


class Vectors(torch.nn.Module):
    """A model whose texts are their vectors."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return features


def cosine_loss() -> dict[str, torch.Tensor]:
    """Vectors of both sides (14, 6), equal or not (14,), the loss, and its slope at each side."""
    draw = torch.Generator().manual_seed(0)
    sides = [torch.randn(PAIRS, DIM, dtype=torch.float64, generator=draw) for _ in range(2)]
    first, second = (side.requires_grad_() for side in sides)
    same = torch.randint(2, (PAIRS,), generator=draw)
    rows = [{"sentence_embedding": side} for side in (first, second)]
    loss = CosineSimilarityLoss(Vectors())(rows, same.double())
    loss.backward()
    found = {"first": first, "second": second, "same": same, "loss": loss.view(1)}
    return found | {"slope of first": first.grad, "slope of second": second.grad}


def sampled() -> dict[str, torch.Tensor]:
    """One pass of SetFit's sampler as it is set by default: (pairs, 3) first, second, same."""
    texts = [str(place) for place in range(len(LABELS))]
    rows = [
        (int(row["sentence_1"]), int(row["sentence_2"]), int(row["label"]))
        for row in ContrastiveDataset(texts, list(LABELS), multilabel=False)
    ]
    return {"labels": torch.tensor(LABELS), "pairs": torch.tensor(rows)}


def record(file: str) -> None:
    """All of it."""
    tensors = {n: t.detach().contiguous().clone() for n, t in (cosine_loss() | sampled()).items()}
    header = {"versions": json.dumps({name: version(name) for name in PACKAGES})}
    save_file(tensors, file, metadata=header)


if __name__ == "__main__":
    record(sys.argv[1])
