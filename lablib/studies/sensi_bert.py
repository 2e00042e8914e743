"""The study of Sensi-BERT (2023): MiniLM cut to a budget in several ways, then fine-tuned alike.

A seed draws sentences of film reviews to learn from, other ones to judge on, the head's start and
the order of batches. The head learns first, on the untouched encoder, so that a sensitivity means
something; all ways of a seed start from that head, and all of them train blocks and head for as
many steps. Embeddings stay frozen. `rank` is the method; `uniform` keeps the best units of every
part in the same share; `magnitude` does that with the norms of weights in the place of
sensitivities; `depth` keeps blocks from below, a part of the one at the edge, and of those above it
one head and one neuron each, since every part keeps a unit: they are crippled, not taken out.

Each way had five rates on two tuning seeds, with 40 % of the encoder left; the best by the mean per
cent right was taken, and with 60 % a way has the same. `random` keeps any units in the same share,
at the rate of `uniform`: the control of what a choice of units brings. An earlier design had four
rates on one seed, which gave `rank` a rate one step below one that breaks it; it was judged on
other seeds, where sensitive units were ahead of heavy ones, and the order of the others stayed
open. Shares in proportion to the sensitivity itself, tried on tuning seeds beside those by rank,
were no better.

Added when all this was known: three ways with 2,000 sentences and 150 steps, on other seeds, at the
best of four rates on the same two tuning seeds. And then, with sensitivities of twice the
sentences: budgets of 25 and 80 %; a budget of operations; blocks that are taken out, with those
below the edge as `depth` keeps them, at the rate of `depth`; pairs of sentences and messages to
newsgroups, at the best of three and four rates on one seed. After trainings as short as the others
what a way reached on pairs was luck: it hung on whether anything was learned at all. So these are
longer. Cut for time: more than two or three ways in some of these settings; more than 128 sentences
to feel in the older ones; rates for the encoder with nothing cut, which no claim is judged on.
"""

import random
from functools import lru_cache

import torch
from torch import Tensor, nn

from lablib.data.tasks import Example, load_task
from lablib.evidence import grid, paired
from lablib.models import anatomy
from lablib.models.classifier import (
    Classifier,
    Encoded,
    encode,
    encoder,
    last_states,
    pooling,
    predicted,
)
from lablib.models.scores import scored
from lablib.peft import sensi_bert
from lablib.peft.sensi_bert import Scores, Trimmed
from lablib.peft.tuning import backbone_above, task_loss, tune

TASK = "movies"
LENGTHS = {TASK: 40, "sts-b": 48, "newsgroups": 64}  # tokens a text, or a pair, at most
LENGTH = LENGTHS[TASK]
STEPS, BATCH, TRAIN, TEST = 60, 16, 960, 500
FELT, PROBE = (
    128,
    256,
)  # sentences that sensitivities are measured on, and that the head learns from
SHARE = 0.4  # of the encoder's heads and neurons, counted in parameters
WAYS = {  # score, allocation
    "rank": ("sensitivity", "rank"),
    "score": ("sensitivity", "score"),
    "uniform": ("sensitivity", "uniform"),
    "magnitude": ("magnitude", "uniform"),
    "depth": ("sensitivity", "depth"),
    "dropped": ("sensitivity", "depth"),
}
CHANCE = {"random": ("random", "uniform")}  # the control of what a choice of units brings
RATES = (3e-5, 1e-4, 1.7e-4, 3e-4, 1e-3)
TUNED = {"rank": 1.7e-4, "uniform": 3e-4, "magnitude": 1e-4, "depth": 3e-4, "whole": 1e-4}


def run(
    seed: int,
    way: str,
    share: float = SHARE,
    rate: float | None = None,
    costs: str = "parameters",
    steps: int = STEPS,
    train: int = TRAIN,
    test: int = TEST,
    task: str = TASK,
    felt_on: int = FELT,
) -> dict:
    """Trim MiniLM, then tune it; what it scores on texts that it has not seen.

    way: of WAYS or CHANCE, or "whole" for no trimming. share: of the costs ("parameters", "flops")
    that stays. rate: None is the one tuned for this way. task: of LENGTHS; of "sts-b" points are
    100 times Spearman's correlation. felt_on: texts that sensitivities are measured on.
    Returns points (per cent right), nll (nats), the same at "start", before it was tuned, kept
    (million parameters of the encoder) and shares, of the parts in order.
    """
    torch.manual_seed(seed)
    (learned, labels), (new, truth) = (drawn(seed, train, test, task)[i] for i in (0, 1))
    classifier = with_head(seed, learned, labels)
    kept = {}
    if way != "whole":
        made = trimming(classifier, learned, labels, way, share, costs, felt_on)
        sensi_bert.trim_(classifier.model, made.keep)
        if way == "dropped":
            drop_(classifier.model, made)
        counts = sensi_bert.units(whole_encoder())
        kept = {p: len(places) / counts[p] for p, places in made.keep.items()}
    start = judged(classifier, new, truth)
    rate = TUNED["uniform" if way == "random" else way] if rate is None else rate
    names = backbone_above(classifier)
    tune(classifier, learned, labels, steps, rate, batch=BATCH, seed=seed, trainable=names)
    end = judged(classifier, new, truth)
    return {
        "points": end["points"],
        "nll": end["nll"],
        "start_points": start["points"],
        "start_nll": start["nll"],
        "kept": round(sensi_bert.n_encoder(classifier.model) / 1e6, 4),
        "shares": [round(share, 4) for share in kept.values()],
    }


def judged(classifier: Classifier, encoded: Encoded, truth: Tensor) -> dict[str, float]:
    """Per cent right, and nats; of numbers 100 times Spearman's correlation, and squared error."""
    logits = predicted(classifier, encoded)
    made = scored(logits, truth)
    if truth.is_floating_point():
        made = {"accuracy": made["spearman"], "nll": task_loss(logits, truth).item()}
    return {"points": round(100 * made["accuracy"], 3), "nll": round(made["nll"], 5)}


def drop_(model: nn.Module, made: Trimmed) -> None:
    """Take out the blocks above the one at the edge, of which one head and one neuron are left."""
    blocks = anatomy.blocks(model)
    stay = [b for b in range(len(blocks)) if len(made.keep[b, "neurons"]) > 1]
    del blocks[len(stay) :]


@lru_cache(1)
def whole_encoder() -> nn.Module:
    """MiniLM as it came."""
    return encoder()[0]


@lru_cache(2)
def drawn(seed: int, train: int, test: int, task: str = TASK) -> tuple[tuple[Encoded, Tensor], ...]:
    """Texts and labels: to learn from, and to judge on, these by length for speed."""
    tokenizer, splits, draw = encoder()[1], load_task(task), random.Random(seed)
    learned = draw.sample(splits.train, train)
    judged_on = sorted(draw.sample(splits.test, test), key=lambda e: len(e.text))
    return tuple(encoded(tokenizer, part, LENGTHS[task]) for part in (learned, judged_on))


def encoded(tokenizer, examples: list[Example], length: int = LENGTH) -> tuple[Encoded, Tensor]:
    """Tokens and labels; numbers from 0 to 5 as -1 to 1."""
    texts, pairs = [e.text for e in examples], [e.pair for e in examples]
    labels = torch.tensor([e.label for e in examples])
    if labels.is_floating_point():
        return encode(tokenizer, texts, pairs, length=length), labels / 2.5 - 1
    return encode(tokenizer, texts, length=length), labels


def with_head(seed: int, learned: Encoded, labels: Tensor, rate: float = 1e-2) -> Classifier:
    """MiniLM anew, with a head that has learned on its frozen states."""
    torch.manual_seed(seed)
    n_labels = 1 if labels.is_floating_point() else max(2, int(labels.max()) + 1)
    classifier = Classifier(encoder()[0], n_labels).eval()
    places = torch.arange(min(PROBE, len(labels)))
    with torch.no_grad():
        parts = [learned.at(part) for part in places.split(64)]
        states = [pooling(last_states(classifier.model, p), p.mask, "mean") for p in parts]
    pooled, head = torch.cat(states), classifier.head
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        task_loss(head(pooled), labels[places]).backward()
        optimizer.step()
    return classifier


def felt(
    classifier: Classifier,
    learned: Encoded,
    labels: Tensor,
    score: str = "sensitivity",
    n: int = FELT,
) -> Scores:
    """Scores of the encoder's units for the task, one pass over n sentences."""
    parts = torch.arange(min(n, len(labels))).split(BATCH)
    batches = [(learned.at(part), labels[part]) for part in parts]

    def loss(_, batch: tuple[Encoded, Tensor]) -> Tensor:
        return task_loss(classifier(batch[0]), batch[1])

    if score == "random":
        return sensi_bert.at_random(classifier.model)
    return sensi_bert.SCORES[score](classifier.model, batches, loss)


def trimming(
    classifier: Classifier,
    learned: Encoded,
    labels: Tensor,
    way: str,
    share: float,
    costs: str,
    felt_on: int = FELT,
) -> Trimmed:
    """What a way keeps of the encoder."""
    score, allocation = (WAYS | CHANCE)[way]
    model = classifier.model
    scores = felt(classifier, learned, labels, score, felt_on)
    each = sensi_bert.unit_sizes(model)
    if costs == "flops":
        each = sensi_bert.unit_flops(model, LENGTH)
    return sensi_bert.budgeted(scores, each, share, sensi_bert.ALLOCATIONS[allocation])


SEEDS = range(5, 10)
RANK, UNIFORM, MAGNITUDE, DEPTH, RANDOM = (
    {"way": way, "share": SHARE, "costs": "parameters"}
    for way in ("rank", "uniform", "magnitude", "depth", "random")
)
MORE = {case["way"]: case | {"share": 0.6} for case in (RANK, UNIFORM, MAGNITUDE, DEPTH)}
WHOLE = {"way": "whole", "share": 1.0, "costs": "parameters"}
LONGER = {"share": SHARE, "train": 2000, "steps": 150}  # on other seeds than those above
LONG_RATES = {"rank": 3e-4, "uniform": 3e-4, "magnitude": 3e-4}  # `uniform`: of two equal ones
LONG = {way: {"way": way, "rate": rate} | LONGER for way, rate in LONG_RATES.items()}
CUT = (RANK, UNIFORM, MAGNITUDE, DEPTH, RANDOM)
POINTS = [{**kind, "seed": seed} for kind in CUT for seed in SEEDS]
POINTS += [{**WHOLE, "seed": seed} for seed in SEEDS]
POINTS += [{**kind, "seed": seed} for kind in MORE.values() for seed in SEEDS]
POINTS += [{**kind, "seed": seed} for kind in LONG.values() for seed in range(10, 15)]
LONG = {way: kind | {"task": None} for way, kind in LONG.items()}  # as told from runs on pairs
CHOSEN = ("rank", "uniform", "magnitude")
MOST = {"felt_on": 256}  # of what was added when all the others were known
SPENT = {
    share: {way: {"way": way, "share": share} | MOST for way in CHOSEN[:2]} for share in (0.8, 0.25)
}
FLOPS = {way: {"way": way, "share": SHARE, "costs": "flops"} | MOST for way in CHOSEN[:2]}
DROPPED = {"way": "dropped", "share": SHARE, "rate": TUNED["depth"]} | MOST
OTHER = {  # short trainings on pairs learn anything by luck alone: theirs are longer
    "sts-b": {"task": "sts-b", "train": 2000, "steps": 150} | MOST,
    "newsgroups": {"task": "newsgroups"} | MOST,
}
TASK_RATES = {
    "sts-b": {"rank": 3e-4, "uniform": 3e-4, "magnitude": 3e-4},
    "newsgroups": {"rank": 3e-4, "uniform": 3e-4, "magnitude": 1e-3, "depth": 3e-4},
}
ON_TASKS = {
    task: {
        way: {"way": way, "share": SHARE, "rate": rate} | OTHER[task] for way, rate in rates.items()
    }
    for task, rates in TASK_RATES.items()
}
ADDED = [*SPENT.values(), FLOPS, {"dropped": DROPPED}, *ON_TASKS.values()]
POINTS += [{**kind, "seed": seed} for ways in ADDED for kind in ways.values() for seed in SEEDS]
FORTY = {case["way"]: case for case in (RANK, UNIFORM, MAGNITUDE, DEPTH)}
SETTINGS = {  # for the lab: what was measured, and the cases of its ways
    "25 % left": SPENT[0.25],
    "40 % left": FORTY | {"dropped": DROPPED},
    "60 % left": MORE,
    "80 % left": SPENT[0.8],
    "40 %, trained for longer": LONG,
    "40 % of the operations": FLOPS,
    "40 %, pairs of sentences": ON_TASKS["sts-b"],
    "40 %, newsgroups": ON_TASKS["newsgroups"],
}
TUNING = grid(way=list(TUNED)[:4], share=SHARE, costs="parameters", rate=RATES, seed=(100, 101))
TUNING += grid(way=list(LONG_RATES), rate=RATES[1:], seed=(100, 101), **LONGER)
for task, rates in TASK_RATES.items():
    tried = (1e-4, 3e-4, 1e-3) if task == "sts-b" else (1e-4, 3e-4, 1e-3, 3e-3)
    TUNING += grid(way=list(rates), share=SHARE, rate=tried, seed=100, **OTHER[task])
CANARY = {"seed": 200, "way": "rank", "rate": 1e-5, "steps": 1, "train": 32, "test": 16}
ROLES = {
    "uniform": {"method": RANK, "baseline": UNIFORM, "control": MAGNITUDE},
    "magnitude": {"method": RANK, "baseline": MAGNITUDE, "control": RANDOM},
    "felt": {"method": UNIFORM, "baseline": MAGNITUDE, "control": RANDOM},
    "depth": {"method": RANK, "baseline": DEPTH, "control": MAGNITUDE},
    "uniform-60": {
        "method": MORE["rank"],
        "baseline": MORE["uniform"],
        "control": MORE["magnitude"],
    },
    "magnitude-60": {  # no units at random were kept there
        "method": MORE["rank"],
        "baseline": MORE["magnitude"],
        "control": None,
    },
    "depth-60": {
        "method": MORE["rank"],
        "baseline": MORE["depth"],
        "control": MORE["magnitude"],
    },
    "uniform-long": {
        "method": LONG["rank"],
        "baseline": LONG["uniform"],
        "control": LONG["magnitude"],
    },
    "magnitude-long": {"method": LONG["rank"], "baseline": LONG["magnitude"], "control": None},
    "felt-long": {"method": LONG["uniform"], "baseline": LONG["magnitude"], "control": None},
}
ROLES |= {
    f"{other}-{name}": {  # units at random were kept on film reviews alone, by parameters
        "method": ways["rank"],
        "baseline": ways[other],
        "control": None if other == "magnitude" else ways.get("magnitude"),
    }
    for name, ways in {
        "flops": FLOPS,
        "pairs": ON_TASKS["sts-b"],
        "topics": ON_TASKS["newsgroups"],
    }.items()
    for other in ("uniform", "magnitude", "depth")
    if other in ways
}
ROLES |= {"dropped": {"method": RANK, "baseline": DROPPED, "control": MAGNITUDE}}


def values(runs: list) -> dict:
    """One pair a seed: points of method and baseline; and the size of BERT-base's encoder."""
    judged = {
        claim: paired(runs, kinds["method"], kinds["baseline"], "points")
        for claim, kinds in ROLES.items()
    }
    return judged | {"encoder": [bert_base()]}


def bert_base() -> float:
    """Million parameters of BERT-base's encoder."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        return sensi_bert.n_encoder(BertModel(BertConfig())) / 1e6
