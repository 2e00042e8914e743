"""The same batches as a Lightning DataModule."""

from typing import Any

from lightning import LightningDataModule

from lablib.data.batches import Batches, sequential


class TokenData(LightningDataModule):
    """Training batches (`Batches`, without end) and held-out batches (once, in order).

    train, held_out: (n,) arrays of token ids. Its state is the training batches' state, which
    Lightning keeps in checkpoints.
    """

    def __init__(self, train: Any, held_out: Any, batch_size: int, length: int, seed: int = 0):
        super().__init__()
        self.batches = Batches(train, batch_size, length, seed)
        self.held_out = sequential(held_out, batch_size, length)

    def train_dataloader(self) -> Batches:
        return self.batches

    def val_dataloader(self) -> list:
        return self.held_out

    def state_dict(self) -> dict[str, int]:
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.batches.load_state_dict(state_dict)
