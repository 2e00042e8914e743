"""The study of FineGates (2024): MiniLM's upper blocks learn film reviews by losing weights.

MiniLM's lower four blocks are frozen and computed once for all ways; gates, LoRA or full training
are on the upper two, twelve matrices in all. A seed draws the sentences to learn from, the head's
start, the gates and the order of batches; all seeds are judged on the same unseen sentences.

Gates are `fine`. Rivals of the same shape take, seed by seed and matrix by matrix, as many rows
and columns as the gates of `low` left open: `magnitude` those with the largest norms, `random` any,
`chosen` the very ones that the gates left, without their scaling; then only a head is trained, on
features computed once. `head` is the untouched encoder below a trained head, `bare` the same head
on what block four gives, with no upper block at all: it was added when the others were known, and
comes so near to the gates that this task asks little of the upper blocks.

Every way has two rates: one of the head, one of what is in the blocks (gates, LoRA's matrices or
the weights themselves). Gates and LoRA had seven pairs of rates each on two tuning seeds, so had
gates, LoRA and full training from few sentences on one; heads alone, which have one rate, had five,
and those on smaller shapes take the one that was best on the whole encoder. Taken was the best
accuracy, of gates among rates at which about a fifth of the weights went, since at a smaller one
hardly any did. Each lies inside its grid, except a head from few sentences: pilots found the
smallest rate that they tried the best for it. The paper's rate would need some 1,500 steps to bring
a gate from its start to zero.

`weighed` is an option of the authors' code: the penalty counts open gates alone, and those of rows
and columns less whose connections have heavy tails (kurtosis). It takes the rates of `low`, its own
were not tuned, and no claim is judged on it. `ranked` is another, low-rank parts beside the gates;
they train at the head's rate, seven pairs were tried on one seed, and at a faster head's none
learns.

Added when all this was known: a second task, pairs of sentences and how alike they are, with rates
of its own, tuned alike; targets of nothing to close, and of what removes some 40 %; LoRA from few
sentences; a second tuning seed, on which the rates stayed the same. `speed` is judged at that 40 %,
where it was judged on `high` at first, which removes more and is `speed-large` now. On pairs the
gates' rate is that at which nearest to a fifth of the weights went on the tuning seeds, some 15 %;
at rates that remove more, they do worse. There, too, little is asked of the upper blocks: a head on
none of them is far ahead of one on the whole.

Last, and again when all else was known: a hundred pairs, with seven pairs of rates for gates, full
training and LoRA on one seed, and targets of 0 and 40 % from few sentences and pairs. No rate of
those closed about a fifth there, some 6 % or 40 %; taken was the best of the former.

An earlier design had one rate for gates and head, a handicap for gates; it was judged on other
seeds than these, and no claim about accuracy reproduced there. Cut for time: gates on all blocks;
longer training; a sixth judging seed. A run makes several kinds of a seed, since they share what is
computed once.
"""

import copy
import random
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn

from lablib.compression.recover import cross_entropy, recover
from lablib.data.tasks import load_task
from lablib.evidence import Pair, grid
from lablib.evidence.studies import against
from lablib.models import anatomy, scores
from lablib.models.classifier import (
    Classifier,
    Encoded,
    cached_below,
    encode,
    encoder,
    pooling,
    predicted,
    upper_states,
)
from lablib.peft import finegates as fg
from lablib.peft.adapter import trainable
from lablib.peft.lora import lora_
from lablib.peft.tuning import backbone_above, task_loss, tune
from lablib.resources import measure, release_memory

TASK, LENGTH, BELOW = "movies", 32, 4  # tokens a sentence at most; blocks that are frozen
STEPS, BATCH, TEST = 100, 16, 800
RANK, ALPHA, LORA_ROLES = 8, 16, ("query", "value")
SMALLER = ("chosen", "magnitude", "random")  # ways that take the shapes that gates left
GATED = {"fine": fg.penalty, "weighed": fg.weighed_penalty}  # ways with gates
UPPER = (*GATED, "lora", "full")  # ways that train in the upper blocks; others train a head alone

KINDS = {  # way, sentences to learn from, share of gates that the penalty wants closed
    "low": ("fine", 1000, 0.2),
    "magnitude": ("magnitude", 1000, 0.2),
    "random": ("random", 1000, 0.2),
    "chosen": ("chosen", 1000, 0.2),
    "head": ("head", 1000, 0.0),
    "lora": ("lora", 1000, 0.0),
    "high": ("fine", 1000, 0.4),
    "weighed": ("weighed", 1000, 0.2),
    "few": ("fine", 100, 0.2),
    "full": ("full", 100, 0.0),
    "few-head": ("head", 100, 0.0),
    "bare": ("bare", 1000, 0.0),
}
PAIRS, PAIR_LENGTH = "sts-b", 40  # a second task, how alike two sentences are; tokens of both
ON_PAIRS = {f"pairs-{kind}": KINDS[kind] for kind in KINDS if KINDS[kind][1] == 1000}
GATES = (".row", ".column")  # ends of their names
ADDED = {
    "zero": ("fine", 1000, 0.0),
    "forty": ("fine", 1000, 0.27),  # at which some 40 % of the weights go
    "few-lora": ("lora", 100, 0.0),
    "ranked": ("ranked", 1000, 0.2),  # gates, with low-rank parts in between
    "few-zero": ("fine", 100, 0.0),
    "few-forty": ("fine", 100, 0.4),
}
LATER = ("zero", "few", "full", "few-head", "few-lora", "few-zero", "few-forty")
ON_PAIRS |= {f"pairs-{kind}": (KINDS | ADDED)[kind] for kind in LATER}


def run(
    kind: str,
    seed: int,
    level: int | None = None,
    target: float | None = None,
    steps: int = STEPS,
    train: int | None = None,
    test: int = TEST,
    split: str = "test",
) -> dict:
    """A classifier of this kind, and how it does on sentences that it has not seen.

    kind: of KINDS, ON_PAIRS or ADDED. Several, with spaces between, share what is computed once; in
    what comes back, each one's name stands before its keys. level: which of its RATES; None is the
    one that was tuned. target and train, where given, stand in the place of the kind's own share
    and number of sentences.
    Returns points (per cent right; of pairs, Spearman's correlation in %), judged (the same; of
    LoRA, less MARGIN), nll (nats; of pairs, the mean square of what runs from -1/2 to 1/2), train
    (of the last 20 steps) and, of gates, what `of_gates` says.
    """
    told, names = {}, kind.split()
    for name in names:
        way, n, share = (KINDS | ON_PAIRS | ADDED)[name]
        task = PAIRS if name in ON_PAIRS else TASK
        n, share = train or n, share if target is None else target
        unseen = sample(split, test, task)
        made = one(way, seed, n, share, rates_of(name, level), steps, unseen, task)
        made["judged"] = made["points"] - (MARGIN if way == "lora" else 0.0)
        told |= made if len(names) == 1 else {f"{name}_{key}": v for key, v in made.items()}
    return told


def one(
    way: str,
    seed: int,
    n: int,
    target: float,
    rates: tuple,
    steps: int,
    unseen: tuple,
    task: str = TASK,
) -> dict:
    """All that is told of one classifier but what it is judged by."""
    if way in UPPER or way == "ranked":
        classifier, losses = trained(way, seed, n, target, rates, steps, task)
    else:
        model = smaller(way, seed, n, target, steps, task)
        torch.manual_seed(seed)
        classifier = Classifier(model, outputs(task))
        losses = train_head(classifier, lesson(seed, n, task), steps, rates[1], seed)
    told = told_of(classifier, unseen) | {"train": round(sum(losses[-20:]) / len(losses[-20:]), 4)}
    if penalty_of(way):
        told |= of_gates(classifier, unseen)
    elif way in SMALLER:
        told |= {"removed": round(fg.removed(classifier.model), 4)}
    return told


def penalty_of(way: str) -> Callable | None:
    """What closes the gates of a way; None where it has none."""
    return fg.penalty if way == "ranked" else GATED.get(way)


def outputs(task: str) -> int:
    """Numbers that a head gives."""
    return 1 if task == PAIRS else 2


@lru_cache(2)
def trained(
    way: str,
    seed: int,
    n: int,
    target: float,
    rates: tuple[float, float],
    steps: int,
    task: str = TASK,
) -> tuple[Classifier, list[float]]:
    """A classifier whose upper blocks were trained, and its losses.

    rates: of what was put into the blocks, or of the blocks themselves; and of the head. Low-rank
    parts beside gates train at the head's.
    """
    encoded, labels = lesson(seed, n, task)
    torch.manual_seed(seed)
    model, closing = upper(), penalty_of(way)
    if closing:
        fg.gate_(model, rank=RANK if way == "ranked" else 0)
        if way == "weighed":
            fg.watch_(model)
    elif way == "lora":
        lora_(model, LORA_ROLES, RANK, ALPHA)
    classifier = Classifier(model, outputs(task))
    options: dict = {"batch": BATCH, "seed": seed}
    parts = trainable(model).values()
    if closing:
        parts = [part for name, part in trainable(model).items() if name.endswith(GATES)]
    if way == "full":
        options["trainable"] = backbone_above(classifier)
        parts = anatomy.blocks(model).parameters()
    if closing:
        options["penalty"] = lambda step: fg.WEIGHT * closing(model, target)
    own, of_head = rates
    options["after_step"] = lengthened(parts, own / of_head)
    return classifier, tune(classifier, encoded, labels, steps, of_head, **options)


def lengthened(parts: Iterable[Tensor], times: float) -> Callable[[int, float], None]:
    """An `after_step` of `tune` that makes these parameters' steps so many times as long.

    AdamW's step without decay is in proportion to its rate, so this gives them one of their own.
    """
    parts = list(parts)
    before = [part.detach().clone() for part in parts]

    @torch.no_grad()
    def lengthen(step: int, rate: float) -> None:
        for part, old in zip(parts, before, strict=True):
            part.copy_(old.lerp_(part, times))  # old + times * (part - old)

    return lengthen


def smaller(way: str, seed: int, n: int, target: float, steps: int, task: str = TASK) -> nn.Module:
    """The upper blocks in the shapes that this seed's gates left, or whole ones, or none."""
    if way in ("head", "bare"):
        model = upper()
        if way == "bare":
            del anatomy.blocks(model)[:]
        return model
    rates = rates_of("pairs-low" if task == PAIRS else "low")
    model = copy.deepcopy(trained("fine", seed, n, target, rates, steps, task)[0].model)
    torch.manual_seed(seed)
    if way == "chosen":
        fg.harden_(model)
    else:
        for layer in fg.layers(model).values():
            fg.shut_(layer, way, *map(len, fg.kept(layer)))
    return model


def train_head(
    classifier: Classifier, lesson: tuple[Encoded, Tensor], steps: int, rate: float, seed: int
) -> list[float]:
    """As `tune` would train it, on features that are computed once; the losses."""
    (encoded, labels), features = lesson, []
    with torch.no_grad():
        classifier.eval()
        for start in range(0, len(labels), 64):
            part = encoded.at(slice(start, start + 64))
            features.append(pooling(classifier.states(part), part.mask, "mean"))
    known = torch.cat(features)  # (n, dim)

    def loss(head: nn.Module, places: Tensor) -> Tensor:
        return task_loss(head(known[places[:, 0]]), labels[places[:, 0]])

    places = torch.arange(len(labels))[:, None]
    return recover(classifier.head, places, steps, rate, batch=BATCH, seed=seed, loss=loss)


def told_of(classifier: Classifier, unseen: tuple[Encoded, Tensor]) -> dict:
    """Points and nll."""
    encoded, labels = unseen
    made = predicted(classifier, encoded)
    if labels.is_floating_point():
        points = 100 * scores.scored(made, labels)["spearman"]
        return {"points": round(points, 3), "nll": round(task_loss(made, labels).item(), 5)}
    made = made.softmax(1)
    points, nll = 100 * scores.accuracy(made, labels), scores.nll(made, labels)
    return {"points": round(points, 3), "nll": round(nll, 5)}


def of_gates(classifier: Classifier, unseen: tuple[Encoded, Tensor]) -> dict:
    """What the gates came to, and what the matrices cut by them do.

    Shares of gated weights removed and of gates that are closed, between and open; kept (rows and
    columns left, of each matrix); hard (points with every gate that is not closed at 1); off (1
    where outputs after the cut are those before it, within 1e-3); what `seconds` says.
    """
    model = classifier.model
    told = {"removed": fg.removed(model), **fg.states(model)}
    told = {key: round(value, 4) for key, value in told.items()}
    told |= {"kept": [[*map(len, fg.kept(layer))] for layer in fg.layers(model).values()]}
    hard, cut = copy.deepcopy(classifier), copy.deepcopy(classifier)
    fg.harden_(hard.model)
    fg.compress_(cut.model)
    few = some(unseen[0])
    off = (predicted(cut, few) - predicted(classifier, few)).abs().max().item()
    told |= {"hard": told_of(hard, unseen)["points"], "off": float(off < 1e-3)}
    return told | seconds(cut, few)


def seconds(cut: Classifier, few: Encoded) -> dict:
    """Median seconds of the cut and of the whole blocks on these sentences, measured in turns."""
    whole = Classifier(upper(), cut.head.out_features)
    ways = {
        "cut_seconds": lambda: predicted(cut, few),
        "dense_seconds": lambda: predicted(whole, few),
    }
    spent = measure(ways, repeats=9)
    return {key: sorted(each)[len(each) // 2] for key, each in spent.items()}


def some(encoded: Encoded) -> Encoded:
    """At most 64 sentences, of middling length."""
    return encoded.at(slice(len(encoded.mask) // 2, len(encoded.mask) // 2 + 64))


Moment = tuple[int, float, float, list]  # steps, share right, of weights gone, gates' logits


def gated(
    target: float, known: tuple, unseen: tuple, steps: int, seed: int
) -> tuple[Classifier, list[Moment]]:
    """A classifier whose gates learn at the rates of `low`, and some seven moments of it.

    target: the share that should close. known, unseen: encoded sentences and labels, to learn from
    and to judge on. For the lab.
    """
    torch.manual_seed(seed)
    classifier, moments = Classifier(upper(), 2), []
    model = classifier.model
    model.embeddings = minilm()[0].embeddings  # read by none: one copy will do
    fg.gate_(model)
    own, of_head = rates_of("low")
    longer = lengthened(trainable(model).values(), own / of_head)

    def look(step: int, rate: float) -> None:
        longer(step, rate)
        if step % max(1, steps // 6) == 0 or step == steps - 1:
            logits = [[m.row.tolist(), m.column.tolist()] for m in fg.layers(model).values()]
            right = told_of(classifier, unseen)["points"] / 100
            moments.append((step + 1, right, fg.removed(model), logits))

    options: dict = {"batch": BATCH, "seed": seed, "after_step": look}
    options["penalty"] = lambda step: fg.WEIGHT * fg.penalty(model, target)
    tune(classifier, *known, steps, of_head, **options)
    return classifier, moments


Cut = tuple[float, float, float]  # share of weights gone, per cent right, milliseconds


def cuts_of(made: dict[int, Classifier], unseen: tuple) -> tuple[dict[int, Cut], float]:
    """What gates come to, of classifiers by target, once they are cut out.

    Milliseconds are of 64 sentences, taken in turns; also returned: those of the whole blocks. For
    the lab.
    """
    part, told, ways = unseen[0].at(slice(0, 64)), {}, {0: Classifier(upper(), 2)}
    for target, classifier in made.items():
        ways[target] = cut = copy.deepcopy(classifier)
        fg.compress_(cut.model)
        told[target] = fg.removed(classifier.model), told_of(cut, unseen)["points"]
    timed = {key: lambda one=one: predicted(one, part) for key, one in ways.items()}
    taken = {key: 1e3 * sorted(each)[3] for key, each in measure(timed, repeats=7).items()}
    return {target: (*pair, taken[target]) for target, pair in told.items()}, taken[0]


def on_licences(
    model: nn.Module, tokenizer, n: int, held_out: int, n_blocks: int
) -> tuple[Callable, Callable]:
    """Leave a decoder its last n_blocks blocks; n rows of licences to learn from, then held-out.

    Returns two functions of (model, places): the loss, nats a token, and the milliseconds of the
    blocks. Those below are computed once, and are gone from the model. For the lab.
    """
    place, parts = anatomy.embedding(model).weight.device, []
    splits = load_task("licences")
    for examples, count in ((splits.train, n), (splits.test, held_out)):
        beginnings = [tokenizer.encode(example.text[:600]) for example in examples[:count]]
        parts += [token for tokens in beginnings for token in tokens][: 33 * count]
    del splits
    release_memory()  # all other licences are gone
    rows = torch.tensor(parts, device=place).view(n + held_out, 33)
    read = Encoded(rows[:, :-1], torch.ones_like(rows[:, :-1], dtype=torch.bool))
    below = max(0, len(anatomy.blocks(model)) - n_blocks)
    known = cached_below(model, read, below, 16)
    del anatomy.blocks(model)[:below]

    def states_of(model: nn.Module, places: Tensor) -> Tensor:
        return upper_states(model, known.at(places.flatten()), 0)

    def loss_of(model: nn.Module, places: Tensor) -> Tensor:
        logits = anatomy.head(model)(states_of(model, places))
        return cross_entropy(logits, rows[places.flatten()])

    @torch.no_grad()
    def milliseconds(model: nn.Module, places: Tensor) -> float:
        taken = measure({"blocks": lambda: states_of(model, places)}, repeats=7)["blocks"]
        return 1e3 * sorted(taken)[len(taken) // 2]

    return loss_of, milliseconds


def bitmap(rows: list[float], columns: list[float], size: int = 48):
    """(size, size) products of both kinds of gates, from their logits, evenly spread ones."""
    both = (fg.gate(torch.tensor(logits)) for logits in (rows, columns))
    g_r, g_c = (gates[:: max(1, len(gates) // size)][:size] for gates in both)
    return (g_r[:, None] * g_c).numpy().round(2)


@lru_cache(1)
def minilm():
    """MiniLM and its tokenizer, as they are stored."""
    return encoder()


def upper() -> nn.Module:
    """A copy of MiniLM without the blocks that are computed once."""
    model = copy.deepcopy(minilm()[0])
    del anatomy.blocks(model)[:BELOW]
    return model


@lru_cache(2)
def lesson(seed: int, n: int, task: str = TASK) -> tuple[Encoded, Tensor]:
    """A seed's sentences to learn from."""
    return known(random.Random(seed).sample(load_task(task).train, n))


@lru_cache(1)
def sample(split: str, n: int, task: str = TASK) -> tuple[Encoded, Tensor]:
    """The first sentences of a split: they come in an order that looks random. Of pairs, any."""
    rows = getattr(load_task(task), split)
    return known(random.Random(0).sample(rows, n) if task == PAIRS else rows[:n])


def known(examples: list) -> tuple[Encoded, Tensor]:
    """Examples, the shortest first, as states after the frozen blocks, and their labels."""
    model, tokenizer = minilm()
    texts, pairs = ([getattr(one, side) for one in examples] for side in ("text", "pair"))
    encoded = encode(tokenizer, texts, pairs, PAIR_LENGTH if any(pairs) else LENGTH)
    order = encoded.mask.sum(1).argsort(stable=True)
    labels = torch.tensor([example.label for example in examples])[order]
    if labels.is_floating_point():
        labels = labels / 5 - 0.5
    return cached_below(model, Encoded(*(part[order] for part in encoded)), BELOW), labels


MARGIN = 1.0  # points of accuracy that count as none
RATES = {  # of what is in the blocks, and of the head; heads alone have one rate
    "low": (
        (0.1, 0.01),
        (0.03, 0.01),
        (0.3, 0.01),
        (0.1, 0.003),
        (0.1, 0.03),
        (0.3, 0.03),
        (0.1, 0.1),
    ),
    "lora": (
        (0.01, 0.01),
        (0.003, 0.01),
        (0.03, 0.01),
        (0.01, 0.003),
        (0.01, 0.03),
        (0.006, 0.01),
        (0.017, 0.01),
    ),
    "head": ((0.0, 0.01), (0.0, 0.003), (0.0, 0.03), (0.0, 0.001), (0.0, 0.1)),
    "few": (
        (0.1, 0.003),
        (0.03, 0.003),
        (0.3, 0.003),
        (0.1, 0.001),
        (0.1, 0.01),
        (1.0, 0.003),
        (0.3, 0.01),
    ),
    "full": (
        (3e-4, 0.003),
        (1e-4, 0.003),
        (1e-3, 0.003),
        (3e-4, 0.001),
        (3e-4, 0.01),
        (3e-3, 0.003),
        (1e-2, 0.003),
    ),
    "few-head": ((0.0, 0.003), (0.0, 0.01)),
    "weighed": ((0.1, 0.03),),
    "bare": ((0.0, 0.01), (0.0, 0.003), (0.0, 0.03), (0.0, 0.001), (0.0, 0.1)),
}
TUNED = {"weighed": 0, "low": 4, "lora": 0, "head": 0, "few": 2, "full": 5, "few-head": 0}
TUNED |= {"bare": 0}
LIKE = {"high": "low"} | dict.fromkeys(SMALLER, "head")  # share their rates
SAME = {
    "few-lora": "lora",
    "pairs-few-lora": "lora",
    "ranked": "low",
}  # added kinds that try the rates of others
TUNED_TOO = {"few-lora": 6, "pairs-few-lora": 2, "ranked": 2}
TUNED_ON_PAIRS = {"low": 4, "lora": 3, "head": 0, "bare": 0, "weighed": 0}
TUNED_ON_PAIRS |= {"few": 0, "full": 5, "few-head": 0}
AS_LOW_OR_FEW = {"zero": "low", "forty": "low", "few-zero": "few", "few-forty": "few"}


def rates_of(kind: str, level: int | None = None) -> tuple[float, float]:
    """A kind's try of this level, or the one that it was tuned to."""
    if kind in SAME:
        return RATES[SAME[kind]][TUNED_TOO[kind] if level is None else level]
    tuned = TUNED_ON_PAIRS if kind in ON_PAIRS else TUNED
    plain = kind.removeprefix("pairs-")
    like = (LIKE | AS_LOW_OR_FEW).get(plain, plain)
    return RATES[like][tuned[like] if level is None else level]


SEEDS = range(10, 15)
PARTS = ("low lora high magnitude random chosen head", "few full few-head")
POINTS = [{"kind": part, "seed": seed} for seed in SEEDS for part in (*PARTS, "weighed", "bare")]
TUNING = [
    {"kind": kind, "seed": 100, "level": level, "split": "validation", "test": 600}
    for levels, kinds in (
        (range(5), ("low", "lora", "head", "few", "full")),
        ((5, 6), ("low lora",)),
        ((5, 6), ("few full",)),
        (range(5), ("bare",)),
    )
    for kind in kinds
    for level in levels
]
SECOND = "pairs-low pairs-lora pairs-high pairs-magnitude pairs-random pairs-chosen pairs-head"
POINTS += grid(kind=(f"{SECOND} pairs-bare", "zero forty few-lora ranked"), seed=SEEDS)
AGAIN = "forty lora head"  # so that one run has what is compared
POINTS += grid(kind=AGAIN, seed=SEEDS)
TUNING += [
    {"kind": kinds, "seed": seed, "level": level, "split": "validation", "test": 600}
    for seed, levels, kinds in (
        *((seed, range(7), "pairs-low pairs-lora") for seed in (100, 101)),
        *((seed, range(5), "pairs-head pairs-bare") for seed in (100, 101)),
        *((100, range(7), kind) for kind in ("few-lora", "ranked")),
        (101, range(7), "low lora"),
        (101, range(5), "head bare"),
    )
    for level in levels
]
FEW_PAIRS = "pairs-few pairs-full pairs-few-head pairs-few-lora pairs-few-zero pairs-few-forty"
POINTS += grid(kind=(FEW_PAIRS, "pairs-zero few-zero few-forty"), seed=SEEDS)
TUNING += [
    {"kind": kind, "seed": 100, "level": level, "split": "validation", "test": 600}
    for kind, levels in {
        "pairs-few pairs-full": range(7),
        "pairs-few-lora": range(7),
        "pairs-few-head": range(2),
    }.items()
    for level in levels
]
CANARY = {"kind": "chosen", "seed": 200, "level": 1, "steps": 2, "train": 20, "test": 20}


RANDOM = "random_judged"  # the same shapes as the gates of "low" left, of any rows and columns
ROLES = {
    "free-compression": against("low_judged", "lora_judged", RANDOM),
    "pruning": against("low_judged", "magnitude_judged", RANDOM),
    "small-data": against("few_judged", "full_judged", "few-head_judged"),
    "pruning-random": against("low_judged", "random_judged", "head_judged"),
    "speed": against("forty_cut_seconds", "forty_dense_seconds", "zero_cut_seconds"),  # none closed
    "speed-large": against("high_cut_seconds", "high_dense_seconds", "low_dense_seconds"),  # whole
    "high": against("high_judged", "lora_judged", RANDOM),  # less is cut than by its own gates
    "choice": against("chosen_judged", "magnitude_judged", RANDOM),
    "forty": against("forty_judged", "lora_judged", "head_judged"),
    "free-pairs": against("pairs-low_judged", "pairs-lora_judged", "pairs-random_judged"),
    "pruning-pairs": against("pairs-low_judged", "pairs-magnitude_judged", "pairs-random_judged"),
    "small-data-pairs": against("pairs-few_judged", "pairs-full_judged", "pairs-few-head_judged"),
    "pruning-random-pairs": against("pairs-low_judged", "pairs-random_judged", "pairs-head_judged"),
}


def of_seeds(runs: list) -> dict[int, dict]:
    """Seed -> what is told of each kind, with its name before. Without what is made AGAIN."""
    seeds: dict[int, dict] = {}
    for run in runs:
        names = run["kind"] + "_" if " " not in run["kind"] else ""  # else they stand there
        if run["kind"] != AGAIN:
            seeds.setdefault(run["seed"], {}).update({names + key: v for key, v in run.items()})
    return seeds


def values(runs: list) -> dict:
    """One pair a seed: points, or seconds, of method and baseline; and the share of gates."""
    seeds = of_seeds(runs)
    again = {run["seed"]: run for run in runs if run["kind"] == AGAIN}
    share = {"share": 100 * n_gates(768, 3072, 12) / ROBERTA}
    return share | {
        id: [Pair(seed, run[role["method"]], run[role["baseline"]]) for seed, run in rows.items()]
        for id, role in ROLES.items()
        for rows in (again if id == "forty" else seeds,)
    }


ROBERTA = 124_645_632  # parameters of RoBERTa-base without a language model's head
BLOCKS = 85_054_464  # of its blocks


def n_gates(dim: int, inner: int, blocks: int) -> int:
    """Gates on the six matrices of each block."""
    return blocks * (4 * (dim + dim) + 2 * (dim + inner))


def n_lora(dim: int = 384, blocks: int = 2) -> int:
    """Numbers of the study's LoRA."""
    return blocks * len(LORA_ROLES) * RANK * 2 * dim
