"""The study of a critical review (2023): its eleven methods and full tuning, on three tasks.

MiniLM tells kind sentences about movies from harsh ones. Its lower four blocks stay as they are and
are computed once; every method changes the upper two, full tuning trains all of them, and a new
layer reads their mean. A prompt stands before the states that the fifth block reads, since that is
where all other methods begin, too. A seed is a draw of sentences to learn from, once each, and of
others to judge on, and the start of what trains. "head" trains the new layer alone.

Rates were tuned on one other seed and on other sentences, by the loss, four tries each, and one
more where the best was at the edge of a grid. Child tuning moves the base's own weights, so it has
full tuning's grid. Prototypes and masks of ProPELT have a rate each in their paper, one for both
here. AdaLoRA's budget falls from 12 to 8. After trainings as short as those that rates were tuned
on, the new layer alone was as good as full tuning, so that nothing could be compared: judged are
longer trainings on longer sentences, at the same rates. For the same reason a method isn't called
comparable that is no better than the new layer alone.

What a training step of larger decoders would hold is counted, not trained; a seed draws the batch,
which is the same for all sizes. "memory" counts MiniLM's own step, without training, too: the first
account was of each seed's shortest sentences, too short to tell of anything, and was counted anew.
A copy of the originals that lablib keeps beside child tuning's numbers is no part of the method. It
counted in the verdict at first, and was left out when that was known; the verdict is the same.

The second task, pairs, was added when all this was known: STS-B, how alike two sentences are, in
trainings as long as the others, with rates of its own from as many tries and three methods of its
own. There every method but the one that is best is far behind full tuning, and a new layer alone
still farther. The third, topics, came last, in the same way: to which of twenty newsgroups did a
message go, by its first words? Smaller than the specification has it, for time: one depth of two at
which states are computed once, batches of eight, one seed to tune on, five to judge on. The three
methods of "comparable" are those that did best on the tuning seed; the one of them that is worst on
average is what is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from lablib.data.tasks import load_task
from lablib.evidence import Pair, grid, matching
from lablib.evidence.studies import against
from lablib.models.classifier import Classifier, Encoded, cached_below, encode, encoder, predicted
from lablib.models.scores import scored
from lablib.peft import catalogue, peft_review
from lablib.peft.adapter import trainable
from lablib.peft.lora_variants import RankBudget, orthogonality
from lablib.peft.measure import account
from lablib.peft.tuning import backbone_above, task_loss, tune

BELOW = 4  # MiniLM's blocks that stay as they are
STEPS, BATCH = 100, 8
SENTENCES = 800  # to learn from, each of them once
JUDGED = 1000  # to judge on
WORDS = 24  # tokens of a sentence, at most
PROMPT = 20  # rows
PROBES = 8  # batches that child tuning looks at
BUDGET = 8  # AdaLoRA's mean rank at the end
MARGIN = 1.0  # points of accuracy that count as none
PAIRS, PAIR_WORDS = "sts-b", 44  # a second task, how alike two sentences are; tokens of both
TOPICS, TOPIC_WORDS = "newsgroups", 48  # a third, which of twenty groups a message is of
LABELS = {PAIRS: 1, TOPICS: 20}  # two elsewhere


def run(
    method: str,
    seed: int,
    rate: float | None = None,
    steps: int = STEPS,
    sentences: int = SENTENCES,
    words: int = WORDS,
    attempt: int | None = None,
    task: str = "movies",
) -> dict:
    """One training, or all of them on the same sentences, and what larger models would hold.

    method: one of the review's eleven, "full", "head", or "all" of them; "memory" trains none, but
        tells what each of them holds in a step on sentences of middling length. rate: None is the
        one that the method was tuned to. sentences: to learn from. words: tokens of a sentence, at
        most. Seeds from 100 on are judged on the task's validation sentences, others on its test
        sentences. attempt: of "all", which of each method's rates; methods that have no such rate
        are left out. task: "movies", or PAIRS, for which words are PAIR_WORDS, or TOPICS, for which
        they are TOPIC_WORDS.
    accuracy: %; of PAIRS, Spearman's correlation in %. nll: nats; of PAIRS, the mean square of what
        runs from -1/2 to 1/2. curve: mean training loss of ten parts. learning: numbers that ask
        for gradients, without the new layer; kept: those to store, in float32. held: megabytes of a
        training step by account, and gradients, optimizer, saved of it; what no block reads is left
        out. Except for "memory", that step is the first batch's, of the shortest sentences.
        step_seconds: mean. Of "all", the same as "LoRA accuracy" and so on, and `shapes`.
    """
    if method == "memory":
        return memory(seed, words, sentences)
    if method != "all":
        return trained(method, seed, rate, steps, sentences, words, task)
    told = shapes(seed) if attempt is None and task == "movies" else {}
    for name in NAMES:
        rates = [rate] if attempt is None else GRIDS[name][attempt : attempt + 1]
        for each in rates:
            row = trained(name, seed, each, steps, sentences, words, task)
            told |= {f"{name} {key}": value for key, value in row.items()}
    return told


def trained(
    method: str,
    seed: int,
    rate: float | None,
    steps: int,
    sentences: int,
    words: int,
    task: str = "movies",
) -> dict:
    """One training."""
    train, labels, test, truth = sentences_of(seed, sentences, words, task)
    torch.manual_seed(seed)
    classifier = Classifier(catalogue.upper(mini()[0], BELOW), LABELS.get(task, 2))
    put_(classifier, method, train, labels)
    names = learning(classifier, method)
    told = holding(classifier, names, train, labels) | counts(classifier, method, names)
    tuned = {PAIRS: TUNED_ON_PAIRS, TOPICS: TUNED_ON_TOPICS}.get(task, TUNED)
    rate = tuned[method] if rate is None else rate
    options, finish = schedule(classifier, method, steps)
    start = perf_counter()
    options |= {"batch": BATCH, "seed": seed, "trainable": names}
    losses = tune(classifier, train, labels, steps, rate, **options)
    finish()
    told["step_seconds"] = (perf_counter() - start) / steps
    told |= scores_of(predicted(classifier, test), truth)
    parts = np.array_split(losses, min(10, steps))
    return told | {"curve": [round(float(part.mean()), 4) for part in parts]}


def scores_of(made: Tensor, truth: Tensor) -> dict[str, float]:
    """accuracy and nll, of classes or of numbers."""
    scores = scored(made, truth)
    if truth.is_floating_point():
        error = task_loss(made, truth).item()
        return {"accuracy": round(100 * scores["spearman"], 4), "nll": round(error, 6)}
    return {"accuracy": 100 * scores["accuracy"], "nll": round(scores["nll"], 6)}


def put_(classifier: Classifier, method: str, train: Encoded, labels: Tensor) -> None:
    """Put a method into the classifier's blocks, in place."""
    if method in ("full", "head"):
        return
    if method == "prompt":
        peft_review.state_prompt_(classifier.model, PROMPT, train.inputs[train.mask])
        return
    places = torch.arange(min(PROBES * BATCH, len(labels))).split(BATCH)

    def loss(model, where: Tensor) -> Tensor:
        return task_loss(classifier(train.at(where)), labels[where])

    classifier.eval()
    catalogue.put_(classifier.model, method, catalogue.Probe(places, loss))


def learning(classifier: Classifier, method: str) -> list[str]:
    """Names of the parameters that train."""
    if method == "full":
        return backbone_above(classifier)
    heads = [n for n, _ in classifier.named_parameters() if n.startswith("head.")]
    return [*trainable(classifier), *heads]


def holding(
    classifier: Classifier, names: list[str], train: Encoded, labels: Tensor, batch: int = BATCH
) -> dict:
    """Megabytes of one training step."""
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(name in names)
    where = torch.arange(min(batch, len(labels)))
    classifier.train()
    row = account(classifier, lambda c: task_loss(c(train.at(where)), labels[where]))
    unread = ("model.embeddings.", "model.pooler.")
    idle = [p for n, p in classifier.named_parameters() if n.startswith(unread)]
    row["held"] = row["total"] - sum(p.numel() * p.element_size() for p in idle)
    return {k: round(row[k] / 1e6, 4) for k in ("held", "gradients", "optimizer", "saved")}


def memory(seed: int, words: int, sentences: int) -> dict[str, float]:
    """What a step of each method holds; the seed draws how many sentences, of middling length."""
    train, labels, _, _ = sentences_of(seed, sentences, words)
    batch = int(np.random.default_rng(seed).integers(4, 17))
    middle = torch.arange(len(labels))[(len(labels) - batch) // 2 :][:batch]
    told = {"batch": batch}
    for name in NAMES:
        torch.manual_seed(seed)
        classifier = Classifier(catalogue.upper(mini()[0], BELOW), 2)
        put_(classifier, name, train, labels)
        names = learning(classifier, name)
        row = holding(classifier, names, train.at(middle), labels[middle], batch)
        told |= {f"{name} {key}": value for key, value in row.items()}
    return told


def counts(classifier: Classifier, method: str, names: list[str]) -> dict[str, float]:
    """Numbers that ask for gradients and numbers to keep, both without the new layer."""
    if method in ("full", "head"):
        wanted = set(names)
        n = sum(p.numel() for m, p in classifier.named_parameters() if m in wanted)
        n -= sum(p.numel() for p in classifier.head.parameters())
        return {"learning": n, "kept": n}
    row = peft_review.counted(classifier.model)
    return {"learning": row["asks"], "kept": row["kept_bits"] / 32}


def schedule(classifier: Classifier, method: str, steps: int) -> tuple[dict, Callable[[], None]]:
    """What a method does beside descending: options of `tune`, and what to do at its end."""
    if method != "AdaLoRA":
        return {}, lambda: None
    budget = RankBudget(classifier.model, BUDGET, steps, warmup=steps // 10, final=steps // 3)

    def penalty(step: int) -> Tensor:
        budget.step()  # gradients are there, the update is to come
        return 0.1 * orthogonality(classifier.model)

    return {"penalty": penalty}, budget.step


@lru_cache(maxsize=1)
def mini():
    """MiniLM and its tokenizer."""
    return encoder()


@lru_cache(maxsize=1)
def sentences_of(
    seed: int, count: int, words: int, task: str = "movies"
) -> tuple[Encoded, Tensor, Encoded, Tensor]:
    """A seed's sentences to learn from and to judge on, as MiniLM's lower blocks leave them."""
    model, tokenizer = mini()
    train, validation, test = load_task(task)
    draw, made = np.random.default_rng(seed), []
    judged = min(JUDGED, 4 * count)
    for examples, n in ((train, count), (validation if seed >= 100 else test, judged)):
        chosen = [examples[i] for i in draw.choice(len(examples), n, replace=False)]
        chosen.sort(key=lambda one: len(one.text) + len(one.pair))  # of a length together
        texts, pairs = ([getattr(one, side) for one in chosen] for side in ("text", "pair"))
        encoded = encode(tokenizer, texts, pairs, words)
        labels = torch.tensor([example.label for example in chosen])
        made += [cached_below(model, encoded, BELOW)]
        made += [labels / 5 - 0.5 if task == PAIRS else labels]
    return tuple(made)


def shapes(seed: int) -> dict[str, float]:
    """Gigabytes of a training step of three sizes, for a batch that the seed draws."""
    draw = np.random.default_rng(seed)
    batch, length = int(draw.integers(1, 9)), int(draw.integers(32, 257))
    told = {"batch": batch, "length": length}
    for size, config in peft_review.SIZES.items():
        ways = peft_review.WAYS if size == LARGE else ("full", "LoRA")
        held = {w: peft_review.training(config, w, batch, length)["total"] / 1e9 for w in ways}
        told |= {f"{size} {way}": round(gb, 6) for way, gb in held.items()}
        told[f"{size} saved"] = 1 - held["LoRA"] / held["full"]
    return told


ADDED = (1e-3, 5e-3, 2e-2, 1e-1)
OWN = (1e-4, 3e-4, 1e-3, 3e-3)
NAMES = ("full", *peft_review.ELEVEN, "head")
GRIDS = dict.fromkeys(NAMES, ADDED) | {"full": OWN, "child tuning": (*OWN, 1e-2)}
TUNED = {
    "full": 1e-3,
    "serial adapter": 5e-3,
    "prompt": 2e-2,
    "prefix": 2e-2,
    "(IA)3": 2e-2,
    "BitFit": 5e-3,
    "child tuning": 3e-3,
    "LoRA": 5e-3,
    "AdaLoRA": 2e-2,
    "MAM": 5e-3,
    "ProPELT adapter": 5e-3,
    "ProPELT LoRA": 5e-3,
    "head": 2e-2,
}
TUNED_ON_PAIRS = TUNED | {
    "prompt": 5e-3,
    "prefix": 5e-3,
    "(IA)3": 1e-1,
    "child tuning": 1e-3,
    "ProPELT adapter": 2e-2,
    "head": 1e-3,
}
TUNED_ON_TOPICS = TUNED | {
    "serial adapter": 2e-2,
    "BitFit": 2e-2,
    "MAM": 2e-2,
    "ProPELT adapter": 2e-2,
    "ProPELT LoRA": 2e-2,
}
THREE_ON_TOPICS = ("ProPELT adapter", "AdaLoRA", "(IA)3")
THREE_ON_PAIRS = ("LoRA", "ProPELT LoRA", "serial adapter")
THREE = ("LoRA", "ProPELT adapter", "(IA)3")  # of the lowest loss on the tuning seed
LARGE = "Llama-2-7B"

SEEDS = range(5)
LONGER = {"steps": 140, "sentences": 1120, "words": 28}
POINTS = [{"method": "LoRA", "seed": 0, **LONGER}]
POINTS += [{"method": "all", "seed": seed, **LONGER} for seed in SEEDS]
POINTS += grid(method="memory", seed=SEEDS, sentences=64, words=LONGER["words"])
ON_PAIRS = {"task": PAIRS, "words": PAIR_WORDS}
POINTS += [{"method": "all", "seed": s, **LONGER, **ON_PAIRS} for s in SEEDS]
ON_TOPICS = {"task": TOPICS, "words": TOPIC_WORDS}
POINTS += [{"method": "all", "seed": s, **LONGER, **ON_TOPICS} for s in SEEDS]
TUNING = grid(method="all", seed=100, attempt=range(max(map(len, GRIDS.values()))))
TUNING += [one | ON_PAIRS for one in TUNING]
EDGE = {"(IA)3": 0.3, "head": 3e-4}  # a rate more on pairs, where the best was at the edge
TUNING += [{"method": name, "seed": 100, "rate": r, **ON_PAIRS} for name, r in EDGE.items()]
TUNING += [{"method": "all", "seed": 100, "attempt": i, **ON_TOPICS} for i in range(5)]
CANARY = {"method": "LoRA", "seed": 200, "rate": 1e-3, "steps": 2, "sentences": 16}


ROLES = {
    "comparable": against("(IA)3 accuracy", "full accuracy", "head accuracy"),
    "comparable-pairs": against("serial adapter accuracy", "full accuracy", "head accuracy"),
    "comparable-topics": against("(IA)3 accuracy", "full accuracy", "head accuracy"),
    "prompt-last": against("LoRA accuracy", "prompt accuracy", "head accuracy"),
    # Both speak of every method, or of every size: there is none that they do not credit.
    "memory": against("child tuning held", "full held"),
    "memory-scale": against(f"{LARGE} saved", "tiny-1m saved"),
    "qlora": against(f"{LARGE} QLoRA", f"{LARGE} LoRA", f"{LARGE} full"),
}


def of_task(runs: list, task: str = "movies") -> list[dict]:
    """The runs of all methods on a task."""
    return [run for run in matching(runs, method="all") if run.get("task", "movies") == task]


def values(runs: list) -> dict:
    """A pair a seed for each claim."""
    every = of_task(runs)
    found = {
        id: [pair_of(run, of["method"], of["baseline"]) for run in every]
        for id, of in ROLES.items()
    }
    found["comparable"] = worst_of_three(every)
    found["comparable-pairs"] = worst_of_three(of_task(runs, PAIRS), THREE_ON_PAIRS)
    found["comparable-topics"] = worst_of_three(of_task(runs, TOPICS), THREE_ON_TOPICS)
    found["memory"] = [hungriest(run) for run in matching(runs, method="memory")]
    found["memory-scale"] = [smaller_step(run) for run in every]
    return found


def pair_of(run: dict, method: str, baseline: str) -> Pair:
    """Two results of a seed."""
    return Pair(run["seed"], run[method], run[baseline])


def worst_of_three(runs: list, three: tuple[str, ...] = THREE) -> list[Pair]:
    """Of the three methods the worst on average; full tuning less the margin, or who does nothing.

    The rival is the one of these two that is better on average, so that being as good as a new
    layer alone is not enough.
    """
    found = {n: np.array([run[f"{n} accuracy"] for run in runs]) for n in (*three, "full", "head")}
    worst = min((found[name] for name in three), key=np.mean)
    rival = max((found["full"] - MARGIN, found["head"]), key=np.mean)
    return [
        Pair(run["seed"], float(a), float(b)) for run, a, b in zip(runs, worst, rival, strict=True)
    ]


def hungriest(run: dict) -> Pair:
    """What the one of the eleven that holds most holds, and full tuning.

    Without the originals that lablib keeps beside child tuning's numbers, to put them back: they
    take as much as the gradients of the same numbers.
    """
    held = {name: run[f"{name} held"] for name in peft_review.ELEVEN}
    held["child tuning"] -= run["child tuning gradients"] - run["head gradients"]
    return Pair(run["seed"], max(held.values()), run["full held"])


def smaller_step(run: dict) -> Pair:
    """LoRA's saved share at two neighboring sizes, where it grows least."""
    shares = [run[f"{size} saved"] for size in peft_review.SIZES]
    small, large = min(pairwise(shares), key=lambda pair: pair[1] - pair[0])
    return Pair(run["seed"], large, small)
