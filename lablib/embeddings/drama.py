"""DRAMA (Ma et al., 2025): a small retriever, cut out of a large model and taught by large models.

    student = sliced(large; blocks, heads, neurons, channels)   then trained on as a language model
    query   = a sentence cropped from a text | one that a language model wrote about it | a person's
    ranked  = texts by the teacher's cosine [, put in order again by log p(query | text)]
    triple  = (query, a text from the top of ranked, a text from further down)
    L       = sum_d InfoNCE(q[:d], d+[:d], d-[:d])                 one stage, over all sources mixed

Lab 1005. The student reads both ways; a query gets the prefix "Query: ", a text none. Prefix, task,
query and language as what is written, temperature 0.8 and top-p 0.9 are from the authors'
repository (facebookresearch/dpr-scale, drama/), as is a rerank by list. Here the list is put in
order by how likely a small language model finds the query after each text, since it can't write
lists; of its prompt only the query is written. Masks are not learned: what stays has most weight.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.structures import Keep, sizes, sliced
from lablib.data.corpora import load
from lablib.embeddings import collections
from lablib.embeddings.contrastive import info_nce, matryoshka
from lablib.embeddings.encode import Encoder, Prompt, pad
from lablib.embeddings.students import train
from lablib.models import GPT, GPTConfig, anatomy, classifier, pretrained
from lablib.models.generation import next_token_probabilities
from lablib.paths import data_dir

QUERY = Prompt(before="Query: ")
TEMPERATURE, TOP_P = 0.8, 0.9  # of what is written
SOURCES = ("supervised", "crop", "synthetic", "reranked")


# The student.


class Shape(NamedTuple):
    """What is left of a model: blocks, query heads, units of a block's MLP, width."""

    blocks: int
    heads: int
    neurons: int
    channels: int


def keep(model: nn.Module, shape: Shape) -> Keep:
    """The first blocks, and in each of them what has most weight; for `sliced`.

    A head's weight is that of its output, heads stay or go with the key-value head they share; a
    unit's is that of what it reads times what it writes; a channel's that in the embedding.
    Raises ValueError for heads that don't fill whole groups.
    """
    size = sizes(model)
    share = size.heads // size.kv_heads
    if shape.heads % share:
        raise ValueError(f"heads share keys by {share}: {shape.heads} can't stay")
    heads, neurons = [], []
    for block in range(size.blocks):
        output, up, down = (
            anatomy.projection(model, block, role).weight.detach()
            for role in ("output", "up", "down")
        )
        by_head = output.unflatten(1, (size.heads, -1)).norm(dim=(0, 2))  # (heads,)
        groups = _largest(by_head.view(-1, share).sum(1), shape.heads // share)
        heads.append([share * group + i for group in groups for i in range(share)])
        neurons.append(_largest(up.norm(dim=1) * down.norm(dim=0), shape.neurons))
    channels = _largest(anatomy.embedding(model).weight.detach().norm(dim=0), shape.channels)
    return Keep(tuple(range(shape.blocks)), tuple(heads), tuple(neurons), channels)


def _largest(weight: Tensor, n: int) -> list[int]:
    """Places of the n largest."""
    return sorted(weight.topk(n).indices.tolist())


def pruned(model: nn.Module, shape: Shape) -> nn.Module:
    """A smaller model of this shape; the whole one stays what it is."""
    return sliced(model, keep(model, shape))


def encoders(model: nn.Module, tokenizer, max_length: int = 40) -> tuple[Encoder, Encoder]:
    """One model for queries, with their prefix, and for texts; it reads both ways."""
    text = Encoder(model, tokenizer, causal=False, max_length=max_length)
    return replace(text, prompt=QUERY), text


def fit(
    model: nn.Module,
    tokenizer,
    triples: Sequence[tuple[str, str, str]],
    steps: int,
    rate: float,
    dims: Sequence[int],
    **options,
) -> list[float]:
    """Train in place on (query, right text, wrong text): the loss of every step, summed over dims.

    options: of `students.train`.
    """
    query, text = encoders(model, tokenizer)
    loss = matryoshka(info_nce, dims)
    return train(query, triples, steps, rate, loss=loss, second=text, **options)


def shortened(vectors: Tensor, dim: int) -> Tensor:
    """(n, dim) of length 1: the first numbers of each vector, which alone are shorter than 1."""
    return F.normalize(vectors[:, :dim], dim=-1)


def listwise(scores: Tensor, gains: Tensor) -> Tensor:
    """-sum_j softmax(gains)_j log softmax(scores)_j, a mean over lists: both (lists, texts).

    Least where a student's scores of a list differ from the teacher's by a constant alone.
    Source: ListNet (Cao et al., 2007), top-one probabilities.
    """
    return -(gains.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean()


def recorded() -> dict[str, Any]:
    """What sentence-transformers made of drawn vectors: "versions", "sizes", "given", "computed".

    The last two have tensors, float64. `data/published/drama-losses.json`, which is written by
    tests/embeddings/record_drama.py.
    """
    told = json.loads((data_dir() / "published" / "drama-losses.json").read_text("utf-8"))
    for part in ("given", "computed"):
        told[part] = {key: torch.tensor(v, dtype=torch.float64) for key, v in told[part].items()}
    return told


# Published shapes. That of the middle model was not found.

LLAMA3 = 128_256  # tokens
RELEASED = {
    "drama-base": GPTConfig(LLAMA3, 768, 12, 12, 12, ffn_dim=3072, tied=True),
    "drama-1b": GPTConfig(LLAMA3, 2048, 16, 32, 8, ffn_dim=8192, tied=True),
}


def counted(config: GPTConfig) -> int:
    """Parameters without the embedding, counted in a model that has no numbers."""
    with torch.device("meta"):
        return GPT(config).n_parameters(embeddings=False)


def by_hand(dim: int, blocks: int, heads: int, kv_heads: int, neurons: int, head: int = 64) -> int:
    """The same by a formula; head: numbers of a head."""
    attention = 2 * dim * head * (heads + kv_heads)  # W_q and W_o; W_k and W_v
    return blocks * (attention + 3 * dim * neurons + 2 * dim) + dim


def published() -> list[dict[str, str]]:
    """The authors' models and scores; `data/published/drama.csv`."""
    with (data_dir() / "published" / "drama.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Texts that nobody has labeled.

N_TEXTS, WORDS, CROPS = 1000, 40, 2  # texts, words and crops of each
N_WRITTEN, N_RERANKED = 400, 200
CANDIDATES = 4  # of a list that is put in order again
TOP = 10  # places of the teacher's ranking that are kept
HARD = slice(3, TOP)  # from which a wrong text is drawn


@lru_cache(maxsize=1)
def texts() -> tuple[str, ...]:
    """Sections of Django's documentation and speeches of Shakespeare's, in turn, 40 words of each.

    Sections are of documents that `collections` learns from.
    """
    sections = [b for _, b in collections.pairs("headings", "train") if ">>>" not in b]
    speeches = [
        " ".join(part.split("\n", 1)[-1].split())
        for _, play in load("shakespeare")
        for part in play.split("\n\n")
        if re.match(r"[A-Z ]+\.\n", part)
    ]
    random.Random(0).shuffle(speeches)
    sides = [[_cut(t) for t in side if len(t.split()) >= WORDS] for side in (sections, speeches)]
    sides = [dict.fromkeys(t for t in side if len(crops(t, CROPS)) == CROPS) for side in sides]
    sides = [[*side][: N_TEXTS // 2] for side in sides]
    return tuple(text for pair in zip(*sides, strict=True) for text in pair)


def _cut(text: str) -> str:
    return " ".join(text.split()[:WORDS])


def sentences(text: str) -> list[str]:
    """Those of five words or more."""
    parts = re.split(r"(?<=[.!?;:])\s+", text)
    return [part for part in parts if len(part.split()) >= 5]


def crops(text: str, n: int = 1) -> list[str]:
    """n of its sentences, or all that differ; the same ones whenever they are asked for."""
    found = list(dict.fromkeys(sentences(text)))
    return random.Random(text).sample(found, min(n, len(found)))


# What the large models say of them.


def teacher() -> Encoder:
    """MiniLM, which stands for the large retriever."""
    return Encoder(*classifier.encoder("minilm-l6-v2"), max_length=64)


def ranking(queries: Tensor, documents: Tensor, k: int = TOP) -> Tensor:
    """Places (n, k) of the nearest documents, the nearest first; both (any, dim), of length 1."""
    return (queries @ documents.t()).topk(k, dim=1).indices


TASK = "Given a web search query, retrieve a passage that answers it."
ROLE = "You are a search agent. Given a text, write a retrieval task it can support, and a query."
SHOWN = "Text: A volcano is an opening in the crust of a planet, through which lava and ash escape."
ANSWER = f"Task: {TASK}\nQuery: how do volcanoes form\nLanguage: English"
TOKENS = 40  # of the text, in a prompt


def written_prompt(tokenizer, text: str) -> str:
    """What the language model continues with a query, which ends with the line.

    Task and language are written for it: a small model is glad of that.
    """
    said = [("system", ROLE), ("user", SHOWN), ("assistant", ANSWER), ("user", f"Text: {text}")]
    rows = [{"role": role, "content": words} for role, words in said]
    opened = tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    return f"{opened}Task: {TASK}\nQuery:"


@torch.inference_mode()
def write_queries(
    model: GPT, tokenizer, texts: Sequence[str], seed: int, longest: int = 14
) -> list[str]:
    """A query for each text, drawn at TEMPERATURE and TOP_P; the prompt's start is read once.

    Of each text the first TOKENS tokens are shown, so that all prompts have one length.
    Raises ValueError for a shorter text.
    """
    before, after = (ids(tokenizer, p) for p in written_prompt(tokenizer, "\0").split("\0"))
    shown = [ids(tokenizer, text)[:TOKENS] for text in texts]
    if short := [text for text, row in zip(texts, shown) if len(row) < TOKENS]:
        raise ValueError(f"{short[0]!r} has fewer than {TOKENS} tokens")
    cache = model.new_cache(len(before) + TOKENS + len(after) + longest)
    one = model.new_cache(len(before))
    model.hidden_states(torch.tensor([before]), one)
    for ours, theirs in zip(cache, one):
        ours.append(*(part.expand(len(texts), -1, -1, -1) for part in (theirs.keys, theirs.values)))
    new, rows = torch.tensor([row + after for row in shown]), []
    draw = torch.Generator().manual_seed(seed)
    for _ in range(longest):
        logits = model.head(model.hidden_states(new, cache)[:, -1])  # (n, vocab)
        chances = next_token_probabilities(logits, TEMPERATURE, None, TOP_P)
        new = torch.multinomial(chances, 1, generator=draw)  # (n, 1)
        rows.append(new)
    said = (tokenizer.decode(row, skip_special_tokens=True) for row in torch.cat(rows, 1))
    return [text.split("\n")[0].strip() for text in said]


def ids(tokenizer, text: str) -> list[int]:
    """Tokens of a part of a prompt."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def likelihood(model: GPT, tokenizer, query: str, candidates: Sequence[str]) -> Tensor:
    """(n,): nats a token, log p(query | text), of the first TOKENS tokens of each text."""
    asked = ids(tokenizer, f"\nQuery: {query}")
    rows = [ids(tokenizer, text)[:TOKENS] + asked for text in candidates]
    tokens = pad(rows).inputs  # (n, length)
    log_p = anatomy.logits(model, tokens)[:, :-1].log_softmax(-1)
    own = log_p.gather(-1, tokens[:, 1:, None])[..., 0]  # (n, length - 1), of each next token
    spans = [slice(len(row) - len(asked) - 1, len(row) - 1) for row in rows]
    return torch.stack([each[span].mean() for each, span in zip(own, spans)])


class Label(NamedTuple):
    """A query, the text that it was made from, and texts as the large models rank them: places."""

    source: str
    text: int
    query: str
    ranked: tuple[int, ...]


def ask(
    n_written: int = N_WRITTEN,
    n_reranked: int = N_RERANKED,
    batch: int = 24,
    writer: str = "smollm2-135m-instruct",
) -> list[Label]:
    """All labels, from the large models themselves: about ten minutes of one core.

    CROPS sentences of each text are cropped; the first texts have a query written, too.
    """
    known = texts()
    model, tokenizer = pretrained(writer)
    rows = [("crop", at, query) for at, text in enumerate(known) for query in crops(text, CROPS)]
    for start in range(0, n_written + n_reranked, batch):
        places = range(start, min(start + batch, n_written + n_reranked))
        made = write_queries(model, tokenizer, [known[place] for place in places], seed=start)
        kinds = ["synthetic" if place < n_written else "reranked" for place in places]
        rows += zip(kinds, places, made)
    guide = teacher()
    nearest = ranking(guide([query or "?" for *_, query in rows]), guide(known)).tolist()
    found = [Label(*row, tuple(places)) for row, places in zip(rows, nearest)]
    again = partial(reranked, model, tokenizer)
    return [again(label) if label.source == "reranked" else label for label in found]


def reranked(model: GPT, tokenizer, label: Label) -> Label:
    """The first CANDIDATES of its ranking alone, the likeliest text for its query first."""
    few = label.ranked[:CANDIDATES]
    scores = likelihood(model, tokenizer, label.query, [texts()[place] for place in few])
    return label._replace(ranked=tuple(few[i] for i in scores.argsort(descending=True).tolist()))


# What they said is stored, so that nobody has to ask again.


def labels_path() -> Path:
    """Where; it holds what the study's point "labels" gave."""
    return data_dir() / "published" / "drama-labels.csv"


@lru_cache(maxsize=1)
def labels() -> tuple[Label, ...]:
    """Those stored."""
    with labels_path().open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        source, place, query = row["source"], int(row["text"]), row["query"]
        if source == "crop":
            query = crops(texts()[place], CROPS)[int(query)]
        found.append(Label(source, place, query, tuple(map(int, row["ranked"].split()))))
    return tuple(found)


def plain(labels: Sequence[Label]) -> list[list]:
    """Rows as they are stored: places as text, and of a crop, which of its text's crops it is."""
    return [
        [label.source, label.text, _short(label), " ".join(map(str, label.ranked))]
        for label in labels
    ]


def _short(label: Label) -> str:
    if label.source != "crop":
        return label.query
    return str(crops(texts()[label.text], CROPS).index(label.query))


def kept(label: Label, first: int = 3) -> bool:
    """Whether the teacher finds a query's own text among the first; crops are kept anyway."""
    return label.source != "synthetic" or label.text in label.ranked[:first]


def triple(label: Label, draw: random.Random) -> tuple[str, str, str]:
    """(query, the first of the ranking, one of HARD); of a short list the last is the wrong one."""
    wrong = draw.choice(label.ranked[HARD])
    return label.query, texts()[label.ranked[0]], texts()[wrong]


def drawn(source: str, n: int | None, seed: int) -> list[tuple[str, str, str]]:
    """n triples of a source by the seed, or all of them, in an order of the seed's.

    Raises ValueError where it has fewer.
    """
    draw = random.Random(seed)
    if source == "supervised":
        rows = list(collections.triples("docstrings", "train"))
    else:
        chosen = [label for label in labels() if label.source == source and kept(label)]
        rows = [triple(label, draw) for label in chosen]
    draw.shuffle(rows)
    if n is not None and n > len(rows):
        raise ValueError(f"{source} has {len(rows)} triples, not {n}")
    return rows[:n]


def mixture(counts: Mapping[str, int | None], seed: int) -> list[tuple[str, str, str]]:
    """So many of each source; None is all it has."""
    return [row for source, n in counts.items() for row in drawn(source, n, seed)]
