"""P-tuning (Liu et al., 2021): a prompt whose rows a small network writes, all of them together.

    P = MLP(LSTM(E)), with E (length, dim), and x <- [P; x]

E, the LSTM, which reads E in both directions, and the MLP train. So rows depend on one another,
while those of `prompt_` don't.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lablib.models import anatomy
from lablib.peft.adapter import adapters, method
from lablib.peft.prefix import GPTPrompt, Prompt


class WrittenPrompt(Prompt):
    """A `Prompt` whose rows are computed. hidden: width of the LSTM, in each direction."""

    def __init__(self, length: int, dim: int, hidden: int):
        super(Prompt, self).__init__()  # without rows of its own
        self.longer = False
        self.table = nn.Parameter(torch.randn(length, dim))  # E
        self.lstm = nn.LSTM(dim, hidden, 2, batch_first=True, bidirectional=True)
        self.inner = nn.Linear(2 * hidden, 2 * hidden)
        self.outer = nn.Linear(2 * hidden, dim)

    @property
    def rows(self) -> Tensor:
        """P: (length, dim)."""
        read = self.lstm(self.table[None])[0][0]  # (length, dim) -> (length, 2 hidden)
        return self.outer(self.inner(read).relu())  # -> (length, dim)


class GPTWrittenPrompt(WrittenPrompt, GPTPrompt):
    """The same for `lablib.models.GPT`."""


@method
def p_tuning_(model: nn.Module, length: int, hidden: int | None = None) -> None:
    """Put `length` computed embeddings before the text's; logits are of the text alone.

    hidden: width of the LSTM, half of the model's where none is given, as in the authors' code.
    Raises ValueError for T5, and where a prompt is already.
    """
    family = anatomy.family(model).name
    if family.startswith("T5"):
        raise ValueError("T5 takes no prompt here: its encoder is no backbone of its own")
    if any(isinstance(a, Prompt) for a in adapters(model).values()):
        raise ValueError(f"{type(model).__name__} has a prompt already")
    weight = anatomy.embedding(model).weight
    kind = GPTWrittenPrompt if family == "GPT" else WrittenPrompt
    kind(length, weight.shape[1], hidden or weight.shape[1] // 2).to(weight).put(model)
