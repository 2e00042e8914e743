"""Values as they pass between a graded function and its judge.

What a student's function gives is unpacked from JSON, which runs nothing, whatever stands in it.
What the judge gives is pickled, because the function may get anything; what only the judge has,
such as a function of the exercise, is named by a number and asked for (`lablib.lab.link`).
"""

import base64
import json
from typing import Any

import numpy as np

from lablib.exercises import is_tensor

# Of arrays and tensors: name -> what numpy reads it as.
DTYPES = {
    name: name
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
} | {"bfloat16": "int16"}  # fmt: skip
CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Unreadable(ValueError):
    """What came over the wire is no value."""


def dumps(message: Any) -> bytes:
    """A message of packed values as bytes."""
    return json.dumps(message).encode()


def loads(message: bytes) -> Any:
    """A message as it was dumped. Raises Unreadable when it is none."""
    try:
        return json.loads(message)
    except (ValueError, RecursionError) as error:
        raise Unreadable(str(error)) from None


def pack(value: Any, tensor: Any = None) -> Any:
    """A value as JSON has it: numbers, text, arrays, tensors, containers of them.

    Of anything else only the name of its type arrives. tensor: what packs a tensor, `pack_tensor`
    when none is given.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value)
    for name, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {name: [pack(item, tensor) for item in value]}
    if isinstance(value, dict):
        pairs = value.items()
        return {"dict": [[pack(key, tensor), pack(item, tensor)] for key, item in pairs]}
    if is_tensor(value):
        return (tensor or pack_tensor)(value)
    if isinstance(value, np.ndarray) and str(value.dtype) in DTYPES:
        return {"array": str(value.dtype), **_bytes(value)}
    return {"other": type(value).__name__}


def pack_tensor(value: Any) -> dict[str, Any]:
    """A tensor's numbers, without the graph that they come from."""
    import torch

    name = str(value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        return {"other": f"{type(value).__name__} of {name}"}
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    value = value.view(torch.int16) if name == "bfloat16" else value
    return {"tensor": name, **_bytes(value.numpy())}


def _bytes(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"shape": list(array.shape), "data": data}


def unpack(packed: Any, tensor: Any = None) -> Any:
    """The value of `pack`; a stand-in of the type's name for what did not pass.

    tensor: called with each unpacked tensor and its packed form; what it returns is the value.
    Raises Unreadable for what `pack` never gives.
    """
    if not isinstance(packed, dict):
        return packed
    try:
        return _unpacked(packed, tensor)
    except Exception as error:  # it can be anything: a student's process made it
        raise Unreadable(str(error)) from None


def _unpacked(packed: dict[str, Any], tensor: Any) -> Any:
    kind = next(iter(packed))
    if kind in CONTAINERS:
        return CONTAINERS[kind](unpack(item, tensor) for item in packed[kind])
    if kind == "dict":
        return {unpack(key, tensor): unpack(item, tensor) for key, item in packed["dict"]}
    if kind == "array":
        return _array(packed, "array")
    if kind == "tensor":
        value = _tensor(packed)
        return tensor(value, packed) if tensor else value
    return type(str(packed["other"])[:60], (), {})()


def _array(packed: dict[str, Any], kind: str) -> np.ndarray:
    data = bytearray(base64.b64decode(packed["data"]))
    return np.ndarray(tuple(packed["shape"]), DTYPES[packed[kind]], data)


def _tensor(packed: dict[str, Any]) -> Any:
    import torch

    value = torch.from_numpy(_array(packed, "tensor"))
    return value.view(torch.bfloat16) if packed["tensor"] == "bfloat16" else value
