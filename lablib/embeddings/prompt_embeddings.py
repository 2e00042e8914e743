"""Scaling sentence embeddings (Jiang et al., 2023): the state before a sentence's one word.

    e(x) = h_T,    h = LM(This sentence : "x" means in one word:")

Lab 1002. h_T is the last token's final state: all that the model knows of the word that it is about
to say. Demonstrations, sentences with their word, may stand in front. The template, the shape of a
demonstration and the sizes of the fine-tuning are those of the authors' repository
(kongds/scaling_sentemb: README, run_icl.sh, train_llm.sh), the scores in
`data/published/prompt-embeddings.csv` those of its README.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from lablib.embeddings import evaluate
from lablib.embeddings.encode import Encoder, Prompt, batches, hidden_layers, pool, states
from lablib.embeddings.students import train
from lablib.models import anatomy
from lablib.models.classifier import Encoded
from lablib.models.gpt import GPT, KVCache, rotary_table
from lablib.modes import kept_modes
from lablib.paths import data_dir
from lablib.peft.adapter import trainable
from lablib.peft.lora import lora_

IN_ONE_WORD = Prompt('This sentence : "', '" means in one word:"')
Pairs = Sequence[tuple[str, str]]  # a sentence and its word


def with_demonstrations(shown: Pairs, prompt: Prompt = IN_ONE_WORD) -> Prompt:
    """The prompt with sentences that have their word already in front; none leaves it."""
    solved = [f'{prompt.before}{sentence}{prompt.after}{word}".' for sentence, word in shown]
    return Prompt("".join(solved) + prompt.before, prompt.after)


def last_states(h: Tensor, mask: Tensor) -> Tensor:
    """The state of each text's last token: h (n, length, dim), mask (n, length) -> (n, dim).

    Wherever the padding is.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * place).argmax(1)  # (n,): T of each text
    return h[torch.arange(len(h), device=mask.device), last]  # h_T


def embed(encoder: Encoder, sentences: Sequence[str], shown: Pairs = ()) -> Tensor:
    """e(x) of sentences, all in one batch: (n, dim); differentiable.

    Of the encoder its model, tokenizer and layer are taken. shown: demonstrations.
    """
    encoded = replace(encoder, prompt=with_demonstrations(shown)).tokens(sentences)
    h = states(encoder.model, encoded, encoder.layer)  # (n, length, dim)
    return last_states(h, encoded.mask)  # (n, dim)


def prompted(encoder: Encoder, shown: Pairs = ()) -> Encoder:
    """The same as an `Encoder`, which packs texts into batches and makes vectors of length 1."""
    return replace(encoder, pooling="last", prompt=with_demonstrations(shown))


def padded_left(encoded: Encoded) -> Encoded:
    """The same texts with their padding in front, for models that take a mask.

    Our GPT takes none: tokens would look at the padding to their left.
    """
    shifts = (~encoded.mask).sum(1).tolist()
    rolled = [
        Encoded(*(part.roll(shift) for part in row)) for shift, row in zip(shifts, zip(*encoded))
    ]
    return Encoded(*map(torch.stack, zip(*rolled)))


# Which word?


def one_words(encoder: Encoder, sentence: str, k: int = 5) -> list[tuple[str, float]]:
    """The k likeliest first tokens of the sentence's word, each with its probability.

    Of a layer below the last it is what the model would say if it stopped there: the layer's state
    through the final norm and the head. encoder: with its prompt.
    Source of that reading: nostalgebraist (2020), the logit lens.
    """
    with torch.inference_mode(), kept_modes(encoder.model):
        encoder.model.eval()
        encoded = encoder.tokens([sentence])
        h = last_states(states(encoder.model, encoded, encoder.layer), encoded.mask)  # (1, dim)
        return said(encoder, h[0], k)


def said(encoder: Encoder, state: Tensor, k: int = 5) -> list[tuple[str, float]]:
    """What a state (dim,) of the encoder's layer is about to say: tokens and probabilities."""
    model = encoder.model
    with torch.inference_mode():
        state = state.to(anatomy.embedding(model).weight.device)
        if encoder.layer is not None:
            state = anatomy.final_norm(model)(state)
        likely = anatomy.head(model)(state).float().softmax(-1).topk(k)
    return [(encoder.tokenizer.decode([i]), p) for i, p in zip(*map(Tensor.tolist, likely[::-1]))]


# Demonstrations.

CANDIDATES = (  # written for this lab: descriptions with a word, definitions with what they define
    ("The children are throwing snowballs in the park.", "Winter"),
    ("Two men are shouting at each other in the street.", "Quarrel"),
    ("A woman is cutting onions and carrots for a soup.", "Cooking"),
    ("The team scored in the last minute of the match.", "Victory"),
    ("Shares fell by four percent after the news.", "Loss"),
    ("A dog is chasing a ball along the beach.", "Play"),
    ("The president met his ministers on Monday.", "Politics"),
    ("A girl is playing the violin on a stage.", "Music"),
    ("The bridge was closed after heavy rain.", "Flood"),
    ("He asked her to marry him, and she said yes.", "Engagement"),
    ("a place where books are kept and lent.", "Library"),
    ("water that falls from clouds in drops.", "Rain"),
    ("to move through water by using arms and legs.", "Swim"),
    ("someone who grows crops or keeps animals.", "Farmer"),
    ("a meal eaten in the morning.", "Breakfast"),
    ("feeling no fear of danger or pain.", "Brave"),
    ("an argument between people who disagree.", "Dispute"),
    ("to make something larger than it was.", "Enlarge"),
    ("the money that is paid for work.", "Wage"),
    ("relating to the sea or to ships.", "Maritime"),
)


def demonstration_search(
    encoder: Encoder,
    candidates: Sequence[tuple[str, str] | None],
    a: Sequence[str],
    b: Sequence[str],
    gold: Sequence[float],
) -> list[float]:
    """Spearman's correlation on rated pairs with each candidate in front, one at a time: (n,).

    candidates: a sentence and its word each, or None for the prompt alone. a, b: texts. gold: how
    alike people found a[i] and b[i]. Judged by the final layer, whatever the encoder's is. The
    paper keeps the best of about 300.
    """
    found = []
    for candidate in candidates:
        maker = prompted(encoder, [candidate] if candidate else [])
        made = every_layer(maker, [*a, *b], ("last",))["last"][-1]  # (2 n, dim)
        found.append(evaluate.sts(made[: len(a)], made[len(a) :], gold)["spearman"])
    return found


# Layer by layer.


def every_layer(
    encoder: Encoder, texts: Sequence[str], poolings: Sequence[str], batch_tokens: int = 512
) -> dict[str, Tensor]:
    """Each text's vectors of all layers, pooled in several ways after one pass.

    Returns pooling -> (layers + 2, n, dim), the layers as in `hidden_layers`; not normalized. The
    encoder's own layer and pooling count for nothing. What all texts start with, such as a
    demonstration, our GPT reads once.
    """
    encoded = encoder.tokens(texts)
    order, made = [], {pooling: [] for pooling in poolings}
    with torch.inference_mode(), kept_modes(encoder.model):
        encoder.model.eval()
        start = common_start(encoded) if isinstance(encoder.model, GPT) else 0
        front = _read(encoder.model, encoded.inputs[:1, :start]) if start else None
        for places in batches((encoded.mask.sum(1) - start).tolist(), batch_tokens):
            part = encoded.at(places)
            found = _continued(encoder.model, part, front)  # (layers + 2, batch, length, dim)
            order += places
            for pooling in poolings:
                made[pooling].append(pool(found, part.mask, pooling).float().cpu())
    back = torch.tensor(order).argsort()
    return {pooling: torch.cat(parts, 1)[:, back] for pooling, parts in made.items()}


def common_start(encoded: Encoded) -> int:
    """How many tokens all texts start with; at least one token of each text is left."""
    same = (encoded.inputs == encoded.inputs[:1]) & encoded.mask
    agreeing = int(same.all(0).int().cumprod(0).sum())
    return max(0, min(agreeing, int(encoded.mask.sum(1).min()) - 1))


def _read(model: GPT, tokens: Tensor, cache: list[KVCache] | None = None):
    """All layers' states (layers + 2, n, length, dim) of tokens (n, length), and the cache."""
    cache = cache or model.new_cache(tokens.shape[1])
    x = model.embedding(tokens)
    rotary = rotary_table(model.config, cache[0].length, tokens.shape[1], x)
    made = [x]
    for block, memory in zip(model.blocks, cache):
        x = block(x, rotary, memory)
        made.append(x)
    return torch.stack([*made, model.norm(x)]), cache


def _continued(model: nn.Module, part: Encoded, front) -> Tensor:
    """All layers' states of a batch whose texts start with what was read as `front`."""
    if front is None:
        return hidden_layers(model, part)
    first, seen = front
    rest = part.inputs[:, first.shape[2] :]
    cache = model.new_cache(part.inputs.shape[1])
    for memory, old in zip(cache, seen):
        memory.append(*(t.expand(len(rest), -1, -1, -1) for t in (old.keys, old.values)))
    found, _ = _read(model, rest, cache)
    return torch.cat([first.expand(-1, len(rest), -1, -1), found], 2)


# Fine-tuning by contrast.

RANK, ALPHA, DROPOUT, RATE, BATCH, LENGTH = 64, 16, 0.05, 5e-4, 256, 32  # the authors' train_llm.sh


def tune_(
    encoder: Encoder,
    pairs: Sequence[Sequence[str]],
    steps: int,
    rate: float = RATE,
    batch: int = BATCH,
    seed: int = 0,
) -> list[float]:
    """Train low-rank changes of all projections by contrast; the loss of each step.

    pairs: texts that mean the same, or with a hard negative as third. The encoder's prompt and
    pooling are those of training, too: the last token, prompted or not.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora_(encoder.model, rank=RANK, alpha=ALPHA, dropout=DROPOUT)
        names = list(trainable(encoder.model))
        return train(encoder, pairs, steps, rate, batch=batch, trainable=names, seed=seed)


# The paper's scores.

TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")


@lru_cache
def published() -> dict[float, dict[str, float]]:
    """Billions of parameters of an OPT model -> its Spearman correlations, times 100, by task."""
    with (data_dir() / "published" / "prompt-embeddings.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {float(row["billions"]): {t: float(row[t]) for t in (*TASKS, "average")} for row in rows}


def averages() -> dict[float, float]:
    """Billions of parameters -> the mean of the seven correlations, computed from them."""
    return {size: float(np.mean([row[t] for t in TASKS])) for size, row in published().items()}


def best_size() -> float:
    """Billions of parameters where the average is highest."""
    means = averages()
    return max(means, key=means.get)
