"""Write quantize.json: what hqq and optimum-quanto make of a few weights, where they agree with us.

For an environment of its own, since optimum-quanto brings kernels that it compiles:
    python -m venv peer
    peer/bin/pip install hqq==0.2.8.post1 optimum-quanto==0.2.7 torch numpy
    peer/bin/python tests/compression/record_quantize.py tests/compression/quantize.json

hqq: with `optimize` off, since its optimizer moves zeros, and `round_zero` off, which is on where
its own configurations have 4 bits. optimum-quanto: its default optimizers; 8 bits are symmetric,
one scale a row, and 4 and 2 bits have a shift, one a group. The test draws the weights again: from
RandomState, whose numbers never change.
"""

import json
import sys
from importlib.metadata import version

import numpy as np

ROWS, SIZE = 3, 128
CASES = {  # package, bits, group: our scheme
    **{("hqq", bits, group): "asymmetric" for bits in (8, 4, 3, 2) for group in (32, 64, 128)},
    **{("optimum-quanto", bits, group): "asymmetric" for bits in (4, 2) for group in (32, 64)},
    ("optimum-quanto", 8, SIZE): "symmetric",
}


def weights() -> np.ndarray:
    """(ROWS, SIZE) float32: with an outlier in one row, and a row that is above 0 throughout."""
    drawn = np.random.RandomState(0).randn(ROWS, SIZE).astype(np.float32)
    drawn[1, 17] = 9.0
    drawn[2] = np.abs(drawn[2]) + 0.5
    return drawn


def of_hqq(weight, bits: int, group: int) -> dict:
    """Codes (rows, size), and the weights that they stand for."""
    import torch
    from hqq.core.quantize import Quantizer

    how = {"optimize": False, "round_zero": False, "bitpack": False, "axis": 1, "device": "cpu"}
    how["compute_dtype"] = torch.float32
    codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group, **how)
    back = (codes.float() - meta["zero"]) * meta["scale"]
    return {"codes": codes.view(weight.shape), "back": back.view(weight.shape)}


def of_quanto(weight, bits: int, group: int) -> dict:
    """The same; codes of 8 bits count from -127, as ours from 0."""
    from optimum.quanto import (
        AbsmaxOptimizer,
        MaxOptimizer,
        qint2,
        qint4,
        qint8,
        quantize_weight,
    )

    if bits == 8:
        scale = AbsmaxOptimizer()(weight, qint8, 0)
        made = quantize_weight(weight, qint8, 0, scale)
        return {"codes": made._data.int() + 127, "back": made.dequantize()}
    kind = {4: qint4, 2: qint2}[bits]
    scale, shift = MaxOptimizer()(weight, kind, 0, group)
    made = quantize_weight(weight, kind, 0, scale, shift, group)
    back = made.dequantize()
    zero, by = (part.view(len(weight), -1).repeat_interleave(group, 1) for part in (shift, scale))
    return {"codes": ((back + zero) / by).round().int(), "back": back}


def main(path: str) -> None:
    """Record all cases."""
    import torch

    weight = torch.from_numpy(weights())
    made = {"about": {package: version(package) for package in ("hqq", "optimum-quanto", "torch")}}
    for package, bits, group in CASES:
        found = {"hqq": of_hqq, "optimum-quanto": of_quanto}[package](weight, bits, group)
        codes, back = found["codes"].int().tolist(), found["back"].double().numpy().round(6)
        made[f"{package} {bits} {group}"] = {"codes": codes, "back": back.tolist()}
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
