"""Write drama-losses.json: what sentence-transformers computes for vectors drawn once.

With the test packages, or in an environment of its own:
    python -m venv peer && peer/bin/pip install sentence-transformers==6.2.0
    peer/bin/python tests/embeddings/record_drama.py data/published/drama-losses.json
The inputs are in the file, too, so that lab 1005 compares with it and needs no such library.
"""

import json
import sys
from importlib.metadata import version

import numpy as np
import torch

SIZES = (8, 2)  # numbers of a vector that are trained to do alone
PACKAGES = ("sentence-transformers", "torch")


def inputs() -> dict[str, torch.Tensor]:
    """Queries, documents and negatives (6, 8); scores that a student and a teacher give (3, 5)."""
    rng = np.random.RandomState(0)
    drawn = {name: rng.randn(6, SIZES[0]) for name in ("queries", "documents", "negatives")}
    drawn |= {"scores": rng.randn(3, 5), "gains": 4 * rng.rand(3, 5)}
    return {name: torch.tensor(values.round(6)) for name, values in drawn.items()}


class Vectors(torch.nn.Module):
    """A model whose texts are their vectors."""

    truncate_dim = None

    def forward(self, features):
        return features

    def get_embedding_dimension(self):
        return SIZES[0]


class Scorer(torch.nn.Module):
    """A model that looks up the score of a list's text."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores: torch.Tensor):
        super().__init__()
        self.known = scores

    def preprocess(self, pairs, **options):
        return {"at": torch.tensor([[int(number) for number in pair] for pair in pairs])}

    def forward(self, features):
        return {"scores": self.known[features["at"][:, 0], features["at"][:, 1]]}


def matryoshka(*sides: torch.Tensor) -> torch.Tensor:
    """Its MatryoshkaLoss over its MultipleNegativesRankingLoss, at temperature 1 / 20."""
    from sentence_transformers.sentence_transformer import losses

    model = Vectors()
    one = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    loss = losses.MatryoshkaLoss(model, one, list(SIZES))
    return loss([{"sentence_embedding": side} for side in sides], None)


def listwise(scores: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Its ListNetLoss, which goes through single precision."""
    from sentence_transformers.cross_encoder.losses import ListNetLoss

    lists, texts = scores.shape
    pairs = [[*map(str, range(lists))], [[*map(str, range(texts))]] * lists]
    return ListNetLoss(Scorer(scores))(pairs, list(gains))


def computed() -> dict[str, torch.Tensor]:
    """Both losses, their gradients by all inputs but gains, and cosines of shortened vectors."""
    from sentence_transformers.util import pairwise_cos_sim, truncate_embeddings

    given = inputs()
    gains = given.pop("gains")
    *sides, scores = (values.requires_grad_() for values in given.values())
    losses = {"matryoshka": matryoshka(*sides), "list-wise": listwise(scores, gains)}
    slopes = torch.autograd.grad(sum(losses.values()), [*sides, scores])
    told = losses | {f"gradient of {name}": slope for name, slope in zip(given, slopes)}
    short = (truncate_embeddings(side.detach(), SIZES[-1]) for side in sides[:2])
    return told | {"short cosines": pairwise_cos_sim(*short)}


def record(file: str) -> None:
    """Versions and sizes, what was given, what was computed of it."""
    parts = {"given": inputs(), "computed": computed()}
    values = {name: {key: v.tolist() for key, v in part.items()} for name, part in parts.items()}
    values = {"versions": {name: version(name) for name in PACKAGES}, "sizes": SIZES} | values
    with open(file, "w") as out:
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
        out.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record(sys.argv[1])
