"""Write what other packages compute, for tests and labs that run without them.

lablib/scaling/peers.json: losses and allocations of chinchilla, intervals of iminuit's MINOS;
lablib/scaling/mu_scaling.json: outputs of models trained by mup;
tests/scaling/torch_structured.json: outputs and gradients of torch-structured.

For an environment of its own, since some of them want much that they don't use here:
    python -m venv peer && peer/bin/pip install -c constraints.txt -e '.[test]' chinchilla==0.2.0
    peer/bin/pip install --no-deps mup==1.0.0 torch-structured==1.3.0
    peer/bin/python tests/scaling/record_peers.py FOLDER
The files go into FOLDER, to be compared with those that are stored.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

# Hoffmann et al.'s values, their correction by Besiroglu et al., and some of a size like ours.
VALUES = (
    {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
    {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    {"E": 0.9, "A": 30.0, "B": 300.0, "alpha": 0.4, "beta": 0.45},
)
NOISE = 0.004


def chinchillas() -> dict:
    """What package chinchilla predicts for N and D, and how it divides C."""
    from chinchilla import Chinchilla

    N, D, C = np.logspace(3, 12, 7), np.logspace(5, 13, 7), np.logspace(12, 26, 6)
    laws = []
    for values in VALUES:
        best = np.array([Chinchilla.allocate_compute(c, values) for c in C], float)
        loss = np.asarray(Chinchilla.predict_loss(N, D, values), float).tolist()
        made = {"loss": loss, "N_opt": best[:, 0].tolist(), "D_opt": best[:, 1].tolist()}
        laws.append({"values": values} | made)
    return {"N": N.tolist(), "D": D.tolist(), "C": C.tolist(), "laws": laws}


def minos(x: np.ndarray, y: np.ndarray, noise: float) -> dict:
    """Values and intervals of y = c + a x^-b, the deviation of each y being `noise`."""
    from iminuit import Minuit
    from iminuit.cost import LeastSquares

    cost = LeastSquares(x, y, noise, lambda x, c, a, b: c + a * x**-b)
    found = Minuit(cost, c=0.9, a=30.0, b=0.4)
    found.limits = (0, None)
    found.strategy, found.tol = 2, 1e-6
    found.migrad()
    found.minos()
    ends = {p.name: [p.value + p.merror[0], p.value + p.merror[1]] for p in found.params}
    return {"values": found.values.to_dict(), "intervals": ends}


def noisy() -> tuple[np.ndarray, np.ndarray]:
    """Points of a law with a floor, off by up to NOISE."""
    x = np.logspace(4, 6, 9)
    return x, 0.9 + 30 * x**-0.4 + NOISE * np.sin(7 * np.arange(9))


def peers() -> dict:
    """All of peers.json."""
    packages = [f"{name} {version(name)}" for name in ("chinchilla", "iminuit", "numpy")]
    x, y = noisy()
    points = {"x": x.tolist(), "y": y.tolist(), "noise": NOISE}
    minoses = points | minos(x, y, NOISE)
    return {"made by": ", ".join(packages)} | chinchillas() | {"minos": minoses}


def by_mup() -> dict:
    """Outputs after five steps, the model made and optimized by package mup."""
    from test_mu_scaling import BASE, theirs

    from lablib.studies.mu_scaling import after_five_steps, fixed_model

    how = "set_base_shapes, MuSharedReadout, MuAdamW; base of 16 dimensions, rate 0.01, eps 1e-12"
    found = {"made with": f"mup {version('mup')} (MIT): {how}"}
    for times in (2, 4):
        outputs = after_five_steps(*theirs(fixed_model, BASE * times))
        found[f"{times} times as wide"] = [round(float(y), 9) for y in outputs]
    return found


def structured() -> dict:
    """Parameters, inputs, outputs and gradients of torch-structured's layers."""
    from torch_structured import make_linear
    from torch_structured.monarch.monarch_linear import MonarchLinear
    from torch_structured.structured.hadamard import hadamard_transform_torch

    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    monarch = MonarchLinear(16, 24, nblocks=4, bias=False)
    parts = {"first": monarch.w1, "second": monarch.w2}
    found = {"monarch": passed(monarch, parts, 16, 24, draw)}
    circulant = make_linear("circulant", 8, 8, bias=False)
    found["circulant"] = passed(circulant, {"column": circulant.col}, 8, 8, draw)
    found["hadamard"] = passed(lambda x: hadamard_transform_torch(x, True), {}, 16, 16, draw)
    how = f"torch-structured {version('torch-structured')} (Apache-2.0), its pure PyTorch path"
    return found | {"made with": how}


def passed(layer, parts: dict, ins: int, outs: int, draw: torch.Generator) -> dict:
    """A layer's parameters, three inputs, their outputs, and all gradients."""
    x = torch.randn(3, ins, generator=draw, requires_grad=True)
    upstream = torch.randn(3, outs, generator=draw)
    y = layer(x)
    (y * upstream).sum().backward()
    made = parts | {"x": x, "upstream": upstream, "y": y, "x_gradient": x.grad}
    made |= {f"{name}_gradient": part.grad for name, part in parts.items()}
    return {name: [round(v, 8) for v in t.detach().flatten().tolist()] for name, t in made.items()}


def record(folder: Path) -> None:
    """All three files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"peers": peers, "mu_scaling": by_mup, "torch_structured": structured}
    for name, make in files.items():
        (folder / f"{name}.json").write_text(json.dumps(make()), encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
