"""Let a prefix of SmolLM2 read licences: `python -m lablib.training.legal_prefix`, for lab 709.

Fifteen minutes of one core, too long for a lab, so what it learns lies in data/models. The licences
are those to learn from of lab 709's study, cut into rows as SmolLM2's tokenizer has them. The rate
was the best of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1 after 30 steps on another draw of rows, by the loss
on licences that were held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lablib.compression.calibration import token_losses
from lablib.data import Document
from lablib.data.tasks import licence_texts
from lablib.models import pretrained
from lablib.paths import data_dir
from lablib.peft.adapter import save_adapter, trainable
from lablib.peft.legal_adaptation import adapt_

MODEL = "smollm2-135m-instruct"
FILE = data_dir() / "models" / "legal-prefix.safetensors"
LENGTH, STEPS, BATCH, RATE = 8, 200, 4, 3e-3
WORDS, LETTERS = 64, 1000  # tokens of a row, one more to predict; of a licence, from its beginning


def rows_of(tokenizer, documents: Sequence[Document]) -> Tensor:
    """Licences' tokens in pieces: (n, WORDS + 1) int64; what is left over of each is dropped."""
    ids = [tokenizer.encode(document.text[:LETTERS]) for document in documents]
    size = WORDS + 1
    return torch.tensor(
        [row[i : i + size] for row in ids for i in range(0, len(row) - WORDS, size)]
    )


def read_(model: nn.Module, rows: Tensor, steps: int = STEPS, seed: int = 0) -> list[float]:
    """Give the model a prefix that reads rows drawn from these, in bfloat16 then; losses."""
    draw = np.random.default_rng(seed)
    chosen = rows[draw.choice(len(rows), steps * BATCH, replace=False)]
    losses = adapt_(model, chosen, LENGTH, steps, RATE, batch=BATCH, seed=seed)
    for part in trainable(model).values():
        part.data = part.data.bfloat16().float()
    return losses


def save(model: nn.Module, file: Path) -> None:
    """Write the prefix in half of its size."""
    learned = trainable(model).values()
    for part in learned:
        part.data = part.data.bfloat16()
    save_adapter(model, file)
    for part in learned:
        part.data = part.data.float()


if __name__ == "__main__":
    model, tokenizer = pretrained(MODEL)
    train, held_out = (rows_of(tokenizer, documents) for documents in licence_texts())
    before = token_losses(model, held_out[:32], 4).mean().item()
    read_(model, train)
    after = token_losses(model, held_out[:32], 4).mean().item()
    save(model, FILE)
    print(f"{before:.3f} nats a token before, {after:.3f} after; {FILE.stat().st_size} bytes")
