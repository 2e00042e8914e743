"""A classifier on any backbone, and its lower blocks computed once.

A pool makes one vector of a text's states: their mean over its tokens (how MiniLM was trained), or
the last token's (decoders, which see all of the text only there). "words" needs no new layer: the
language model's head scores one word a label after the last token.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lablib.models import anatomy
from lablib.models.gpt import GPT, rotary_table
from lablib.modes import kept_modes

if TYPE_CHECKING:
    from lablib.data.tasks import Example

POOLS = ("mean", "last", "words")


class Encoded(NamedTuple):
    """Texts as a model takes them: padding only to the right.

    inputs: (n, length) int64 tokens, or (n, length, dim) states after some blocks.
    mask: (n, length) bool, true where a token is.
    """

    inputs: Tensor
    mask: Tensor

    def at(self, places) -> Encoded:
        """Those texts alone, cut after the last token of the longest."""
        mask = self.mask[places]
        length = max(1, int(mask.sum(1).max())) if len(mask) else 1
        return Encoded(self.inputs[places][:, :length], mask[:, :length])


class Classifier(nn.Module):
    """A backbone, a pool and a linear layer: Encoded -> (n, n_labels) logits.

    n_labels: 1 for a regression. words: of pool "words", the token of each label. below: inputs
    that are states come from after so many blocks, as `cached_below` computes them.
    Raises ValueError for another pool, or words that are not one a label.
    """

    def __init__(
        self,
        model: nn.Module,
        n_labels: int,
        pool: str = "mean",
        *,
        words: Sequence[int] = (),
        below: int = 0,
    ):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"{pool!r} is no pool: {', '.join(POOLS)}")
        if len(words) != (n_labels if pool == "words" else 0):
            raise ValueError(f"{len(words)} words for {n_labels} labels and pool {pool!r}")
        self.model, self.pool, self.below = model, pool, below
        if pool == "words":
            self.register_buffer("words", torch.tensor(words), persistent=False)
        else:
            weight = anatomy.embedding(model).weight
            self.head = nn.Linear(weight.shape[1], n_labels, dtype=weight.dtype)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def states(self, encoded: Encoded) -> Tensor:
        """(n, length, dim) after the last block and its norm."""
        if encoded.inputs.is_floating_point():
            return upper_states(self.model, encoded, self.below)
        return last_states(self.model, encoded)

    def forward(self, encoded: Encoded) -> Tensor:
        """(n, n_labels) logits, in float32 at least."""
        pooled = pooling(self.states(encoded), encoded.mask, self.pool)  # (n, l, d) -> (n, d)
        if self.pool == "words":
            logits = anatomy.head(self.model)(pooled)[:, self.words]
        else:
            logits = self.head(pooled)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def pooling(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """(n, length, dim) -> (n, dim): the mean over real tokens, or the last one."""
    if pool == "mean":
        weight = mask[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
    last = (mask.sum(1) - 1).clamp(min=0)
    return states[torch.arange(len(states), device=states.device), last]


def encoder(name: str = "minilm-l6-v2"):
    """A pretrained BERT-like encoder and its tokenizer, in evaluation mode, float32.

    name: as `pretrained_path` knows it.
    """
    from transformers import AutoModel, AutoTokenizer

    from lablib.models.weights import pretrained_path

    folder = pretrained_path(name)
    with _quiet():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bar for a blink, and no warning of packages that transformers looks for on its way."""
    from transformers.utils import logging as bars

    shown, level = bars.is_progress_bar_enabled(), logging.root.manager.disable
    bars.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        if shown:
            bars.enable_progress_bar()


def encode(tokenizer, texts: Sequence[str], pairs: Sequence[str] = (), length: int = 64) -> Encoded:
    """Texts, each with its pair where there are some, as tokens; at most so many a text."""
    if not texts:
        raise ValueError("there is no text to encode")
    both = (list(texts), list(pairs)) if any(pairs) else (list(texts),)
    made = tokenizer(*both, truncation=True, max_length=length)["input_ids"]
    mask = torch.zeros(len(made), max(map(len, made)), dtype=torch.bool)
    tokens = torch.zeros_like(mask, dtype=torch.int64)
    for row, ids in enumerate(made):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return Encoded(tokens, mask)


def encode_examples(
    tokenizer, examples: Sequence[Example], length: int = 64, device: torch.device | str = "cpu"
) -> tuple[Encoded, Tensor]:
    """Examples, with their pairs where there are some, as tokens, and their labels (n,)."""
    encoded = encode(tokenizer, [e.text for e in examples], [e.pair for e in examples], length)
    labels = torch.tensor([example.label for example in examples], device=device)
    return Encoded(*(part.to(device) for part in encoded)), labels


def shortest_first(examples: Sequence[Example]) -> list[Example]:
    """In order of their letters: batches that are judged in this order have little padding."""
    return sorted(examples, key=lambda example: len(example.text) + len(example.pair))


def last_states(model: nn.Module, encoded: Encoded) -> Tensor:
    """(n, length, dim): what a head reads, of GPT and of transformers' models.

    Decoders need no mask: padding is to the right, where no token looks.
    """
    if isinstance(model, GPT):
        return model.hidden_states(encoded.inputs)
    return model.base_model(encoded.inputs, attention_mask=encoded.mask.long()).last_hidden_state


@torch.no_grad()
def cached_below(model: nn.Module, encoded: Encoded, n_blocks: int, batch: int = 64) -> Encoded:
    """States after the first n_blocks, once for each text, so that only the blocks above train.

    Raises ValueError for a family whose blocks can't be run one by one here: GPT, BERT, RoBERTa.
    """
    parts = []
    with kept_modes(model):
        model.eval()
        for start in range(0, len(encoded.mask), batch):
            part = Encoded(*(t[start : start + batch] for t in encoded))
            parts.append(_run(model, _embedded(model, part), part.mask, 0, n_blocks))
    return Encoded(torch.cat(parts), encoded.mask)


def upper_states(model: nn.Module, encoded: Encoded, n_blocks: int) -> Tensor:
    """The rest of it: states after n_blocks -> (n, length, dim), as `last_states` gives them."""
    states = _run(model, encoded.inputs, encoded.mask, n_blocks, len(anatomy.blocks(model)))
    return anatomy.final_norm(model)(states) if isinstance(model, GPT) else states


def _embedded(model: nn.Module, encoded: Encoded) -> Tensor:
    if isinstance(model, GPT):
        return model.embedding(encoded.inputs)
    if anatomy.family(model).name not in ("BERT", "RoBERTa"):
        raise ValueError(
            f"{type(model).__name__}: only GPT's, BERT's and RoBERTa's blocks run here"
        )
    return model.base_model.embeddings(encoded.inputs)


def _run(model: nn.Module, states: Tensor, mask: Tensor, start: int, stop: int) -> Tensor:
    if isinstance(model, GPT):
        extra = rotary_table(model.config, 0, states.shape[1], states)
    else:  # (n, 1, 1, length), added to the scores
        extra = (~mask)[:, None, None].to(states.dtype) * torch.finfo(states.dtype).min
    for block in anatomy.blocks(model)[start:stop]:
        states = block(states, extra)
    return states


@torch.no_grad()
def predicted(classifier: Classifier, encoded: Encoded, batch: int = 64) -> Tensor:
    """(n, n_labels) logits, without dropout, in batches."""
    with kept_modes(classifier):
        classifier.eval()
        starts = range(0, len(encoded.mask), batch)
        return torch.cat([classifier(encoded.at(slice(start, start + batch))) for start in starts])
