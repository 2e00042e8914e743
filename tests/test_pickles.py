"""A pickle in the place of numbers: refused in one sentence, and what it carries does not run."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lablib.data import Batches
from lablib.language_models.kneser_ney import KneserNey
from lablib.models import GPT, GPTConfig
from lablib.models.hub import from_hf, to_hf
from lablib.peft.adapter import base_hash, load_adapter, method, save_adapter
from lablib.peft.lora import lora_
from lablib.training import fit

CONFIG = GPTConfig(31, 16, 1, 2, max_length=16)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.fixture
def trap(tmp_path):
    """What makes `mark` when it is unpickled; nothing in the test may do so."""
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "it works"
    mark.unlink()
    yield Trap(mark)
    assert not mark.exists(), "the pickle ran"


def written(kind, path, trap):
    """A file with the trap in it, as torch, pickle or NumPy write it."""
    state = {"weight": torch.ones(2), "trap": trap}
    if kind == "torch":
        torch.save(state, path)
    elif kind == "old torch":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(state))


KINDS = ["torch", "old torch", "pickle"]


def one_line(caught):
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_models_weights(kind, tmp_path, trap):
    to_hf(GPT(CONFIG), tmp_path / "model")
    written(kind, tmp_path / "model" / "model.safetensors", trap)
    with pytest.raises(ValueError, match=r"model\.safetensors is cut or no safetensors") as caught:
        from_hf(tmp_path / "model")
    assert len(one_line(caught)) < 400


def test_beside_no_safetensors_it_is_not_looked_at(tmp_path, trap):
    to_hf(GPT(CONFIG), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    written("torch", tmp_path / "model" / "pytorch_model.bin", trap)
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors weights") as caught:
        from_hf(tmp_path / "model")
    one_line(caught)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_in_a_checkpoint_of_a_training(file, kind, tmp_path, trap):
    data = Batches(torch.arange(600) ** 2 % 31, batch_size=4, length=8)
    options = {"steps": 4, "checkpoint": tmp_path / "run", "every": 2, "progress": False}
    fit(GPT(CONFIG), data, **options)
    steps = sorted((tmp_path / "run").glob("step-*"))
    written(kind, steps[-1] / file, trap)
    for step in steps[:-1]:
        shutil.rmtree(step)
    with pytest.warns(
        UserWarning, match=r"step-\d+ is damaged \(\w+\): training begins anew"
    ) as told:
        assert fit(GPT(CONFIG), data, **options).resumed_from == 0
    assert all(len(str(warning.message).splitlines()) == 1 for warning in told)


@pytest.mark.parametrize("kind", KINDS)
def test_as_an_adapter(kind, tmp_path, trap):
    written(kind, tmp_path / "a.safetensors", trap)
    with pytest.raises(ValueError, match=r"a\.safetensors is cut or no safetensors file") as caught:
        load_adapter(GPT(CONFIG), tmp_path / "a.safetensors")
    one_line(caught)


@pytest.mark.parametrize("kind", [*KINDS, "numpy"])
def test_as_a_counting_model(kind, tmp_path, trap):
    path = tmp_path / "model.npz"
    if kind == "numpy":
        np.savez(path, head=np.array([trap], dtype=object), words=np.zeros(1))
    else:
        written(kind, path, trap)
    with pytest.raises(ValueError, match="holds no Kneser-Ney model of this package") as caught:
        KneserNey.load(path)
    one_line(caught)


def adapter_naming(place, options, model, path):
    """A well-formed adapter of this model whose header names some function."""
    header = {"base": base_hash(model), "methods": json.dumps([[place, options]])}
    save_file({"w": torch.zeros(1)}, path, metadata=header)


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("torch:save", {"f": "{mark}"}),
        ("torch.serialization:save", {"f": "{mark}"}),
        ("lablib.peft.adapter:save_adapter", {"file": "{mark}"}),
        ("lablib.peft.no_such_module:lora_", {}),
        ("os:system", {}),
    ],
)
def test_an_adapter_names_methods_and_no_other_function(place, options, tmp_path, trap):
    model, path = GPT(CONFIG), tmp_path / "a.safetensors"
    options = {name: value.format(mark=trap.mark) for name, value in options.items()}
    adapter_naming(place, options, model, path)
    with pytest.raises(
        ValueError, match=f"the adapter names '{place}', which is no meth"
    ) as caught:
        load_adapter(model, path)
    one_line(caught)


@method
def nudge_(model, by=0.5):
    """A method of the reader's own, outside lablib."""
    model.nudged = by


def test_an_adapter_may_name_the_readers_own_methods_and_ours(tmp_path):
    model, path = GPT(CONFIG), tmp_path / "a.safetensors"
    adapter_naming(f"{__name__}:nudge_", {"by": 0.25}, model, path)
    load_adapter(model, path)
    assert model.nudged == 0.25
    ours, plain = GPT(CONFIG), GPT(CONFIG)
    plain.load_state_dict(ours.state_dict())
    lora_(ours, rank=2)
    save_adapter(ours, path)
    load_adapter(plain, path)
    assert [place for place, _ in plain.peft_methods] == ["lablib.peft.lora:lora_"]


def test_a_safetensors_file_that_is_no_adapter(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no saved adapter: `save_adapter` writes one"):
        load_adapter(GPT(CONFIG), tmp_path / "a.safetensors")
