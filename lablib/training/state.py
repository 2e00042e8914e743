"""All that an exact resume needs, written whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lablib.files import atomic_write

KEEP = 2


class Checkpoints:
    """A folder of checkpoints, `step-00000100` and so on; the last two are kept.

    Each holds model.safetensors, state.pt (optimizer and random generators, read with
    weights_only=True) and state.json (losses, the data's position).
    """

    def __init__(self, folder: str | Path, every: int):
        if every < 1:
            raise ValueError(f"a checkpoint every {every} steps can't be: give 1 or more")
        self.folder, self.every = Path(folder), every

    @property
    def last(self) -> Path | None:
        """The newest checkpoint."""
        found = sorted(self.folder.glob("step-*"))
        return found[-1] if found else None

    def save(self, run: Any, feed: Any, optimizer: torch.optim.Optimizer) -> None:
        """Write everything at the present step, then drop the older ones."""
        from safetensors.torch import save_model

        with atomic_write(self.folder / f"step-{run.done:08d}") as temporary:
            temporary.mkdir()
            save_model(run.model, str(temporary / "model.safetensors"))
            kept = {"optimizer": optimizer.state_dict(), "random": random_state()}
            torch.save(kept, temporary / "state.pt")
            numbers = {
                "step": run.done,
                "losses": run.history.losses,
                "held_out": run.history.held_out,
                "used": feed.used,
                "data": _state_of(feed.data),
            }
            (temporary / "state.json").write_text(json.dumps(numbers), "utf-8")
        for old in sorted(self.folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)

    def restore(self, run: Any, feed: Any, accumulate: int) -> int:
        """Load the newest checkpoint into model, optimizer, data and generators; its step, or 0."""
        from safetensors.torch import load_model

        if self.last is None:
            return 0
        numbers = json.loads((self.last / "state.json").read_text("utf-8"))
        load_model(run.model, str(self.last / "model.safetensors"))
        kept = torch.load(self.last / "state.pt", weights_only=True)
        run.saved_optimizer, run.done = kept["optimizer"], numbers["step"]
        run.history.losses = numbers["losses"]
        run.history.held_out = [(step, loss) for step, loss in numbers["held_out"]]
        _rewind(feed, numbers)
        set_random_state(kept["random"])
        return numbers["step"]


def _state_of(data: Any) -> dict | None:
    return data.state_dict() if hasattr(data, "state_dict") else None


def _rewind(feed: Any, numbers: dict) -> None:
    """Put the data where it was: through its own state, else by drawing what was used."""
    if numbers["data"] is not None:
        feed.data.load_state_dict(numbers["data"])
    else:
        for _ in range(numbers["used"]):
            feed.draw()
    feed.used = numbers["used"]


def random_state() -> dict[str, Any]:
    """The states of torch's generators, CPU and CUDA."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Set what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
