"""LLMs are also effective embedding models (Tao et al., 2024): the theme on one map.

    echo:   e(x) = mean of h_t over the second x in "x x"
    sparse: w_j(x) = max_t log(1 + relu(logit_tj))

Lab 1008. A decoder's token sees only what stands before it; told twice, a text is read the second
time by tokens that have seen all of it (Springer et al., 2024). A sparse vector has a number for
each word of the vocabulary (SPLADE: Formal et al., 2021), so that an inverted index can look it up.
`TREE` is the overview's classification, each leaf with what implements it in this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.embeddings.encode import NO_PROMPT, Encoder, Prompt, batches, pad, states
from lablib.embeddings.prompt_embeddings import IN_ONE_WORD
from lablib.models import anatomy
from lablib.models.classifier import Encoded
from lablib.modes import kept_modes


def echo(encoder: Encoder, texts: Sequence[str], copy: int = 2) -> Tensor:
    """Texts told twice, pooled over one of the copies: (n, dim); differentiable.

    copy: 1 or 2. Of the encoder its model, tokenizer, layer and normalize are taken, and of its
    prompt what stands before. All texts are one batch. Raises ValueError for another copy.
    """
    encoded, copies = told_twice(encoder, texts)
    if copy not in (1, 2):
        raise ValueError(f"copy {copy}: there are copies 1 and 2")
    h = states(encoder.model, encoded, encoder.layer, encoder.causal)  # (n, length, dim)
    w = copies[copy - 1][..., None].to(h.dtype)  # (n, length, 1)
    pooled = (w * h).sum(1) / w.sum(1).clamp(min=1)  # mean of h_t over the copy
    return F.normalize(pooled.float(), dim=-1) if encoder.normalize else pooled.float()


def sparse_head(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """A weight for each word of the vocabulary: (n, vocabulary), zero or more; differentiable.

    The model's own head, as it was trained to name the next token, reads every state.
    """
    encoded = encoder.tokens(texts)
    h = states(encoder.model, encoded, causal=encoder.causal)  # (n, length, dim)
    weights = anatomy.head(encoder.model)(h).relu().log1p()  # log(1 + relu(logits))
    return weights.masked_fill(~encoded.mask[..., None], 0).amax(1)  # max_t


def instruct(task: str, text: str) -> str:
    """A query with what is wanted of it in front; documents stay as they are.

    Source: the form of E5-Mistral (Wang et al., 2024), which the overview's multi-task tuning uses.
    """
    return f"{instruction(task).before}{text}"


def instruction(task: str) -> Prompt:
    """The same as a prompt for an `Encoder`."""
    return Prompt(before=f"Instruct: {task}\nQuery: ")


# Told twice.


def told_twice(encoder: Encoder, texts: Sequence[str]) -> tuple[Encoded, Tensor]:
    """Texts with their copy behind them, and where each copy lies: (2, n, length) bool.

    The tokenizer's offsets tell; a copy keeps the tokens of a text that is within max_length alone,
    the last ones of both are left out where they are too many. Raises ValueError without texts.
    """
    if not texts:
        raise ValueError("there is no text to encode")
    before, rows, spans = encoder.prompt.before, [], []
    room = (encoder.max_length - len(encoder.tokenizer(before)["input_ids"])) // 2
    for text in texts:
        text = _first_tokens(encoder.tokenizer, text.strip(), room)
        whole = f"{before}{text} {text}"
        made = encoder.tokenizer(whole, return_offsets_mapping=True, verbose=False)
        second = len(before) + len(text)  # the space belongs to the second copy
        ends = [end if end > start else -1 for start, end in made["offset_mapping"]]
        rows.append(made["input_ids"])
        spans.append([0 if end <= len(before) else 1 if end <= second else 2 for end in ends])
    encoded, which = pad(rows), pad(spans).inputs
    copies = torch.stack([which == 1, which == 2]) & encoded.mask
    device = anatomy.embedding(encoder.model).weight.device
    return Encoded(*(part.to(device) for part in encoded)), copies.to(device)


def _first_tokens(tokenizer, text: str, count: int) -> str:
    """The text up to the end of so many of its tokens."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return text if len(offsets) <= count else text[: offsets[count - 1][1]].rstrip()


@dataclass(frozen=True)
class Echo:
    """`echo` as an encoder: called with texts, it gives (n, dim) float32 in their order."""

    encoder: Encoder
    copy: int = 2

    def __call__(self, texts: Sequence[str], batch_tokens: int = 2048) -> Tensor:
        return _by_length(self.encoder, texts, lambda some: echo(self.encoder, some, self.copy))


def _by_length(
    encoder: Encoder, texts: Sequence[str], embed: Callable, batch_tokens: int = 1024
) -> Tensor:
    """Vectors of batches of texts of like length, without gradients."""
    lengths = encoder.tokens(texts).mask.sum(1).tolist()
    made: list[Tensor] = [torch.empty(0)] * len(texts)
    with torch.inference_mode(), kept_modes(encoder.model):
        encoder.model.eval()
        for places in batches(lengths, batch_tokens):
            for place, vector in zip(places, embed([texts[i] for i in places]).cpu()):
                made[place] = vector
    return torch.stack(made)


# An inverted index.


def sparse_vectors(encoder: Encoder, texts: Sequence[str], keep: int = 64) -> Tensor:
    """`sparse_head` with all but each text's largest weights zero: (n, vocabulary).

    A model that wasn't trained to be sparse has positive logits everywhere. The mean over these
    texts is taken off first: what the head says of every text tells none of them apart.
    """
    weights = _by_length(encoder, texts, lambda some: sparse_head(encoder, some), 512)
    return largest(weights - weights.mean(0), keep)


def largest(weights: Tensor, keep: int) -> Tensor:
    """(n, vocabulary) with all but each row's `keep` largest positive numbers zero."""
    weights = weights.clamp(min=0)
    top = weights.topk(min(keep, weights.shape[1]), dim=1)
    return torch.zeros_like(weights).scatter(1, top.indices, top.values)


def inverted_index(weights: Tensor) -> dict[int, list[tuple[int, float]]]:
    """Word -> (document, weight) of those documents that have it. weights: (documents, words)."""
    index: dict[int, list[tuple[int, float]]] = {}
    for document, word in weights.nonzero().tolist():
        index.setdefault(word, []).append((document, float(weights[document, word])))
    return index


def look_up(index: Mapping[int, list[tuple[int, float]]], query: Tensor, n: int) -> np.ndarray:
    """Scores (n,) of n documents for a query (words,), from the lists of its own words alone."""
    scores = np.zeros(n)
    for word in query.nonzero()[:, 0].tolist():
        for document, weight in index.get(word, ()):
            scores[document] += float(query[word]) * weight
    return scores


def top_words(encoder: Encoder, weights: Tensor, k: int = 8) -> list[tuple[str, float]]:
    """The k words of largest weight of one text (vocabulary,), with their weights."""
    values, places = weights.topk(k)
    return [(encoder.tokenizer.decode([i]), w) for i, w in zip(places.tolist(), values.tolist())]


# Prompts.

PROMPTS = {  # how the last token is asked for the whole text
    "none": NO_PROMPT,
    "one word": IN_ONE_WORD,
    "step by step": Prompt('After thinking step by step, this sentence : "', IN_ONE_WORD.after),
    "topic": Prompt('The text : "', '" is about'),
    "code": Prompt('The function that does this : "', '" is named'),
}


def several(encoder: Encoder, texts: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
    """Each text within several prompts: the mean of its vectors, of length 1: (n, dim) float32."""
    made = [replace(encoder, prompt=prompt, normalize=True)(texts) for prompt in prompts]
    return F.normalize(torch.stack(made).mean(0), dim=-1)


# The map.


class Leaf(NamedTuple):
    """One method of the overview. where: "module:name" in lablib, or "" where it isn't here."""

    branch: str
    group: str
    name: str
    where: str
    about: str

    @property
    def function(self) -> Callable | None:
        """What implements it, or None."""
        if not self.where:
            return None
        module, name = self.where.split(":")
        return getattr(importlib.import_module(f"lablib.{module}"), name)


PROMPTING, TUNING, ADVANCED, CHOICES = "direct prompting", "tuning", "advanced", "choices"
TREE = tuple(
    Leaf(*row)
    for row in (
        (PROMPTING, "templates", "one word", "embeddings.prompt_embeddings:embed", "PromptEOL"),
        (
            PROMPTING,
            "templates",
            "demonstrations",
            "embeddings.prompt_embeddings:with_demonstrations",
            "sentences with their word in front",
        ),
        (PROMPTING, "templates", "step by step", "embeddings.embedding_overview:PROMPTS", "a lead"),
        (
            PROMPTING,
            "templates",
            "many prompts",
            "embeddings.embedding_overview:several",
            "vectors averaged",
        ),
        (PROMPTING, "input", "echo", "embeddings.embedding_overview:echo", "the text twice"),
        (TUNING, "architecture", "causal", "embeddings.encode:states", "the model as it is"),
        (
            TUNING,
            "architecture",
            "bidirectional",
            "embeddings.encode:bidirectional",
            "tokens see what follows",
        ),
        (TUNING, "architecture", "pooling", "embeddings.encode:pool", "which tokens count"),
        (
            TUNING,
            "architecture",
            "projection",
            "embeddings.sentence_t5:SentenceT5",
            "a layer after the mean",
        ),
        (TUNING, "architecture", "thin matrices", "peft.lora:lora_", "LoRA"),
        (TUNING, "objective", "contrastive", "embeddings.contrastive:info_nce", "which is mine?"),
        (TUNING, "objective", "generative", "embeddings.ullme:train_grl", "write it, too"),
        (TUNING, "objective", "distillation", "embeddings.drama:listwise", "a teacher's order"),
        (TUNING, "objective", "Matryoshka", "embeddings.contrastive:matryoshka", "cut vectors"),
        (TUNING, "data", "supervised", "embeddings.collections:pairs", "pairs made by people"),
        (TUNING, "data", "hard negatives", "embeddings.contrastive:hard_negatives", "look-alikes"),
        (TUNING, "data", "synthetic", "embeddings.drama:write_queries", "queries by a model"),
        (TUNING, "data", "instructions", "embeddings.embedding_overview:instruct", "say the task"),
        (ADVANCED, "input", "long texts", "", "longer positions, or pieces"),
        (ADVANCED, "input", "languages", "embeddings.evaluate:bitext", "translations meet"),
        (ADVANCED, "input", "code", "embeddings.lexical:code_words", "names as words"),
        (ADVANCED, "input", "images", "", "one space with pictures"),
        (CHOICES, "vector", "dense", "embeddings.encode:Encoder", "a few hundred numbers"),
        (CHOICES, "vector", "sparse", "embeddings.embedding_overview:sparse_head", "a word each"),
        (CHOICES, "vector", "words alone", "embeddings.lexical:bm25", "BM25"),
        (CHOICES, "cost", "fewer layers", "embeddings.l3prune:truncate", "cut off the top"),
        (CHOICES, "cost", "smaller model", "embeddings.drama:pruned", "pruned, then tuned"),
        (
            CHOICES,
            "cost",
            "scaling",
            "embeddings.prompt_embeddings:best_size",
            "is larger always better?",
        ),
        (CHOICES, "measure", "many tasks", "embeddings.mmteb:Benchmark", "one score each"),
    )
)


def on_a_map() -> dict[Leaf, tuple[int, int]]:
    """Leaf -> (column, row): a branch a column, in order."""
    branches = list(dict.fromkeys(leaf.branch for leaf in TREE))
    columns = [[leaf for leaf in TREE if leaf.branch == branch] for branch in branches]
    return {leaf: (x, y) for x, column in enumerate(columns) for y, leaf in enumerate(column)}
