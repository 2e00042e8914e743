"""SmolLM2-360M writes prefixes for SmolLM2-360M, from examples of the hub's tasks: 708's gpu tier.

As in the paper, the hypermodel starts as the language model itself: its first blocks read the
examples as text, labels included. `HyperModel` writes of what they make of it: prefixes for all
blocks of another copy, which is frozen. There is no hyperpretraining before. Some tasks are in no
training episode.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import recover
from lablib.data.glue import COLUMNS
from lablib.data.hub import hub_rows
from lablib.data.packages import DataError
from lablib.data.tasks import Example
from lablib.models import anatomy, pretrained
from lablib.models.classifier import Encoded, last_states
from lablib.peft.hypertuning import HyperModel, HyperTuned, Phi, SharedPhi, slots_
from lablib.peft.on_gpu import Speaker, on_gpu

MODEL = "HuggingFaceTB/SmolLM2-360M-Instruct"
RATES = {"generated": 1e-4, "shared": 1e-2}  # of what trains; nobody tuned them


class Source(NamedTuple):
    """A task of the hub: where it lies, its question, and the word of each label.

    text, pair: columns of its rows; pair is empty where there is one text alone.
    """

    repository: str
    config: str | None
    text: str
    pair: str
    question: str
    words: tuple[str, ...]


def _glue(name: str, question: str, *words: str) -> Source:
    return Source("nyu-mll/glue", name, *COLUMNS[name], question, words)


SEEN = {
    "sst2": _glue("sst2", "How does it feel?", "negative", "positive"),
    "cola": _glue("cola", "Is that good English?", "no", "yes"),
    "mrpc": _glue("mrpc", "Do both say the same?", "no", "yes"),
    "qqp": _glue("qqp", "Do both ask the same?", "no", "yes"),
    "qnli": _glue("qnli", "Does it hold the answer?", "yes", "no"),
    "mnli": _glue("mnli", "Does it follow?", "yes", "maybe", "no"),
    "news": Source(
        "fancyzhx/ag_news",
        None,
        "text",
        "",
        "What is it about?",
        ("world", "sports", "business", "technology"),
    ),
    "irony": Source("cardiffnlp/tweet_eval", "irony", "text", "", "Is it ironic?", ("no", "yes")),
}
UNSEEN = {
    "rte": _glue("rte", "Is the second true?", "true", "false"),
    "emotion": Source(
        "dair-ai/emotion",
        "split",
        "text",
        "",
        "What is felt?",
        ("sadness", "joy", "love", "anger", "fear", "surprise"),
    ),
    "spam": Source(
        "ucirvine/sms_spam", "plain_text", "sms", "", "What is it?", ("message", "spam")
    ),
}


class Sizes(NamedTuple):
    """How much is read and learned: rows of a task, steps, episodes a step, examples of an episode
    and texts asked about, tokens a text and of all examples, rows of a prefix, blocks that H starts
    from and its own width, episodes of a task to judge on."""

    rows: int = 1000
    steps: int = 250
    batch: int = 4
    shots: int = 8
    asked: int = 4
    words: int = 32
    read: int = 320
    prefix: int = 8
    blocks: int = 16
    width: int = 512
    judged: int = 12


SIZES = Sizes()


class Episodes(NamedTuple):
    """Episodes of n tasks, as tokens.

    shown: (n, read), labeled examples; mixed: the same, with other examples' labels. asked:
    (n, q, length), a text and its answer, padded on the right; answer: where that stands, bool.
    """

    shown: Tensor
    mixed: Tensor
    asked: Tensor
    answer: Tensor

    def at(self, places) -> Episodes:
        """Some of the episodes, cut after their last answer."""
        shown, mixed, asked, answer = (part[places] for part in self)
        length = 1 + int(answer.flatten(0, 1).any(0).nonzero().max())
        return Episodes(shown, mixed, asked[..., :length], answer[..., :length])


class Reader(nn.Module):
    """H: a copy of a model's embedding and first blocks reads, `HyperModel` writes.

    model: without slots. places, rows: as `HyperModel` takes them. width: of that.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, tuple[int, int]],
        rows: int,
        blocks: int,
        width: int,
    ):
        super().__init__()
        self.text = copy.deepcopy(model)
        del anatomy.blocks(self.text)[blocks:]
        anatomy.replace(self.text, anatomy.family(model).head, nn.Identity())  # it says no word
        dim = anatomy.embedding(model).weight.shape[1]
        self.writer = HyperModel(places, dim, rows, width=width, n_layers=2, n_labels=1)

    def forward(self, examples: Tensor, labels: Tensor) -> Phi:
        """phi of some tasks. examples: (tasks, read) tokens. labels: zeros; the text tells them."""
        every = torch.ones_like(examples, dtype=torch.bool)
        states = last_states(self.text, Encoded(examples, every))  # (tasks, read, dim)
        return self.writer(F.layer_norm(states, states.shape[-1:]), labels)


@on_gpu("That takes a GPU, so SmolLM2 wrote no prefix for itself here.")
def say_episodes(lab: Speaker, device: str, sizes: Sizes = SIZES) -> None:
    """A line on seen tasks' other texts, and one on unseen tasks."""
    model, tokenizer = pretrained(MODEL)
    pools = {name: examples_of(name, sizes.rows) for name in SEEN | UNSEEN}
    parts = episodes_of(pools, tokenizer, sizes)
    for where, losses in written(model, *parts, sizes, device=device).items():
        told = ", ".join(f"{what} {nats:.2f}" for what, nats in losses.items())
        lab.say(f"Nats a token of answers, {where}: {told}.")


def examples_of(name: str, count: int) -> list[Example]:
    """The first rows of a task's training split.

    Raises DataError where they can't be had, or hold one class alone.
    """
    source = (SEEN | UNSEEN)[name]
    rows = hub_rows(f"The task {name}", source.repository, source.config, "train", count)
    if len({row["label"] for row in rows}) < 2:
        raise DataError(f"The task {name} has one class alone in its first {len(rows)} rows.")
    return [
        Example(row[source.text], row["label"], row[source.pair] if source.pair else "")
        for row in rows
    ]


def episodes_of(
    pools: Mapping[str, Sequence[Example]], tokenizer, sizes: Sizes = SIZES, seed: int = 0
) -> tuple[Episodes, Episodes, Episodes]:
    """To train on, of a random seen task each; to judge on, of each seen and each unseen task.

    The last fifth of a seen task's rows is kept for judging.
    """
    draw = np.random.default_rng(seed)
    known = {name: pools[name] for name in SEEN if name in pools}
    cuts = {name: len(pool) * 4 // 5 for name, pool in known.items()}
    train = {name: pool[: cuts[name]] for name, pool in known.items()}
    kept = {name: pool[cuts[name] :] for name, pool in known.items()}
    other = {name: pools[name] for name in UNSEEN if name in pools}
    names = [draw.choice(list(train)) for _ in range(sizes.batch * sizes.steps)]
    return (
        drawn(names, train, tokenizer, sizes, draw),
        drawn([name for name in kept for _ in range(sizes.judged)], kept, tokenizer, sizes, draw),
        drawn([name for name in other for _ in range(sizes.judged)], other, tokenizer, sizes, draw),
    )


def drawn(
    names: Sequence[str],
    pools: Mapping[str, Sequence[Example]],
    tokenizer,
    sizes: Sizes,
    draw: np.random.Generator,
) -> Episodes:
    """An episode of each of these tasks, in their order."""
    shown, mixed, asked, starts = [], [], [], []
    for name in names:
        source = (SEEN | UNSEEN)[name]
        examples, questions = episode(pools[name], sizes.shots, sizes.asked, draw)
        labels = [example.label for example in examples]
        for rows, own in ((shown, labels), (mixed, draw.permutation(labels))):
            ids = [
                token
                for one, label in zip(examples, own, strict=True)
                for piece in pieced(tokenizer, source, one, label, sizes.words)
                for token in piece
            ]
            rows.append(filled(ids, sizes.read))
        for one in questions:
            prompt, answer, _ = pieced(tokenizer, source, one, one.label, sizes.words)
            asked.append(prompt + answer)
            starts.append(len(prompt))
    tokens = torch.zeros(len(asked), max(map(len, asked)), dtype=torch.long)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(asked, starts, strict=True)):
        tokens[row, : len(ids)] = torch.tensor(ids)
        answer[row, start : len(ids)] = True
    both = (part.unflatten(0, (len(names), -1)) for part in (tokens, answer))
    return Episodes(torch.tensor(shown), torch.tensor(mixed), *both)


def episode(
    pool: Sequence[Example], shots: int, asked: int, draw: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Labeled examples, of the classes in turn, then mixed; and others, to be asked about."""
    classes = defaultdict(list)
    for place in draw.permutation(len(pool)):
        classes[pool[place].label].append(int(place))
    turns = [classes[label] for label in draw.permutation(list(classes))]
    longest = max(map(len, turns))
    order = [turn[row] for row in range(longest) for turn in turns if row < len(turn)]
    examples = [pool[place] for place in draw.permutation(order[:shots])]
    rest = draw.permutation(order[shots:])[:asked]
    return examples, [pool[place] for place in rest]


def pieced(
    tokenizer, source: Source, example: Example, label: int, words: int
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of text and question, of a label's word, and of what stands between examples.

    words: of a text, or of each of a pair, at most.
    """

    def cut(text: str, most: int | None = None) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"][:most]

    texts = [example.text, example.pair] if example.pair else [example.text]
    read = [token for text in texts for token in [*cut(text, words), *cut("\n")]]
    return [*read, *cut(source.question)], cut(f" {source.words[label]}"), cut("\n\n")


def filled(ids: list[int], length: int) -> list[int]:
    """As many tokens as there is room for: the end of it, or all again and again.

    So nothing is padded, and the last example is whole.
    """
    return (ids * -(-length // len(ids)))[-length:]


def written(
    model: nn.Module,
    train: Episodes,
    seen: Episodes,
    unseen: Episodes,
    sizes: Sizes = SIZES,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Where -> what stands before a text -> nats a token of its answer.

    H and the shared prefix train on the same episodes, in the same order.
    """
    tuned = built(model, sizes, seed)
    for kind, one in tuned.items():
        learned(one.to(device), train, sizes.steps, RATES[kind], sizes.batch)
    judging = {"other texts of seen tasks": seen, "unseen tasks": unseen}
    return {where: judged(tuned, episodes) for where, episodes in judging.items()}


def built(model: nn.Module, sizes: Sizes, seed: int) -> dict[str, HyperTuned]:
    """What writes a prefix for each task, and one prefix for all, at the same frozen copy."""
    frozen = copy.deepcopy(model).requires_grad_(False)
    places = slots_(frozen, "prefix")
    torch.manual_seed(seed)
    reader = Reader(model, places, sizes.prefix, sizes.blocks, sizes.width)
    hypers = {"generated": reader, "shared": SharedPhi(places, sizes.prefix, "prefix")}
    return {kind: HyperTuned(hyper, frozen) for kind, hyper in hypers.items()}


def learned(tuned: HyperTuned, train: Episodes, steps: int, rate: float, batch: int) -> list[float]:
    """Train what writes, in place, on the episodes as they come; the losses."""

    def loss(tuned: HyperTuned, places: Tensor) -> Tensor:
        some = train.at(places[:, 0])
        return answer_loss(tuned, some, some.shown)

    places = torch.arange(len(train.shown))[:, None]
    options = {"batch": batch, "trainable": tuned.learning(), "seed": None, "loss": loss}
    return recover(tuned, places, steps, rate, **options)


def answer_loss(tuned: HyperTuned, episodes: Episodes, shown: Tensor) -> Tensor:
    """Nats a token of the answers, under what is written from `shown`."""
    device = next(tuned.parameters()).device
    texts = episodes.asked.flatten(0, 1).to(device)
    shown = shown.to(device)
    return loss_of(tuned(shown, torch.zeros_like(shown), texts), texts, episodes)


def plain_loss(frozen: nn.Module, episodes: Episodes, context: bool = False) -> Tensor:
    """The same without a prefix. context: with the tokens that H reads before each text."""
    texts, before = episodes.asked.flatten(0, 1), 0
    if context:
        each = episodes.shown.repeat_interleave(episodes.asked.shape[1], 0)
        texts, before = torch.cat([each, texts], 1), each.shape[1]
    texts = texts.to(next(frozen.parameters()).device)
    logits = anatomy.logits(frozen, texts)
    return loss_of(logits[:, before:], texts[:, before:], episodes)


def loss_of(output, texts: Tensor, episodes: Episodes) -> Tensor:
    """Cross-entropy of the answers' tokens, each from all that stands before it."""
    logits = getattr(output, "logits", output)
    answer = episodes.answer.flatten(0, 1).to(texts.device)[:, 1:]
    return F.cross_entropy(logits[:, :-1][answer].float(), texts[:, 1:][answer])


@torch.no_grad()
def judged(tuned: Mapping[str, HyperTuned], episodes: Episodes, batch: int = 2) -> dict[str, float]:
    """Nats a token of all answers, of each that may stand before a text."""
    generated, shared = tuned["generated"].eval(), tuned["shared"].eval()
    frozen = generated.frozen
    ways = {
        "no example": lambda some: plain_loss(frozen, some),
        "a shared prefix": lambda some: answer_loss(shared, some, some.shown),
        "a written prefix": lambda some: answer_loss(generated, some, some.shown),
        "one from shuffled labels": lambda some: answer_loss(generated, some, some.mixed),
        "the examples themselves": lambda some: plain_loss(frozen, some, context=True),
    }
    parts = [episodes.at(places) for places in torch.arange(len(episodes.shown)).split(batch)]
    weights = torch.tensor([float(part.answer.sum()) for part in parts])
    nats = {what: torch.tensor([way(p).item() for p in parts]) for what, way in ways.items()}
    return {what: float((one * weights).sum() / weights.sum()) for what, one in nats.items()}
