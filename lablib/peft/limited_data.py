"""A guide to few labels (Szép et al., 2024): what to do follows from what one has.

Each strategy takes a classifier, a few labelled texts and perhaps unlabelled ones, and trains the
classifier in place, so that strategies combine. The equations of those that have one:

    contrastive   (cos(u, v) - same)^2, u and v the pooled states of a pair of texts
    adversarial   loss(x) / 2 + loss(x + r) / 2, r = epsilon g / |g|, g the loss's slope at x
    pseudo-labels the label with p > threshold is taken for the truth
    uncertain     -sum p log p decides which text is labelled next
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import recover
from lablib.models import anatomy
from lablib.models.classifier import Classifier, Encoded, pooling, predicted
from lablib.paths import data_dir
from lablib.peft.adapter import remove_
from lablib.peft.lora import lora_
from lablib.peft.tuning import backbone_above, task_loss, tune


def pair_loss(first: Tensor, second: Tensor, same: Tensor) -> Tensor:
    """How far cosines are from 1 for equal labels and from 0 for different ones.

    first, second: (n, dim). same: (n,), 1 or 0. Returns a scalar.
    Source: SetFit (Tunstall et al., 2022), after Sentence-BERT's loss for similarities.
    """
    cosine = F.cosine_similarity(first, second)  # (n, dim), (n, dim) -> (n,)
    return (cosine - same).square().mean()


def adversary(gradient: Tensor, epsilon: float) -> Tensor:
    """The step of length epsilon along which the loss grows fastest: epsilon g / |g|.

    gradient: (n, length, dim), of each text's own loss to its states; the norm is a text's, over
    length and dim. A text without a slope stays. Source: Miyato et al. (2017).
    """
    norm = gradient.flatten(1).norm(dim=1)[:, None, None]  # (n, length, dim) -> (n, 1, 1)
    return epsilon * gradient / norm.clamp(min=torch.finfo(gradient.dtype).tiny)


def confident(logits: Tensor, threshold: float = 0.9) -> tuple[Tensor, Tensor]:
    """Places of texts whose largest probability passes the threshold, and their likely labels.

    logits: (n, classes). Source: self-training, as in Lee (2013).
    """
    certainty, label = logits.softmax(1).max(1)
    places = (certainty > threshold).nonzero()[:, 0]
    return places, label[places]


def uncertain(logits: Tensor, n: int) -> Tensor:
    """Places of the n texts with the largest entropy, -sum p log p. logits: (texts, classes)."""
    entropy = torch.special.entr(logits.softmax(1)).sum(1)
    return entropy.topk(min(n, len(entropy))).indices


def k_center(points: Tensor, n: int, chosen: Sequence[int] = ()) -> list[int]:
    """Places of n points, each the farthest from all that were chosen before (greedy).

    points: (texts, dim). chosen: places that count as chosen already; without any, the first of all
    comes first. Source: Sener and Savarese (2018).
    """
    new = [] if len(chosen) else [0]
    near = torch.cdist(points, points[[*chosen, *new]]).min(1).values
    while len(new) < n:
        new.append(int(near.argmax()))
        near = torch.minimum(near, torch.cdist(points, points[new[-1:]])[:, 0])
    return new[:n]


class Few(NamedTuple):
    """Labelled texts: labels (n,) int64."""

    encoded: Encoded
    labels: Tensor

    def at(self, places: Tensor) -> Few:
        """Those alone."""
        return Few(self.encoded.at(places), self.labels[places])

    def and_(self, other: Few) -> Few:
        """Both together, padded to the longer."""
        parts = (self, other)
        inputs, mask = (_stacked([part.encoded[kind] for part in parts]) for kind in (0, 1))
        return Few(Encoded(inputs, mask), torch.cat([part.labels for part in parts]))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """(n, length, ...) of several lengths -> all rows, zeros to the right."""
    rows = [row for part in parts for row in part]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass(frozen=True)
class Training:
    """What all strategies share: how long, how fast, from which seed."""

    steps: int
    rate: float
    batch: int = 16
    seed: int = 0


def standard(classifier: Classifier, few: Few, training: Training) -> None:
    """Fine-tuning: all of the blocks above those that are computed once, and the head."""
    _tune(classifier, few, training, backbone_above(classifier, classifier.below))


def efficient(classifier: Classifier, few: Few, training: Training, rank: int = 8) -> None:
    """Parameter-efficient fine-tuning: LoRA on the same blocks' projections, and the head."""
    adapt_(classifier, rank)
    _tune(classifier, few, training)


def adapt_(classifier: Classifier, rank: int = 8) -> None:
    """LoRA in the blocks above `classifier.below` alone."""
    lora_(classifier.model, rank=rank)
    for block in anatomy.blocks(classifier.model)[: classifier.below]:
        remove_(block)


def _tune(
    classifier: Classifier, few: Few, training: Training, names: Sequence[str] | None = None
) -> None:
    shared = {"batch": training.batch, "seed": training.seed, "trainable": names}
    tune(classifier, few.encoded, few.labels, training.steps, training.rate, **shared)


def linear_head(classifier: Classifier, few: Few, strength: float = 1.0) -> None:
    """Logistic regression on the pooled states; the backbone stays.

    Minimizes sum of cross-entropies + |w|^2 / (2 strength), in float64, to its minimum.
    """
    pooled = embedded(classifier, few.encoded).double()  # (n, length, dim) -> (n, dim)
    n_labels, dim = classifier.head.weight.shape
    weight = torch.zeros(n_labels, dim, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_labels, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        fit = F.cross_entropy(pooled @ weight.T + bias, few.labels, reduction="sum")
        total = fit + weight.square().sum() / (2 * strength)
        total.backward()
        return total

    optimizer.step(objective)
    with torch.no_grad():
        classifier.head.weight.copy_(weight)
        classifier.head.bias.copy_(bias)


@torch.no_grad()
def embedded(classifier: Classifier, encoded: Encoded, batch: int = 64) -> Tensor:
    """(n, dim): each text's pooled states."""
    made = []
    for start in range(0, len(encoded.mask), batch):
        part = encoded.at(slice(start, start + batch))
        made.append(pooling(classifier.states(part), part.mask, classifier.pool))
    return torch.cat(made)


def contrastive(classifier: Classifier, few: Few, training: Training) -> None:
    """Pull texts of one label together and others apart, then fit a linear head."""
    rows = pairs(few.labels, training.steps * training.batch, training.seed)

    def loss(_: nn.Module, rows: Tensor) -> Tensor:
        part = few.encoded.at(rows[:, :2].T.flatten())  # first ones, then second ones
        first, second = pooling(classifier.states(part), part.mask, classifier.pool).chunk(2)
        return pair_loss(first, second, rows[:, 2].to(first.dtype))

    blocks = [n for n in backbone_above(classifier, classifier.below) if not n.startswith("head.")]
    options = {"batch": training.batch, "trainable": blocks, "seed": training.seed, "loss": loss}
    recover(classifier, rows, training.steps, training.rate, **options)
    linear_head(classifier, few)


def pairs(labels: Tensor, n: int, seed: int = 0) -> Tensor:
    """(n, 3): places of two different texts, and whether their labels are equal, in turns.

    labels: (texts,). Raises ValueError when no two are equal, or all are.
    """
    texts, draw, rows = labels.tolist(), random.Random(seed), []
    groups = {one: [i for i, label in enumerate(texts) if label == one] for one in set(texts)}
    many = [i for i, label in enumerate(texts) if len(groups[label]) > 1]
    if not many or len(groups) < 2:
        raise ValueError(f"pairs need two texts of a label, and two labels: {texts[:20]}")
    for number in range(n):
        first = draw.choice(many if number % 2 == 0 else range(len(texts)))
        equal = groups[texts[first]]
        others = equal if number % 2 == 0 else [i for i in range(len(texts)) if i not in equal]
        second = draw.choice([i for i in others if i != first])
        rows.append((first, second, int(number % 2 == 0)))
    return torch.tensor(rows)


@lru_cache(maxsize=1)
def recorded() -> tuple[dict[str, str], dict[str, Tensor]]:
    """What sentence-transformers and SetFit made of fixed vectors and labels.

    Versions by package. first, second: (n, dim), float64; same: (n,); loss: (1,); and its slopes,
    "slope of first" and "slope of second". labels: (texts,); pairs: (m, 3) as `pairs` has them.
    Written by tests/peft/record_limited_data.py.
    """
    file = data_dir() / "published" / "limited-data.safetensors"
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["versions"]), load_file(file)


def possible(rows: Tensor, n_texts: int) -> Tensor:
    """(2, texts, texts), bool: pairs drawn as different, and as equal, in either order.

    rows: (n, 3) as `pairs` has them; a text beside itself is left out.
    """
    first, second, same = rows[rows[:, 0] != rows[:, 1]].T
    table = torch.zeros(2, n_texts, n_texts, dtype=torch.bool)
    table[same, first, second] = table[same, second, first] = True
    return table


def adversarial(classifier: Classifier, few: Few, training: Training, epsilon: float = 1.0) -> None:
    """Fine-tuning on each text and on its worst neighbor in the space of the states."""

    def loss(_: nn.Module, places: Tensor) -> Tensor:
        (inputs, mask), labels = few.at(places[:, 0])
        at = inputs.clone().requires_grad_()
        plain = task_loss(classifier(Encoded(at, mask)), labels)
        (slope,) = torch.autograd.grad(plain, at, retain_graph=True)
        moved = Encoded(inputs + adversary(slope, epsilon), mask)
        return (plain + task_loss(classifier(moved), labels)) / 2

    names = backbone_above(classifier, classifier.below)
    places = torch.arange(len(few.labels))[:, None]
    options = {"batch": training.batch, "trainable": names, "seed": training.seed, "loss": loss}
    recover(classifier, places, training.steps, training.rate, **options)


def pseudo_labelled(
    classifier: Classifier,
    few: Few,
    unlabelled: Encoded,
    training: Training,
    threshold: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Fine-tune, believe the confident guesses on unlabelled texts, fine-tune on both.

    Returns the places that it believed, and the labels it gave them.
    """
    standard(classifier, few, training)
    places, labels = confident(predicted(classifier, unlabelled), threshold)
    if len(places):
        standard(classifier, few.and_(Few(unlabelled.at(places), labels)), training)
    return places, labels


Strategy = Callable[..., object]  # (classifier, few, training=...), trains in place


def continued(
    classifier: Classifier,
    few: Few,
    unlabelled: Tensor,
    training: Training,
    reading: Training,
    then: Strategy = standard,
) -> None:
    """Continued pretraining: read texts without labels first, then do as `then` does.

    unlabelled: (n, length + 1) tokens, as `packed` makes them, of the domain or of the task's own
        texts. Both in turn: `then=partial(continued, unlabelled=..., reading=...)`.
    The model is a decoder with its head, all of which trains while it reads. Raises ValueError
    where its lower blocks are computed once: they would change, and their states not.
    Source: Gururangan et al. (2020), who call the two domain- and task-adaptive pretraining.
    """
    if classifier.below:
        raise ValueError(f"reading changes all blocks, and {classifier.below} are computed once")
    options = {"batch": reading.batch, "seed": reading.seed}
    recover(classifier.model, unlabelled, reading.steps, reading.rate, **options)
    then(classifier, few, training=training)


def packed(tokenizer, texts: Sequence[str], length: int = 64) -> Tensor:
    """(n, length + 1): the tokens of all texts, one after the other; what is left over is dropped.

    tokenizer: text -> {"input_ids": tokens}.
    """
    tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return torch.tensor(tokens[: len(tokens) // (length + 1) * (length + 1)]).view(-1, length + 1)


def cross_lingual(
    classifier: Classifier, few: Few, others: Few, training: Training, then: Strategy = standard
) -> None:
    """Cross-lingual transfer: learn from another language's labelled texts beside the few.

    then: any strategy; one that takes more, as a `partial`: pseudo_labelled with its unlabelled.
    """
    then(classifier, few.and_(others), training=training)


def draw_uncertain(
    classifier: Classifier, pool: Few, start: Sequence[int], n: int, rounds: int = 3
) -> list[int]:
    """Places of n texts to label: `start`, and in each round those that a linear head doubts most.

    pool: texts, with labels that are looked at only once a text is drawn.
    """
    chosen = list(start)
    for left in range(rounds, 0, -1):
        linear_head(classifier, pool.at(torch.tensor(chosen)))
        logits = predicted(classifier, pool.encoded)
        logits[chosen] = 0
        logits[chosen, 0] = torch.inf  # drawn already: no doubt
        chosen += uncertain(logits.nan_to_num(posinf=1e4), (n - len(chosen)) // left).tolist()
    return chosen


def by_names(texts: Tensor, names: Tensor) -> Tensor:
    """No labels at all: the cosine of each text with each label's description.

    texts: (n, dim). names: (labels, dim). Returns (n, labels).
    """
    return F.normalize(texts, dim=1) @ F.normalize(names, dim=1).T


@torch.no_grad()
def in_context(model, tokenizer, before: str, texts: Sequence[str], words: Sequence[str]) -> Tensor:
    """No training: how likely each label's word is after a text that follows labelled ones.

    model: a `GPT`. before: the labelled texts, each with its word; read once and kept in the cache.
    words: one a label, of which the last token counts. Returns logits (n, labels).
    """
    ends = [tokenizer(word)["input_ids"][-1] for word in words]
    device = next(model.parameters()).device
    cache, rows = model.new_cache(1024), []
    if before:
        model.hidden_states(torch.tensor([tokenizer(before)["input_ids"]], device=device), cache)
    read = cache[0].length
    for text in texts:
        for block in cache:
            block.length = read  # what the last text left behind it is written over
        states = model.hidden_states(
            torch.tensor([tokenizer(text)["input_ids"]], device=device), cache
        )
        rows.append(model.head(states[:, -1])[0, ends])  # (vocabulary,) -> (labels,)
    return torch.stack(rows)


def deleted(text: str, share: float, draw: random.Random) -> str:
    """The text without about this share of its words; never without all of them."""
    words = text.split()
    kept = [word for word in words if draw.random() >= share]
    return " ".join(kept or words[:1])


def swapped(text: str, times: int, draw: random.Random) -> str:
    """The text with two words in each other's place, so many times."""
    words = text.split()
    for _ in range(times if len(words) > 1 else 0):
        i, j = draw.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


class Advice(NamedTuple):
    """One row of the guide: a strategy, what it needs, and where the guide speaks of it.

    labels: the fewest and the most a class that it is meant for.
    """

    name: str
    labels: tuple[float, float]
    unlabelled: bool = False
    language: bool = False
    trains: bool = True
    section: str = ""


MANY = float("inf")
GUIDE = (
    Advice("label names alone", (0, MANY), trains=False),
    Advice("linear head", (1, 64), trains=False),
    Advice("contrastive pairs, then a linear head", (4, 64), section="4.3"),
    Advice("parameter-efficient tuning", (4, MANY), section="4.1"),
    Advice("full fine-tuning", (64, MANY)),
    Advice("adversarial tuning", (8, MANY)),
    Advice("pseudo-labels", (8, 256), unlabelled=True),
    Advice("labelling what is uncertain", (16, 256), unlabelled=True),
    Advice("continued pretraining on the task's text", (0, MANY), unlabelled=True, section="3.1"),
    Advice("another language's labels", (0, 256), language=True, section="3.1"),
)


def advised(
    per_class: float, *, unlabelled: bool = False, language: bool = False, trains: bool = True
) -> list[str]:
    """Names of the strategies that what one has allows.

    per_class: labels a class. unlabelled: there is text of the task without labels. language:
    labels in another language. trains: blocks can be trained, not a head alone.
    The requirements follow the guide's overview table where it has a row; the numbers of labels are
    ours, and so are the rows without a section.
    """
    return [
        row.name
        for row in GUIDE
        if row.labels[0] <= per_class <= row.labels[1]
        and (unlabelled or not row.unlabelled)
        and (language or not row.language)
        and (trains or not row.trains)
    ]


def crossing(counts: Sequence[float], gaps: Sequence[float]) -> float:
    """Where a curve of gaps first changes its sign: linear between points, on log counts.

    counts: increasing. gaps: method minus baseline, as many. nan when it never does.
    """
    x = np.log2(np.asarray(counts, dtype=float))
    for (a, p), (b, q) in zip(zip(x, gaps), list(zip(x, gaps))[1:]):
        if p * q < 0:
            return float(2 ** (a + (b - a) * p / (p - q)))
        if q == 0 and p != 0:
            return float(2**b)
    return float("nan")


def crossing_interval(
    counts: Sequence[float], gaps: np.ndarray, draws: np.ndarray
) -> tuple[float, float, float, float]:
    """The mean curve's crossing, a bootstrap's 95 % interval, and the share of draws that cross.

    gaps: (seeds, counts). draws: (rounds, seeds), places of seeds drawn with replacement.
    A draw whose mean curve never crosses has no part in the interval; without any it is nan.
    """
    found = np.array([crossing(counts, gaps[places].mean(0)) for places in draws])
    there = found[np.isfinite(found)]
    low, high = np.quantile(there, [0.025, 0.975]) if len(there) else (np.nan, np.nan)
    share = len(there) / len(found)
    return crossing(counts, gaps.mean(0)), float(low), float(high), share
