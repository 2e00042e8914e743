"""All that an exact resume needs, written whole or not at all."""

import json
import pickle
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lablib.files import atomic_write

KEEP = 2
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.PickleError)


class Checkpoints:
    """A folder of checkpoints, `step-00000100` and so on; the last two are kept.

    Each holds model.safetensors, state.pt (optimizer, random generators and the data's position,
    read with weights_only=True) and state.json (the call, losses).
    call: what the training depends on, as text by name; a folder takes one call's only.
    """

    def __init__(self, folder: str | Path, every: int, call: Mapping[str, str]):
        if every < 1:
            raise ValueError(f"a checkpoint every {every} steps can't be: give 1 or more")
        self.folder, self.every, self.call = Path(folder), every, dict(call)

    @property
    def all(self) -> list[Path]:
        """Complete checkpoints or what looks like them, the newest first."""
        found = self.folder.glob("step-*")
        whole = [p for p in found if p.is_dir() and re.fullmatch(r"step-\d{8,}", p.name)]
        return sorted(whole, reverse=True)

    @property
    def last(self) -> Path | None:
        """The newest checkpoint."""
        return next(iter(self.all), None)

    def save(self, run: Any, feed: Any, optimizer: torch.optim.Optimizer) -> None:
        """Write everything at the present step, then drop the older ones.

        Weights that are not finite are not written: raises FloatingPointError.
        """
        from safetensors.torch import save_model

        refuse_non_finite(run.model, run.done)
        with atomic_write(self.folder / f"step-{run.done:08d}") as temporary:
            temporary.mkdir()
            save_model(run.model, str(temporary / "model.safetensors"))
            kept = {"optimizer": optimizer.state_dict(), "random": random_state()}
            torch.save(kept | {"feed": feed.state()}, temporary / "state.pt")
            numbers = {
                "step": run.done,
                "call": self.call,
                "losses": run.history.losses,
                "held_out": run.history.held_out,
            }
            (temporary / "state.json").write_text(json.dumps(numbers), "utf-8")
        for old in self.all[KEEP:]:
            shutil.rmtree(old)

    def restore(self, run: Any, feed: Any) -> int:
        """Load the newest good checkpoint into model, data and generators; its step, or 0.

        One that can't be read is passed over with a warning.
        Raises ValueError when the folder belongs to another call or another model.
        """
        damaged: list[str] = []
        for path in self.all:
            try:
                numbers, kept = self._read(path)
            except _DAMAGE as error:
                damaged.append(f"{path} is damaged ({type(error).__name__})")
                continue
            self._refuse_another(numbers["call"])
            _say(damaged, f"training goes on from {path.name}")
            _load_weights(run.model, path)
            run.saved_optimizer, run.done = kept["optimizer"], numbers["step"]
            run.history.losses = numbers["losses"]
            run.history.held_out = [(step, loss) for step, loss in numbers["held_out"]]
            feed.rewind(kept["feed"])
            set_random_state(kept["random"])
            return numbers["step"]
        _say(damaged, "training begins anew")
        return 0

    def _read(self, path: Path) -> tuple[dict, dict]:
        """state.json and state.pt, once all three files have been read to their ends."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        numbers = json.loads((path / "state.json").read_text("utf-8"))
        kept = torch.load(path / "state.pt", weights_only=True)
        try:
            load_file(path / "model.safetensors")
        except SafetensorError as error:
            raise OSError(str(error)) from error
        missing = {"step", "call", "losses", "held_out"} - set(numbers)
        missing |= {"optimizer", "random", "feed"} - set(kept)
        if missing:
            raise KeyError(*sorted(missing))
        return numbers, kept

    def _refuse_another(self, call: dict[str, str]) -> None:
        names = [name for name in call | self.call if call.get(name) != self.call.get(name)]
        if names:
            pairs = (
                f"{n} {call.get(n, 'none')} there, {self.call.get(n, 'none')} here" for n in names
            )
            raise ValueError(
                f"{self.folder} belongs to another training ({'; '.join(pairs)}): give another "
                "folder, or remove this one to begin anew"
            )


def _say(damaged: list[str], then: str) -> None:
    if damaged:
        warnings.warn(f"{'; '.join(damaged)}: {then}", stacklevel=2)


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import load_model

    try:
        load_model(model, str(path / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{path.parent} belongs to another model: {error}") from error


def refuse_non_finite(model: nn.Module, step: int) -> None:
    """Raise FloatingPointError that names the first parameter with an infinite number or none."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise FloatingPointError(
                f"{name} is not finite after step {step}, so no checkpoint is written; try a lower "
                "learning rate"
            )


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators; comparable with ==."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "cpu": torch.get_rng_state().numpy().tobytes(),
        "cuda": [state.numpy().tobytes() for state in cuda],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` gave."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["cpu"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_bytes(one) for one in state["cuda"]])


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
