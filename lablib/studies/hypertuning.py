"""The study of HyperTuning (2022): adapters written by a model, against one adapter for all tasks.

A task is to tell two classes apart: two books of the Bible, two newsgroups, two categories of
licences, two modules of Python. Texts are short pieces. The frozen model is MiniLM with a fixed
reader of two classes, a random direction; its lower five blocks are computed once, and what is
written is a LoRA of the last block. A third of the classes, drawn by the seed, occurs in no
training task. Three tasks of four call the class that stands later in its list 1, the others turn
this around: so one adapter for all tasks can know something, and labels must be read to know all.

Hyperpretraining needs no labels. MiniLM has no head for words, so the paper's objective becomes a
question of two classes: of two stretches of other text, each cut into A, B, C and D, H sees A and
D, and the frozen model must tell whose B and C it reads.

Smaller than the specification has it, for time: pieces of a few words, a short training, few seeds;
H has two blocks, and the lab's decoder is `tiny-1m` in the place of `tiny-4m`. When all of this was
known, a longer training was added, with the specification's 3,000 tasks and four blocks of H, on
seeds of its own. Each kind had four rates there on the other seed, by accuracy, and each start of
tuning four, by the loss in the end; none of the best is an edge. A shared adapter stays at chance
at any rate.
Rates were tuned on one other seed with half the steps, three tries for each kind; a smaller rate of
the shared adapter, tried before, was worse. That of hyperpretraining was fixed beforehand. Tried
first, with a single layer in place of the last block: with every weight of H drawn at random it
stays at chance for as long as we can train; with signs for labels alone it does, too. So H starts
with rows that point from one class's mean to the other's. Seeing fewer examples in some training
tasks made it worse with many; more blocks, dropout or noise on examples changed little. A LoRA of
the values alone was worse than one of the feed-forward layer as well. A third control, the examples
in the frozen block's own attention, learns next to nothing in as many steps, at none of three
rates: its tries are kept, and it is judged in the longer training alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import recover
from lablib.data import load
from lablib.data.tasks import load_task, task
from lablib.evidence import Pair, grid, matching
from lablib.evidence.studies import against, paired
from lablib.models.classifier import (
    Classifier,
    Encoded,
    cached_below,
    encode,
    encoder,
    pooling,
)
from lablib.peft.hypertuning import (
    Bank,
    HyperModel,
    HyperTuned,
    InContext,
    OwnPhi,
    SharedPhi,
    Tasks,
    segments,
    slots_,
)

BELOW = 5  # MiniLM's blocks that are computed once
ROLES_OF = ("value", "up")  # what is changed in the last block
RANK = 4
BLOCKS = 2  # of H
WORDS, LENGTH = 14, 20  # of a piece of text: words, and tokens at most
SHOTS = 8  # examples of each class
ASKED = 3  # texts of each class that a training task asks about
TEXTS = 32  # of a class
SOURCES = ("bible-book", "newsgroups", "licences-all", "python-module")
UNLABELLED = ("shakespeare", "django-docs", "python-docs", "python-source", "bible")
STRETCHES = 80  # of each unlabelled corpus
SIZES = (3, 1, 1, 3)  # pieces of A, B, C and D
TURNED = 0.25  # of the tasks call the earlier class 1
BATCH = 8  # tasks of a step
STEPS, PRESTEPS = 160, 100
JUDGED = 100  # unseen tasks, each with SHOTS texts of a class to judge on
TUNED_STEPS = 20  # of ordinary tuning
SPREAD = 0.3  # of the states, so that a vector's features are about 1


def run(
    kind: str,
    seed: int,
    rate: float | None = None,
    steps: int = STEPS,
    texts: int = TEXTS,
    judged: int = JUDGED,
    starts: Sequence[float] = (),
    tuned: int = 4,
    sources: Sequence[str] = SOURCES,
    blocks: int = BLOCKS,
) -> dict:
    """One training on tasks, and what comes of it on tasks whose classes it has not met.

    kind: "generated", H writes each task's phi; "pretrained", the same after hyperpretraining;
        "shared", one phi for all tasks; "context", a shared one, and the examples in the frozen
        model's attention; "random", nothing trains, tuning starts from a new LoRA. "all" makes
        those of `KINDS` one after another; "shared_loss" is then the loss of "shared".
    rate: None is the rate that the kind was tuned to. texts: of a class. judged: unseen tasks.
    starts: rates of ordinary tuning, none for the one that the kind was tuned to. tuned: unseen
        tasks that are tuned. blocks: of H.
    accuracy: %, loss: nats, on unseen tasks; shuffled: accuracy with the examples' labels mixed.
    few: accuracy with 2, 4 and 8 examples a class; mean: the same of a nearest mean, without any
        training. told: how far phi differs from task to task, as a share of its size.
    start_loss, tuned_loss(es): nats on what is held out of a few unseen tasks, before and after
        ordinary tuning of each task's own phi on its examples; tuned_curve: their training
        losses; tuned_losses: one a rate.
    """
    if kind == "all":
        told = {
            one: run(one, seed, None, steps, texts, judged, (), tuned, sources, blocks)
            for one in KINDS
        }
        return {f"{one}_{key}": value for one, row in told.items() for key, value in row.items()}
    bank = labelled(texts, tuple(sources))
    seen, unseen = split(bank.kinds, seed)
    draw = np.random.default_rng(seed)
    learned = drawn_tasks(bank, seen, BATCH * steps, min(ASKED, texts - SHOTS), draw)
    judged_tasks = drawn_tasks(bank, unseen, judged, min(SHOTS, texts - SHOTS), draw)
    torch.manual_seed(seed)
    model = built(kind, bank, blocks)
    if kind == "pretrained":
        hyperpretrain(model, seed, round(PRESTEPS * steps / STEPS))
    losses = []
    if kind != "random":
        rate = TUNED[kind] if rate is None else rate
        losses = fit(model, bank, learned, rate, steps)
    quarters = np.array_split(losses, min(4, steps)) if losses else []
    found = {"losses": [round(float(part.mean()), 4) for part in quarters]}
    found |= judged_on(model, bank, judged_tasks)
    if kind in TUNED_START:
        few = judged_tasks.at(slice(tuned))
        rates = starts or (TUNED_START[kind],)
        ends = [tuned_from(model, bank, few, rate) for rate in rates]
        found |= ends[0] | {"tuned_losses": [one["tuned_loss"] for one in ends]}
    return found


def built(kind: str, bank: Bank, blocks: int = BLOCKS) -> HyperTuned:
    """What writes phi, and the frozen model. blocks: of H."""
    frozen = frozen_model(bank)
    places = slots_(frozen.model, "lora", ROLES_OF, BELOW)
    dim = frozen.head.in_features
    if kind in ("generated", "pretrained"):
        return HyperTuned(HyperModel(places, dim, RANK, n_layers=blocks), frozen)
    shared = SharedPhi(places, RANK)
    if kind != "context":
        return HyperTuned(shared, frozen)
    hyper = InContext(shared, dim)
    (place,) = slots_(frozen.model, "prefix", below=BELOW)
    hyper.attend(frozen.model, place)
    return HyperTuned(hyper, frozen)


def frozen_model(bank: Bank) -> Classifier:
    """MiniLM without dropout, and a fixed reader: two classes, on two sides of a random plane.

    The plane goes through the middle of the bank's texts.
    """
    model = encoder()[0]
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    frozen = Classifier(model, 2, below=BELOW)
    direction = torch.randn(frozen.head.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        frozen.head.weight.copy_(0.1 * torch.stack([-direction, direction]))
        frozen.head.bias.zero_()
        sample = bank.encoded.at(torch.arange(0, len(bank.vectors), 1 + len(bank.vectors) // 64))
        frozen.head.bias.copy_(-frozen(sample).mean(0))
    return frozen.requires_grad_(False)


def fit(model: HyperTuned, bank: Bank, tasks: Tasks, rate: float, steps: int) -> list[float]:
    """Train what writes phi, a batch of tasks a step; the losses."""

    def loss(model: HyperTuned, rows: Tensor) -> Tensor:
        logits, answers = answered(model, bank, tasks.at(rows[:, 0]))
        return F.cross_entropy(logits, answers)

    rows = torch.arange(len(tasks.labels))[:, None]
    options = {"batch": BATCH, "trainable": model.learning(), "seed": None, "loss": loss}
    return recover(model, rows, steps, rate, **options)


def answered(
    model: HyperTuned, bank: Bank, tasks: Tasks, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (tasks * q, 2) of the texts asked about, and their answers.

    labels: in the place of the examples' own.
    """
    labels = tasks.labels if labels is None else labels
    texts = bank.encoded.at(tasks.asked.flatten())
    return model(bank.vectors[tasks.examples], labels, texts), tasks.answers.flatten()


def hyperpretrain(model: HyperTuned, seed: int, steps: int) -> list[float]:
    """Train H on stretches of text that nobody has labelled."""
    bank = unlabelled()
    draw = np.random.default_rng(seed + 1000)
    tasks = stretch_tasks(bank, BATCH * steps, draw)
    return fit(model, bank, tasks, PRERATE, steps)


@torch.no_grad()
def judged_on(model: HyperTuned, bank: Bank, tasks: Tasks) -> dict:
    """How the model does on tasks."""
    right, loss = scored_on(model, bank, tasks)
    found = {"accuracy": right, "loss": loss}
    if isinstance(model.hyper, SharedPhi):
        return found
    mixed = tasks._replace(labels=shuffled(tasks.labels))
    found["shuffled"] = scored_on(model, bank, mixed)[0]
    shown = [fewer(tasks, shots) for shots in (2, 4)]
    found["few"] = [*(scored_on(model, bank, few)[0] for few in shown), right]
    found["mean"] = [nearest_mean(bank, few) for few in [*shown, tasks]]
    phi = model.hyper(bank.vectors[tasks.examples], tasks.labels)
    rows = torch.cat([part.flatten(1) for pair in phi.values() for part in pair], 1)
    found["told"] = float((rows - rows.mean(0)).norm() / rows.norm())
    return found


def scored_on(model: HyperTuned, bank: Bank, tasks: Tasks) -> tuple[float, float]:
    """Accuracy in %, and loss in nats."""
    parts = [
        answered(model, bank, tasks.at(slice(start, start + BATCH)))
        for start in range(0, len(tasks.labels), BATCH)
    ]
    logits, answers = (torch.cat(part) for part in zip(*parts))
    right = (logits.argmax(1) == answers).float().mean()
    return 100 * right.item(), F.cross_entropy(logits, answers).item()


def shuffled(labels: Tensor) -> Tensor:
    """Each task's labels in another order; half of them stay right."""
    draw = torch.Generator().manual_seed(0)
    return torch.stack([row[torch.randperm(len(row), generator=draw)] for row in labels])


def fewer(tasks: Tasks, shots: int) -> Tasks:
    """The same tasks with the first examples of each class alone."""
    return tasks._replace(
        examples=tasks.examples[:, : 2 * shots], labels=tasks.labels[:, : 2 * shots]
    )


def nearest_mean(bank: Bank, tasks: Tasks) -> float:
    """Accuracy, %, of the class whose examples' mean is nearer: no training at all."""
    vectors = F.normalize(bank.vectors, dim=-1)
    examples, asked = vectors[tasks.examples], vectors[tasks.asked]
    means = [examples[tasks.labels == y].unflatten(0, (len(asked), -1)).mean(1) for y in (0, 1)]
    far = [(asked - mean[:, None]).norm(dim=-1) for mean in means]
    return 100 * ((far[1] < far[0]).long() == tasks.answers).float().mean().item()


def tuned_from(model: HyperTuned, bank: Bank, tasks: Tasks, rate: float) -> dict:
    """Ordinary tuning of each task's own phi, from where the model puts it."""
    own = HyperTuned(OwnPhi(model.hyper(bank.vectors[tasks.examples], tasks.labels)), model.frozen)
    learn = tasks._replace(asked=tasks.examples, answers=tasks.labels)
    with torch.no_grad():
        before = scored_tuned(own, bank, tasks)
    rows = torch.zeros(1, 1, dtype=torch.int64)
    options = {"batch": 1, "trainable": own.learning(), "seed": None}

    def loss(own: HyperTuned, rows: Tensor) -> Tensor:
        return F.cross_entropy(*answered(own, bank, learn))

    losses = recover(own, rows, TUNED_STEPS, rate, loss=loss, **options)
    after = scored_tuned(own, bank, tasks)
    curve = [round(value, 4) for value in losses]
    return {"start_loss": before, "tuned_loss": after, "tuned_curve": curve}


@torch.no_grad()
def scored_tuned(own: HyperTuned, bank: Bank, tasks: Tasks) -> float:
    """Nats on the texts asked about, all tasks at once."""
    return F.cross_entropy(*answered(own, bank, tasks)).item()


# Tasks.


def split(kinds: Sequence[str], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Groups for training, and unseen ones: of each kind two thirds and one third, in order."""
    draw, seen, unseen = np.random.default_rng(seed), [], []
    for kind in dict.fromkeys(kinds):
        order = draw.permutation([place for place, one in enumerate(kinds) if one == kind])
        many = round(len(order) * 2 / 3)
        seen.append(sorted(order[:many].tolist()))
        unseen.append(sorted(order[many:].tolist()))
    return seen, unseen


def drawn_tasks(bank: Bank, groups: list[list[int]], count: int, asked: int, draw) -> Tasks:
    """Tasks of two classes of one kind each; kinds with more classes are drawn more often."""
    weights = np.array([np.sqrt(len(group) * (len(group) - 1)) for group in groups])
    rows = []
    for _ in range(count):
        group = groups[draw.choice(len(groups), p=weights / weights.sum())]
        pair = np.sort(draw.choice(group, 2, replace=False))
        pair = pair[::-1] if draw.random() < TURNED else pair
        chosen = [one * bank.size + draw.permutation(bank.size)[: SHOTS + asked] for one in pair]
        rows.append(np.stack(chosen, 1))  # (shots + asked, 2): a class a column
    return of_rows(np.array(rows), SHOTS)


def stretch_tasks(bank: Bank, count: int, draw) -> Tasks:
    """Tasks of two stretches of one corpus each: A and D are the examples, B and C are asked."""
    a, b, c, d = segments(torch.arange(bank.size), SIZES)
    order = torch.cat([a, d, b, c]).numpy()
    by_kind = defaultdict(list)
    for place, kind in enumerate(bank.kinds):
        by_kind[kind].append(place)
    groups, rows = list(by_kind.values()), []
    for _ in range(count):
        pair = draw.choice(groups[draw.integers(len(groups))], 2, replace=False)
        rows.append(order[:, None] + bank.size * pair[None])
    return of_rows(np.array(rows), len(a) + len(d))


def of_rows(rows: np.ndarray, shots: int) -> Tasks:
    """Places (tasks, shots + asked, 2), a class a column, as tasks."""
    rows = torch.from_numpy(rows)
    labels = torch.arange(2).expand(rows.shape)
    parts = [t.flatten(1) for part in (rows, labels) for t in (part[:, :shots], part[:, shots:])]
    examples, asked, labels, answers = parts
    return Tasks(examples, labels, asked, answers)


@lru_cache(maxsize=1)
def mini():
    """MiniLM and its tokenizer, for what is computed once."""
    return encoder()


@lru_cache(maxsize=1)
def labelled(texts: int, sources: tuple[str, ...] = SOURCES) -> Bank:
    """Pieces of all classes that have so many texts; every class is a group."""
    pieces, kinds, draw = [], [], np.random.default_rng(0)
    for source in sources:
        of_class = defaultdict(list)
        for part in load_task(source):
            for example in part:
                of_class[example.label].append(example.text)
        for _, own in sorted(of_class.items()):
            if len(own) >= TEXTS:
                places = draw.choice(len(own), TEXTS, replace=False)[:texts]
                pieces += [middle(own[place]) for place in places]
                kinds.append(source)
    return banked(pieces, kinds)


@lru_cache(maxsize=1)
def unlabelled() -> Bank:
    """Pieces of stretches of text that no task is made of; every stretch is a group."""
    pieces, kinds, draw = [], [], np.random.default_rng(0)
    many = sum(SIZES)
    for corpus in UNLABELLED:
        texts = [text.split() for text in others(corpus)]
        texts = [words for words in texts if len(words) >= WORDS * many]
        for _ in range(STRETCHES):
            words = texts[draw.integers(len(texts))]
            start = draw.integers(len(words) - WORDS * many + 1)
            pieces += [
                " ".join(words[start + place : start + place + WORDS])
                for place in range(0, WORDS * many, WORDS)
            ]
            kinds.append(corpus)
    return banked(pieces, kinds)


def others(corpus: str) -> list[str]:
    """A corpus's documents that no task is made of."""
    classes = {"bible": "bible-book", "python-source": "python-module"}
    if corpus not in classes:
        return [text for _, text in load(corpus)]
    many = defaultdict(int)
    for part in load_task(classes[corpus]):
        for example in part:
            many[task(classes[corpus]).labels[example.label]] += 1
    return [text for name, text in load(corpus) if many[name] < TEXTS]


def middle(text: str) -> str:
    """The words in the middle of a text."""
    words = text.split()
    start = max(0, (len(words) - WORDS) // 2)
    return " ".join(words[start : start + WORDS])


def banked(pieces: list[str], kinds: list[str]) -> Bank:
    """Pieces as MiniLM's lower blocks leave them, and a vector of each for H."""
    encoded = lower(pieces)
    center = pooling(encoded.inputs, encoded.mask, "mean").mean(0)
    return Bank(encoded, vectors_of(encoded, center), kinds, len(pieces) // len(kinds), center)


def lower(pieces: Sequence[str]) -> Encoded:
    """States of texts below the last block."""
    model, tokenizer = mini()
    return cached_below(model, encode(tokenizer, pieces, length=LENGTH), BELOW)


def vectors_of(encoded: Encoded, center: Tensor) -> Tensor:
    """(n, dim): the mean of each text's states, beside the bank's."""
    return (pooling(encoded.inputs, encoded.mask, "mean") - center) / SPREAD


PRERATE = 3e-4
RATES = {
    "generated": (1e-4, 3e-4, 1e-3),
    "pretrained": (1e-4, 3e-4, 1e-3),
    "shared": (3e-3, 1e-2, 3e-2),
    "context": (3e-4, 1e-3, 3e-3),
}
STARTS = {
    "pretrained": [3e-4, 1e-3, 3e-3],
    "shared": [1e-3, 3e-3, 1e-2],
    "random": [1e-3, 3e-3, 1e-2],
}
TUNED = {"generated": 3e-4, "pretrained": 3e-4, "shared": 1e-2, "context": 3e-3}
TUNED_START = {"pretrained": 1e-3, "shared": 3e-3, "random": 3e-3}
KINDS = ("pretrained", "generated", "shared", "random")
SEEDS = range(5)
SMALL = {"kind": "generated", "texts": 16, "steps": 30, "judged": 24}  # to repeat in the lab
POINTS = [*grid(seed=SEEDS, kind="all", tuned=8), {"seed": 0, **SMALL}]
LONGER = {"steps": 375, "blocks": 4}  # 3,000 tasks, and the specification's H
TUNED_LONGER = {"pretrained": 1e-4, "generated": 3e-4, "shared": 1e-3, "context": 1e-2}
START_LONGER = {"pretrained": 3e-4, "shared": 3e-3, "random": 3e-3}
LATER = range(5, 10)  # seeds of the longer training
POINTS += [
    {"kind": kind, "seed": seed, "tuned": 16, **LONGER}
    | ({"rate": TUNED_LONGER[kind]} if kind in TUNED_LONGER else {})
    | ({"starts": [START_LONGER[kind]]} if kind in START_LONGER else {})
    for seed in LATER
    for kind in (*TUNED_LONGER, "random")
]
SHORT = {"steps": STEPS // 2, "judged": 40}
TUNING = [
    {"seed": 100, "kind": kind, "rate": rate, **SHORT}
    | ({"starts": STARTS[kind]} if kind in STARTS and rate == rates[1] else {})
    for kind, rates in RATES.items()
    for rate in rates
]
TUNING += [{"seed": 100, "kind": "random", "starts": STARTS["random"], **SHORT}]
STARTS_LONGER = {
    "pretrained": [1e-4, 3e-4, 1e-3, 3e-3],
    "shared": [3e-4, 1e-3, 3e-3, 1e-2],
    "random": [3e-4, 1e-3, 3e-3, 1e-2],
}
RATES_LONGER = {
    "generated": (3e-5, 1e-4, 3e-4, 1e-3),
    "pretrained": (3e-5, 1e-4, 3e-4, 1e-3),
    "shared": (3e-4, 1e-3, 3e-3, 1e-2),
    "context": (1e-3, 3e-3, 1e-2, 3e-2),
}
TUNING += [
    {"seed": 100, "kind": kind, "rate": rate, "tuned": 8, **LONGER}
    | (
        {"starts": STARTS_LONGER[kind]}
        if kind in STARTS_LONGER and rate == TUNED_LONGER[kind]
        else {}
    )
    for kind, rates in RATES_LONGER.items()
    for rate in rates
]
TUNING += [{"seed": 100, "kind": "random", "starts": STARTS_LONGER["random"], "tuned": 8, **LONGER}]
CANARY = {
    "kind": "generated",
    "seed": 200,
    "steps": 2,
    "texts": 10,
    "judged": 4,
    "sources": ["licences-all"],
}


SHUFFLED, SHARED = "pretrained_shuffled", "shared_accuracy"  # from wrong labels; from none
ROLES = {
    "unseen-tasks": against("pretrained_accuracy", SHARED, SHUFFLED),
    "labels-matter": against("pretrained_accuracy", SHUFFLED, SHARED),
    "pretraining": against("pretrained_accuracy", "generated_accuracy", SHARED),
    "initialization": against("pretrained_tuned_loss", "shared_tuned_loss", "random_tuned_loss"),
    "initialization-random": against(
        "pretrained_tuned_loss", "random_tuned_loss", "shared_tuned_loss"
    ),
}
OF_KIND = {
    kind: {"kind": kind, **LONGER}
    for kind in ("pretrained", "generated", "shared", "context", "random")
}
MEASURED = {  # of the longer training: the value, and the roles
    "longer": ("accuracy", "pretrained", "shared", "random"),
    "in-context": ("accuracy", "pretrained", "context", "shared"),
    "longer-pretraining": ("accuracy", "pretrained", "generated", "shared"),
    "longer-initialization": ("tuned_loss", "pretrained", "shared", "random"),
    "longer-initialization-random": ("tuned_loss", "pretrained", "random", "shared"),
}
SIDES = ("method", "baseline", "control")
ROLES |= {
    id: dict(zip(SIDES, (OF_KIND[kind] for kind in kinds))) for id, (_, *kinds) in MEASURED.items()
}


def of_run(key: str, run: dict) -> float:
    """A result of a run, or not a number where it has none."""
    return run.get(key, float("nan"))


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    every, found = matching(runs, kind="all"), {}
    for id, of in ROLES.items():
        if id in MEASURED:  # not every kind is tuned afterwards
            get = partial(of_run, MEASURED[id][0])
            found[id] = paired(runs, of["method"], of["baseline"], get)
        else:
            found[id] = [Pair(run["seed"], run[of["method"]], run[of["baseline"]]) for run in every]
    return found
