"""The study of the guide (2024): which strategy pays at which number of labels.

MiniLM tells kind sentences on films from harsh ones. Its lower five blocks stay, their states are
computed once, and all strategies change the upper block alone. A seed is a draw of labelled
sentences, their order, and the start of what trains; all seeds judge on the same test sentences.
Full fine-tuning and LoRA train block and head for as many steps of as many sentences. Two pieces of
advice are judged on other texts: French reviews, with English film sentences beside them or not;
and four newsgroups, by a small decoder that has read texts without labels first or not.

Rates were chosen by the per cent right on sentences of the validation split, with other seeds and
as many tries for full fine-tuning as for LoRA: five with few labels (four seeds; contrastive
tuning had as many), four with some (two seeds) and with many (one). With few labels neighboring
rates differ by less than seeds do, and contrastive tuning is best where it trains least. What adds
something to full fine-tuning takes its rate; epsilon and the threshold of pseudo-labels are not
tuned. French alone and with English had four rates each on two seeds, the decoder with and without
its reading five; the best of each lies inside. Three rates of the reading itself were tried by hand
on one seed. The decoder's last token's state was no use with so few labels, so it is read by the
mean.

Tried and dropped: sixty steps of sixteen for all counts above few, which used not half of the
sentences where there are many, and left both ways behind the linear head.

Added when all this was known: other numbers of labels, and three more tasks, licences by category,
messages by newsgroup and French reviews, each with rates of its own for full fine-tuning, LoRA and
contrastive tuning where they were judged, or at the nearest number of labels; what there are few
and many of goes by all labels, not by those a class.

Smaller than the specification has it, for time: one block, also of contrastive tuning, short texts,
five to sixteen seeds, one encoder, and of nine strategies at seven numbers of labels on four tasks
those that the lab's map shows. MiniLM read English alone, and knows little of French. The draw of
uncertain texts is made by a linear head that is fitted anew in each round, not by a tuned model.
Not judged: draws by k-center and texts with words deleted or swapped, which are functions beside
the others, and starts from other tasks, which are lab 708's subject.
"""

from __future__ import annotations

import copy
import random
from functools import lru_cache

import torch
from torch import Tensor

from lablib.compression.recover import recover
from lablib.data.tasks import Example, Splits, few_shot, load_task, task
from lablib.evidence import Pair, grid
from lablib.evidence.studies import against
from lablib.models import pretrained
from lablib.models.classifier import Classifier, Encoded, cached_below, encode, encoder, predicted
from lablib.models.scores import scored
from lablib.peft import limited_data as guide
from lablib.peft.limited_data import Few, Training
from lablib.peft.tuning import backbone_above, tune

BELOW = 5  # MiniLM's blocks that stay as they are
WORDS = 24  # tokens of a sentence, at most
LONG_WORDS = 64  # of a review, a licence, or a message
TEST = 500  # sentences to judge on
POOL = 2600  # sentences that are drawn from
UNLABELLED = 300  # for pseudo-labels
CANDIDATES, START, LABELS = 400, 32, 128  # for draws of what to label
COUNTS = (8, 16, 64, 256, 1000)  # labels a class at which full fine-tuning and LoRA are compared
NUMBERS = (4, 8, 16, 32, 64, 256, 1000)  # labels a class at which anything was measured
UP_TO = {"few": 64, "some": 256, "many": 1000}  # labels a class that share rates and steps
STEPS = {"few": 40, "some": 60, "many": 120}
BATCH = {"few": 8, "some": 16, "many": 32}
EPSILON = 2.0
TOPICS = ("rec.autos", "rec.sport.hockey", "sci.space", "talk.politics.mideast")
READ_STEPS, READ_BATCH, READ_RATE = 60, 16, 1e-3  # continued pretraining
ENGLISH = 128  # English sentences a class beside French ones
WAYS = {"full": "standard", "efficient": "efficient", "contrastive": "contrastive"}
TEXTS = {"licences": "licences", "topics": "newsgroups", "reviews": "reviews-fr"}  # other tasks
TUNED = {
    "full": {"few": 3e-4, "some": 1e-3, "many": 1e-3},
    "efficient": {"few": 1e-3, "some": 1e-2, "many": 3e-3},
    "contrastive": {"few": 3e-5},
    "decoder": {"few": 1e-3},
    "decoder-text": {"few": 1e-3},
}
AS_FULL = "adversarial pseudo uncertain random french french-english"
LIKE = dict.fromkeys(AS_FULL.split(), "full")  # whose rate a way takes


def run(
    ways: str,
    seed: int,
    seeds: int = 1,
    rate: float | None = None,
    epsilon: float = EPSILON,
    steps: int | None = None,
    test: int = TEST,
) -> dict:
    """Strategies, each trained anew and judged: under each one's name, per cent right, a seed.

    ways: names with labels a class, "full:16 efficient:16", and with a rate of its own where a
        third part says so. "full", "efficient" (LoRA), "head", "contrastive", "adversarial",
        "pseudo"; "uncertain" and "random" draws of labels; "decoder", a small language model on
        newsgroups, and "decoder-text", the same after reading the task's text; "french" reviews,
        and "french-english", film sentences beside them. "licences.full" and so on: "full",
        "efficient", "head" or "contrastive" on the texts of a task of TEXTS in place of movies.
    seed, seeds: the first one, and how many. rate, steps: None are those of each way and size.
    nll: mean over all of them, nats. points: the mean of the first way. lead:n: full tuning's
    points above LoRA's.
    """
    told, losses = {}, []
    for number in range(seed, seed + seeds):
        for name in ways.split():
            way, n, *own = name.split(":")
            own_rate = float(own[0]) if own else rate
            made = one(way, int(n), number, own_rate, epsilon, steps, test)
            losses.append(made.pop("nll"))
            told.setdefault(name, []).append(made.pop("points"))
            for key, value in made.items():
                told.setdefault(f"{key}:{n}", []).append(value)
    for n in COUNTS:
        if f"full:{n}" in told and f"efficient:{n}" in told:
            both = zip(told[f"full:{n}"], told[f"efficient:{n}"], strict=True)
            told[f"lead:{n}"] = [round(full - thin, 3) for full, thin in both]
    first = told[ways.split()[0]]
    summary = {"points": sum(first) / len(first), "nll": round(sum(losses) / len(losses), 6)}
    return summary | told


def one(
    way: str,
    n: int,
    seed: int,
    rate: float | None,
    epsilon: float,
    steps: int | None,
    test: int,
) -> dict:
    """One strategy. points: per cent right; nll: nats."""
    task, _, plain = way.rpartition(".")
    size = size_of(n * labels_of(task) // 2)
    steps = STEPS[size] if steps is None else steps
    rate = rate_of(way, size) if rate is None else rate
    training = Training(steps, rate, BATCH[size], seed)
    torch.manual_seed(seed)
    if task:
        return on_texts(task, plain, n, training, test)
    if way.startswith("decoder"):
        return on_topics(way, n, training, test)
    if way.startswith("french"):
        return on_french(way, n, training, test)
    return on_movies(way, n, training, test, epsilon)


def on_movies(way: str, n: int, training: Training, test: int, epsilon: float) -> dict:
    """A strategy on sentences about films."""
    seed, told = training.seed, {}
    classifier, pool = fresh(), movies().train[:POOL]
    few = labelled(few_shot(pool, n, seed))
    if way == "head":
        guide.linear_head(classifier, few)
    elif way == "adversarial":
        guide.adversarial(classifier, few, training, epsilon)
    elif way == "pseudo":
        others = random.Random(seed).sample(rest(pool, few_shot(pool, n, seed)), UNLABELLED)
        there = labelled(others)
        places, labels = guide.pseudo_labelled(classifier, few, there.encoded, training)
        right = (labels == there.labels[places]).float().mean() if len(places) else torch.zeros(())
        told = {"believed": len(places), "right": round(100 * right.item(), 2)}
    elif way in ("uncertain", "random"):
        candidates = labelled(random.Random(seed).sample(pool, CANDIDATES))
        chosen = list(range(LABELS))
        if way == "uncertain":
            chosen = guide.draw_uncertain(classifier, candidates, chosen[:START], LABELS)
            classifier = fresh()
        guide.standard(classifier, candidates.at(torch.tensor(chosen)), training)
    else:
        getattr(guide, WAYS[way])(classifier, few, training)
    return judged(classifier, labelled(judging(movies(), seed, test))) | told


def on_texts(task: str, way: str, n: int, training: Training, test: int) -> dict:
    """A strategy on longer texts: licences by category, messages by newsgroup, French reviews."""
    splits, classifier = load_task(TEXTS[task]), fresh(labels_of(task))
    few = labelled(few_shot(splits.train, n, training.seed), LONG_WORDS)
    if way == "head":
        guide.linear_head(classifier, few)
    else:
        getattr(guide, WAYS[way])(classifier, few, training)
    return judged(classifier, labelled(judging(splits, training.seed, test), LONG_WORDS))


def labels_of(name: str) -> int:
    """How many labels a task of TEXTS has; the others count as two."""
    return len(task(TEXTS[name]).labels) if name else 2


def on_french(way: str, n: int, training: Training, test: int) -> dict:
    """French book reviews, few of them; English film sentences beside them or not."""
    reviews = load_task("reviews-fr")
    few = labelled(few_shot(reviews.train, n, training.seed), LONG_WORDS)
    if way == "french-english":
        few = few.and_(labelled(few_shot(movies().train[:POOL], ENGLISH, training.seed)))
    classifier = fresh()
    guide.standard(classifier, few, training)
    return judged(classifier, labelled(judging(reviews, training.seed, test), LONG_WORDS))


def on_topics(way: str, n: int, training: Training, test: int) -> dict:
    """`tiny-1m` tells four newsgroups apart, after reading them without labels or not."""
    model, tokenizer = pretrained("tiny-1m")
    train, held_out = topics(training.seed, test)
    if way == "decoder-text":
        read_on_(model, tokenizer, train, training)
    classifier = Classifier(model, len(TOPICS), "mean")
    texts = few_shot(train, n, training.seed)
    few = Few(*read(tokenizer, texts))
    names, shared = backbone_above(classifier), {"batch": training.batch, "seed": training.seed}
    tune(classifier, *few, training.steps, training.rate, trainable=names, **shared)
    return judged(classifier, Few(*read(tokenizer, held_out)))


def read_on_(model, tokenizer, texts: list[Example], training: Training) -> None:
    """Continue pretraining on the task's texts, as many steps as READ_STEPS at most."""
    chosen = random.Random(training.seed).sample(texts, min(len(texts), 800))
    tokens = [token for e in chosen for token in tokenizer(e.text[:2000])["input_ids"]]
    rows = torch.tensor(tokens[: len(tokens) // 65 * 65]).view(-1, 65)
    steps = READ_STEPS if training.steps > 5 else training.steps
    recover(model, rows, steps, READ_RATE, batch=READ_BATCH, seed=training.seed)


@lru_cache(1)
def newsgroups():
    """The four newsgroups: texts to learn from, to tune on and to judge on, labels 0 to 3."""
    places = {task("newsgroups").labels.index(name): i for i, name in enumerate(TOPICS)}
    return [
        [Example(e.text, places[e.label]) for e in split if e.label in places]
        for split in load_task("newsgroups")
    ]


def topics(seed: int, test: int) -> tuple[list[Example], list[Example]]:
    """Texts to learn from, and to judge on."""
    train, validation, held_out = newsgroups()
    return train, (validation if seed >= 100 else held_out)[:test]


def read(tokenizer, texts: list[Example]) -> tuple[Encoded, Tensor]:
    """A decoder's tokens of each text, 64 at most, and labels."""
    rows = [tokenizer(e.text[:800])["input_ids"][:64] for e in texts]
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    tokens = torch.zeros_like(mask, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = True
    return Encoded(tokens, mask), torch.tensor([e.label for e in texts])


def judged(classifier: Classifier, test: Few) -> dict:
    """Per cent right, and nats."""
    made = scored(predicted(classifier, test.encoded), test.labels)
    return {"points": round(100 * made["accuracy"], 3), "nll": round(made["nll"], 5)}


def judging(splits: Splits, seed: int, test: int) -> list[Example]:
    """Test texts; those of validation on tuning seeds. By length, for speed."""
    texts = splits.validation if seed >= 100 else splits.test
    return sorted(texts[:test], key=lambda e: len(e.text))


def rest(pool: list[Example], chosen: list[Example]) -> list[Example]:
    """What is left of the pool."""
    gone = {example.text for example in chosen}
    return [example for example in pool if example.text not in gone]


@lru_cache(1)
def movies():
    """Sentences about films."""
    return load_task("movies")


@lru_cache(1)
def mini():
    """MiniLM and its tokenizer."""
    return encoder()


def fresh(n_labels: int = 2) -> Classifier:
    """MiniLM anew, with a head that knows nothing."""
    return Classifier(copy.deepcopy(mini()[0]), n_labels, below=BELOW)


@lru_cache(1)
def kept() -> dict[str, Tensor]:
    """Text -> its states after the lower blocks, (length, dim), of all texts met so far."""
    return {}


def labelled(examples: list[Example], words: int = WORDS) -> Few:
    """Texts as the lower blocks leave them, each computed once in a process, and labels."""
    (model, tokenizer), known = mini(), kept()
    new = sorted({e.text for e in examples if e.text not in known}, key=len)
    for start in range(0, len(new), 64):
        part = new[start : start + 64]
        made = cached_below(model, encode(tokenizer, part, length=words), BELOW)
        known |= {t: states[mask] for t, states, mask in zip(part, *made)}
    rows = [known[e.text] for e in examples]
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return Few(Encoded(states, mask), torch.tensor([e.label for e in examples]))


def size_of(n: int) -> str:
    """Of how many labels a class: few, some or many."""
    return next(size for size, most in UP_TO.items() if n <= most)


def rate_of(way: str, size: str) -> float:
    """The rate that a way was tuned to, or takes; a head has none."""
    return TUNED.get(LIKE.get(way, way), {}).get(size, 0.0)


def three(*counts: int) -> str:
    """The ways that have a curve."""
    return " ".join(f"{way}:{n}" for n in counts for way in ("full", "efficient", "head"))


def of_all(n: int) -> str:
    """The ways beside these, with few labels."""
    return " ".join(f"{way}:{n}" for way in ("contrastive", "adversarial", "pseudo"))


OWN_RATES = {  # other tasks: labels a class -> rates, in the order of OWN
    "licences": {4: (3e-4, 1e-3, 1e-4), 16: (3e-4, 1e-3, 1e-4), 64: (3e-4, 1e-3)},
    "topics": {4: (1e-3, 1e-2, 3e-4), 16: (1e-3, 1e-2, 3e-4)},
    "reviews": {8: (1e-3, 1e-2), 64: (1e-3, 1e-2)},
}
OWN = ("full", "efficient", "contrastive")


def at_its_rate(task: str, way: str, n: int = 16) -> str:
    """A way on another task, at the rate that it was tuned to there."""
    return f"{task}.{way}:{n}:{OWN_RATES[task][n][OWN.index(way)]:g}"


def on(task: str, *counts: int) -> str:
    """The ways on another task, each at the rate that it was tuned to there."""
    told = []
    for n in counts:
        told += [at_its_rate(task, way, n) for way, _ in zip(OWN, OWN_RATES[task][n])]
        told.append(f"{task}.head:{n}")
    return " ".join(told)


TWO = "full:16 efficient:16"
FRENCH, WITH_ENGLISH = "french:32:0.001", "french-english:32:0.0003"  # at its own rate each
DECODER, AFTER_READING = "decoder:32:0.001", "decoder-text:32:0.003"
POINTS = [  # seeds 5 to 9 with 64 labels and more were added when the others were known
    *grid(ways=f"{three(8)} contrastive:8", seed=(0, 5), seeds=5),
    *grid(ways=three(16, 256, 1000), seed=range(5), seeds=1),
    *grid(ways=three(256, 1000), seed=range(5, 10), seeds=1),
    {"ways": three(64), "seed": 5, "seeds": 5},
    {"ways": f"{TWO} contrastive:16 adversarial:16 pseudo:16", "seed": 5, "seeds": 2},
    {"ways": f"{TWO} contrastive:16 adversarial:16 pseudo:16", "seed": 7, "seeds": 3},
    {"ways": TWO, "seed": 10, "seeds": 5},
    {"ways": TWO, "seed": 15, "seeds": 1},  # a cheap one to repeat
    {"ways": f"{three(64)} uncertain:64 random:64", "seed": 0, "seeds": 5},
    *grid(ways=f"{FRENCH} {WITH_ENGLISH}", seed=(0, 5), seeds=5),
    *grid(ways=f"{DECODER} {AFTER_READING}", seed=(0, 5), seeds=5),
    # Added when all the others were known: more numbers of labels, and three more tasks.
    {"ways": f"{three(4, 32)} {of_all(4)} {of_all(32)}", "seed": 0, "seeds": 5},
    {"ways": f"{of_all(64)} adversarial:8 pseudo:8", "seed": 0, "seeds": 5},
    {"ways": "contrastive:16 adversarial:256", "seed": 0, "seeds": 5},
    *({"ways": on("licences", n), "seed": 0, "seeds": 5} for n in (4, 16, 64)),
    {"ways": on("topics", 4), "seed": 0, "seeds": 5},
    {"ways": on("topics", 16), "seed": 0, "seeds": 3},
    {"ways": on("topics", 16), "seed": 3, "seeds": 2},
    {"ways": on("reviews", 8, 64), "seed": 0, "seeds": 5},
]
FULL, THIN = (1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2, 3e-2)
RATES = {
    **{f"full:{n}": FULL for n in (16, 256, 1000)},
    **{f"efficient:{n}": THIN for n in (16, 256, 1000)},
    "contrastive:16": (3e-5, 1e-4, 3e-4, 1e-3),
    **dict.fromkeys(("decoder:32", "decoder-text:32", "french:32", "french-english:32"), FULL),
}


for name, counts in {"licences": (16, 64), "topics": (4, 16), "reviews": (64,)}.items():
    for n in counts:
        RATES |= {f"{name}.full:{n}": FULL, f"{name}.efficient:{n}": THIN}
        RATES |= {f"{name}.contrastive:{n}": FULL[:3]}


def tried(*names: str) -> str:
    """These ways, each at all of its rates."""
    return " ".join(f"{name}:{rate:g}" for name in names for rate in RATES[name])


TUNING = [
    {"ways": "full:16:3e-05 efficient:16:0.0003 contrastive:16:1e-05", "seed": 100, "seeds": 4},
    {"ways": tried("full:16", "efficient:16", "contrastive:16"), "seed": 100, "seeds": 4},
    {"ways": tried("full:256", "efficient:256"), "seed": 100, "seeds": 2},
    {"ways": tried("full:1000"), "seed": 100, "seeds": 1},
    {"ways": tried("efficient:1000"), "seed": 100, "seeds": 1},
    {"ways": tried("decoder:32", "decoder-text:32"), "seed": 100, "seeds": 2},
    {"ways": "decoder:32:0.01 decoder-text:32:0.01", "seed": 100, "seeds": 2},
    {"ways": tried("french:32", "french-english:32"), "seed": 100, "seeds": 2},
    {"ways": tried("licences.full:16", "licences.efficient:16"), "seed": 100, "seeds": 2},
    {"ways": tried("licences.contrastive:16"), "seed": 100, "seeds": 2},
    {"ways": tried("licences.full:64", "licences.efficient:64"), "seed": 100, "seeds": 1},
    {"ways": tried("topics.full:4", "topics.efficient:4"), "seed": 100, "seeds": 1},
    {"ways": tried("topics.full:16", "topics.efficient:16"), "seed": 100, "seeds": 1},
    {"ways": tried("topics.contrastive:4"), "seed": 100, "seeds": 1},
    {"ways": tried("reviews.full:64", "reviews.efficient:64"), "seed": 100, "seeds": 2},
    {
        "ways": "licences.full:16:3e-05 licences.efficient:16:0.0003 licences.contrastive:16:3e-05",
        "seed": 100,
        "seeds": 2,
    },
    {"ways": "licences.full:64:3e-05 licences.efficient:64:0.0003", "seed": 100, "seeds": 1},
]
CANARY = {
    "ways": "full:4 efficient:4 contrastive:4 adversarial:4 head:4 decoder-text:4",
    "seed": 200,
    "rate": 1e-5,
    "steps": 1,
    "test": 8,
}


PLAIN = "efficient:16"  # LoRA, without an adversary, and without guesses
MAPPED = ("head", "contrastive", "efficient", "full", "adversarial", "pseudo", "uncertain")
ROLES = {
    # A linear head alone is stored for a few of these seeds, not for all.
    "efficient-when-few": against("efficient:16", "full:16", None),
    # Nothing that lacks many labels is stored but the baseline.
    "full-when-many": against("lead:1000", "lead:16", None),
    "contrastive": against("contrastive:8", "full:8", "head:8"),
    "contrastive-head": against("contrastive:8", "head:8", "full:8"),
    "adversarial": against("adversarial:16", "full:16", PLAIN),
    "pseudo-labels": against("pseudo:16", "full:16", PLAIN),
    "active": against("uncertain:64", "random:64", "full:64"),  # as many labels, another draw
    "efficient-licences": against(
        at_its_rate("licences", "efficient"), at_its_rate("licences", "full"), "licences.head:16"
    ),
    "contrastive-licences": against(
        at_its_rate("licences", "contrastive"), at_its_rate("licences", "full"), "licences.head:16"
    ),
    "contrastive-topics": against(
        at_its_rate("topics", "contrastive"), at_its_rate("topics", "full"), None
    ),
    # Reading as much of another text would be the control, and is not stored.
    "task-text": against(AFTER_READING, DECODER, None),
    # English sentences without the French ones would be the control, and are not stored.
    "cross-lingual": against(WITH_ENGLISH, FRENCH, None),
}


def values(runs: list) -> dict:
    """One pair a seed: points of method and baseline; of full-when-many, full tuning's lead over
    LoRA with many labels and with few."""
    return {id: pairs_of(runs, of["method"], of["baseline"]) for id, of in ROLES.items()}


def pairs_of(runs: list, ours: str, theirs: str) -> list[Pair]:
    """Two results of each seed that has both."""
    first, second = by_seed(runs, ours), by_seed(runs, theirs)
    return [Pair(seed, first[seed], second[seed]) for seed in first if seed in second]


def at(runs: list, way: str, n: int) -> dict[int, float]:
    """A way's result with n labels a class of every seed that has it, at whichever rate it took."""
    name = f"{way}:{n}"
    found = (key for run in runs for key in run if key == name or key.startswith(f"{name}:"))
    return by_seed(runs, next(found, name))


def curves(runs: list, task: str = "") -> dict[str, dict[int, float]]:
    """Strategy -> labels a class -> % right. task: "" for film sentences, or as in "licences.".

    Each is full fine-tuning's mean plus the mean difference from it in the draws that both saw.
    """
    plain = {n: seeds for n in NUMBERS if (seeds := at(runs, f"{task}full", n))}
    found: dict[str, dict[int, float]] = {}
    for way, row in zip(MAPPED, guide.GUIDE[1 : 1 + len(MAPPED)], strict=True):
        for n, theirs in plain.items():
            ours = at(runs, task + way, n)
            if both := ours.keys() & theirs.keys():
                more = [ours[seed] - theirs[seed] for seed in both]
                mean = sum(theirs.values()) / len(theirs)
                found.setdefault(row.name, {})[n] = mean + sum(more) / len(more)
    return found


def by_seed(runs: list, key: str) -> dict[int, float]:
    """A result of every seed that has it."""
    return {
        run["seed"] + place: value for run in runs for place, value in enumerate(run.get(key, []))
    }
