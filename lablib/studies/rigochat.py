"""The study of RigoChat 2 (2025): a model that is shown which of two answers is the better one.

The messages are those of two words and more, none longer than 60 letters, that all catalogues of
Django and Wagtail have in all seven languages. A seed is a draw of the messages that are held out,
of the pairs to train on and to score, of the adapters' first values, and of the windows of other
text, which no tiny checkpoint has read. An earlier design had Django's core catalogue alone, other
languages and a quarter as many messages, and was judged on other seeds.

SmolLM2 stands for the paper's model, at the rate of that earlier design: the middle one of three,
of which all stay within the loss on other text that is allowed on the tuning seed, too; the highest
wins somewhat more pairs there, and comes nearer to the limit.

The tiny model, which has never read Spanish, stands for what SmolLM2 is too large for here: DPO of
all weights, other data, 4 bits. Every way had six rates on one tuning seed. LoRA and all weights
have the one at which they forget least by the time the held-out preference loss is down to TARGET,
a level that was kept from the earlier design; a slower one of each does not reach it. Where one of
two judged runs does not either, they are compared at the lowest loss that both reach. Pairs of
whole phrases, and DPO on pairs of all kinds beside them, have the rate of their highest accuracy,
which is the same; so has training on chosen answers alone. The earlier design compared whole
phrases with LoRA at the rate at which it forgets least, which flattered them; here that was changed
when the numbers were known. In curated runs other pairs of the same held-out messages are scored.

Tried and left: tiny-4m, which learns no more in the same time; 4 bits on SmolLM2, whose weights
come from a 4-bit grid. Cut for time: more tuning seeds, other values of beta and of the rank,
longer messages, longer training of SmolLM2.
"""

import copy
import itertools
import math
import random
from functools import lru_cache

import numpy as np
import torch

from lablib.compression.calibration import token_losses
from lablib.compression.quantize import quantize, rounded
from lablib.compression.recover import recover
from lablib.evidence import grid, matching, paired
from lablib.evidence.studies import Pair
from lablib.models import GPT, GPTConfig, pretrained
from lablib.peft import rigochat
from lablib.peft.adapter import fold_, trainable
from lablib.training.checkpoints import corpora

REAL, TINY = "smollm2-135m-instruct", "tiny-1m"
RANK = 8
HELD_OUT = 300  # messages
WORDS = 5  # of a curated message, at least
LENGTH = 96  # tokens of a window of other text
LETTERS = 6000  # of a document that windows are drawn from
LOOKS = 8  # at held-out pairs, while a tiny model trains
LOOKED = 40  # pairs
ALLOWED = 1.02  # of the base's loss on other text
LOST = 2  # points of accuracy, allowed with 4 bits
TARGET = 0.45  # held-out preference loss at which forgetting is compared
ASKED = 5  # messages of three words and more that SmolLM2 answers before and after
NEW = 12  # tokens of an answer, at most


def run(
    kind: str,
    seed: int,
    lr: float | None = None,
    model: str = TINY,
    steps: int = 128,
    batch: int = 8,
    pairs: int = 512,
    scored: int = 240,
    rows: int = 4,
    beta: float = rigochat.BETA,
) -> dict:
    """Train a model on pairs and score it before ("base_...") and after, on held-out messages.

    accuracy: % of pairs whose chosen answer is the more probable one; by_language: the same, of
    each of `rigochat.REJECTED`. byte_loss: nats a byte of chosen answers. other: nats a token of
    other text; allowed: what it may be. chosen, rejected: how log-probabilities changed, a mean.
    kind: "dpo" with LoRA; "full", DPO of all weights; "sft", LoRA on chosen answers alone;
        "curated", DPO with LoRA on whole phrases alone.
    scored: pairs; rows: windows of each other corpus.
    """
    learner, tokenizer = pretrained(model)
    train, test = drawn_pairs(seed, pairs, kind == "curated", scored)
    told, held_out = rigochat.encode(tokenizer, train), rigochat.encode(tokenizer, test)
    others = other_text(model, seed, rows)
    base, before = looked(learner, held_out, test, others)
    if kind != "full":
        rigochat.adapt_(learner, RANK, seed)
    asked = answers(learner, tokenizer, seed) if model == REAL else []
    trail = []

    def look(step: int, rate: float = 0.0) -> None:
        if model != REAL and (step + 1) % max(1, steps // LOOKS) == 0:
            trail.append(glance(learner, held_out, before, others, beta))

    look(-1)
    names = "all" if kind == "full" else list(trainable(learner))
    options = {"batch": batch, "trainable": names, "seed": seed, "after_step": look}
    options["loss"] = loss_of(kind, learner, told, beta)
    losses = recover(learner, torch.arange(len(train)), steps, lr, **options)
    after, now = looked(learner, held_out, test, others)
    change = (now - before).mean(0).tolist()
    made = after | {f"base_{key}": value for key, value in base.items()}
    made |= {"chosen": change[0], "rejected": change[1], "allowed": ALLOWED * base["other"]}
    made |= {"loss": float(np.mean(losses[-len(losses) // 4 :])), "trail": trail}
    if model == REAL:
        return made | heard(asked, answers(learner, tokenizer, seed), seed)
    return made | in_four_bits(learner, kind, held_out, made)


def loss_of(kind: str, learner, told: rigochat.Rows, beta: float):
    """What is trained: a function of the model and the places of pairs."""
    if kind == "sft":
        return rigochat.supervised_loss(told)
    return rigochat.preference_loss(told, rigochat.reference_scores(learner, told), beta)


def drawn_pairs(seed: int, pairs: int, curated: bool, scored: int) -> tuple[list, list]:
    """Pairs to train on, and to score, of other messages and as many of each language."""
    train, held_out = rigochat.split(rigochat.messages(), HELD_OUT, seed)
    if curated:
        train = [row for row in train if len(row[rigochat.ENGLISH].split()) >= WORDS]
    some, test = rigochat.preferences(train), rigochat.preferences(held_out)
    draw, each = random.Random(seed), scored // len(rigochat.REJECTED)
    chosen = draw.sample(some, min(pairs, len(some)))
    order = draw.sample(test, len(test))
    groups = [[p for p in order if p.language == k][:each] for k in rigochat.REJECTED]
    return chosen, [pair for group in zip(*groups) for pair in group]


def looked(model, held_out: rigochat.Rows, test: list, others: torch.Tensor) -> tuple[dict, object]:
    """What a model makes of held-out pairs and of other text, and the pairs' scores."""
    scores = rigochat.score(model, held_out)
    each = [
        accuracy(scores[[place for place, pair in enumerate(test) if pair.language == language]])
        for language in rigochat.REJECTED
    ]
    letters = sum(len(pair.chosen.encode()) + 1 for pair in test)
    return {
        "accuracy": accuracy(scores),
        "byte_loss": -scores[:, 0].sum().item() / letters,
        "other": token_losses(model, others).mean().item(),
        "by_language": [round(share, 1) for share in each],
    }, scores


def accuracy(scores: torch.Tensor) -> float:
    """% of pairs, (pairs, 2), whose first answer is the more probable one."""
    return 100 * (scores[:, 0] > scores[:, 1]).float().mean().item()


def glance(model, held_out: rigochat.Rows, before, others: torch.Tensor, beta: float) -> list:
    """Preference loss, change of chosen and of rejected log-probability, and loss on other text."""
    few = rigochat.Rows(held_out.tokens[:LOOKED], held_out.is_answer[:LOOKED])
    now, start = rigochat.score(model, few), before[:LOOKED]
    loss = rigochat.dpo_loss(now[:, 0], now[:, 1], start[:, 0], start[:, 1], beta).item()
    other = token_losses(model, others).mean().item()
    return [round(value, 4) for value in (loss, *(now - start).mean(0).tolist(), other)]


def forgetting(trail: list, target: float = TARGET) -> float:
    """% by which the loss on other text has grown when the preference loss first falls to target.

    Between two looks it is read off the straight line. nan where that never happens.
    """
    for (high, *_, before), (low, *_, after) in itertools.pairwise(trail):
        if high > target >= low:
            part = (high - target) / (high - low)
            return 100 * ((before + part * (after - before)) / trail[0][-1] - 1)
    return float("nan")


def in_four_bits(learner, kind: str, held_out: rigochat.Rows, made: dict) -> dict:
    """Accuracy with every projection rounded to 4 bits, and the least that is allowed."""
    if kind != "full":
        fold_(learner)
    with rounded(learner, lambda _, weight: quantize(weight, 4, group=32).dequantize()):
        return {
            "four_bits": accuracy(rigochat.score(learner, held_out)),
            "least": made["accuracy"] - LOST,
        }


def answers(model, tokenizer, seed: int) -> list[str]:
    """What a model answers to held-out messages, up to the end of the line."""
    found = []
    for message in asked_messages(seed):
        ids = tokenizer.encode(rigochat.prompt_of(message))
        new = model.generate(ids, NEW, greedy=True)[len(ids) :]
        found.append(tokenizer.decode(new).strip().partition("\n")[0])
    return found


def asked_messages(seed: int) -> list[str]:
    """Held-out messages of a few words."""
    held_out = rigochat.split(rigochat.messages(), HELD_OUT, seed)[1]
    texts = [row[rigochat.ENGLISH] for row in held_out]
    return [text for text in texts if len(text.split()) >= 3 and "%" not in text][:ASKED]


def heard(before: list[str], after: list[str], seed: int) -> dict:
    """The answers, and how many of them are Spanish by their letters."""
    train = rigochat.split(rigochat.messages(), HELD_OUT, seed)[0]
    known = rigochat.profiles({k: [row[k] for row in train] for k in rigochat.LANGUAGES})
    told = [
        100 * np.mean([rigochat.language_of(text, known) == rigochat.SPANISH for text in texts])
        for texts in (before, after)
    ]
    shown = [[*three] for three in zip(asked_messages(seed), before, after)]
    return {"base_spoken": told[0], "spoken": told[1], "answers": shown}


@lru_cache(maxsize=2)
def other_ids(model: str) -> dict:
    """Corpus -> token ids of some of its held-out documents."""
    _, tokenizer = pretrained(model)
    return {
        name: torch.tensor([i for d in documents[:4] for i in tokenizer.encode(d.text[:LETTERS])])
        for name, documents in corpora()[1].items()
    }


def other_text(model: str, seed: int, rows: int) -> torch.Tensor:
    """(corpora * rows, LENGTH + 1): windows of Shakespeare, the Bible and Python, held out."""
    draw = np.random.default_rng(seed)
    return torch.stack(
        [
            ids[start : start + LENGTH + 1]
            for ids in other_ids(model).values()
            for start in draw.integers(0, len(ids) - LENGTH, rows)
        ]
    )


SMALL = {"model": REAL, "steps": 32, "batch": 2, "pairs": 64, "scored": 60, "rows": 1}
SEEDS, REAL_SEEDS = range(10, 15), range(10, 18)
RATES = {"dpo": 1.4e-3, "full": 1e-4, "curated": 1e-2, "sft": 1.7e-2, REAL: 6e-4}
FEW = 128  # curated pairs
LORA, WHOLE, PLAIN = (
    {"kind": kind, "model": TINY, "lr": RATES[kind]} for kind in ("dpo", "full", "sft")
)
CURATED = {"kind": "curated", "model": TINY, "lr": RATES["curated"], "pairs": FEW}
FASTER = LORA | {"lr": RATES["curated"]}
POINTS = [
    *(point for way in (LORA, WHOLE, CURATED, PLAIN, FASTER) for point in grid(**way, seed=SEEDS)),
    *grid(kind="dpo", seed=REAL_SEEDS, lr=RATES[REAL], **SMALL),
]


def tried(kind: str, rates: tuple) -> list[dict]:
    """Points of the tuning seed."""
    pairs = {"pairs": FEW} if kind == "curated" else {}
    return grid(kind=kind, model=TINY, seed=100, lr=rates, **pairs)


TRIED = {
    "dpo": (1e-3, 1.4e-3, 2e-3, 3e-3, 1e-2, 3e-2),
    "full": (5e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "curated": (1e-3, 3e-3, 1e-2, 1.7e-2, 3e-2, 1e-1),
    "sft": (1e-3, 3e-3, 1e-2, 1.7e-2, 3e-2, 1e-1),
}
TUNING = [
    *(point for kind, rates in TRIED.items() for point in tried(kind, rates)),
    *grid(kind="dpo", seed=100, lr=(3e-4, 6e-4, 1e-3), **SMALL),
]
CANARY = {
    "kind": "dpo",
    "seed": 200,
    "lr": 1e-3,
    "model": TINY,
    "steps": 3,
    "batch": 2,
    "pairs": 6,
    "scored": 12,
    "rows": 1,
}
ROLES = {  # None: the model before the training, the only control stored, is the baseline already
    "spanish": {"method": "accuracy", "baseline": "base_accuracy", "control": None},
    "capabilities": {  # whoever learns nothing forgets nothing; "spanish" asks for learning
        "method": "other",
        "baseline": "allowed",
        "control": None,
    },
    "spanish-loss": {"method": "byte_loss", "baseline": "base_byte_loss", "control": None},
    "less-forgetting": {"method": LORA, "baseline": WHOLE, "control": None},
    "curated": {"method": CURATED, "baseline": FASTER, "control": WHOLE},  # not curated either
    "supervised": {"method": FASTER, "baseline": PLAIN, "control": None},
    "curated-near": {"method": CURATED, "baseline": FASTER, "control": WHOLE},
    "quantized": {"method": "four_bits", "baseline": "least", "control": "base_accuracy"},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    real, tiny = matching(runs, model=REAL), matching(runs, **LORA)
    made = {id: within(real, id) for id in ("spanish", "capabilities", "spanish-loss")}
    curated = paired(runs, CURATED, FASTER, "accuracy")
    return made | {
        "quantized": within(tiny, "quantized"),
        "less-forgetting": at_equal_preference(paired(runs, LORA, WHOLE, "trail")),
        "curated": curated,
        "supervised": paired(runs, FASTER, PLAIN, "accuracy"),
        "curated-near": [pair._replace(method=pair.method + LOST) for pair in curated],
    }


def at_equal_preference(trails: list[Pair]) -> list[Pair]:
    """What two runs of a seed have forgotten at TARGET, or at the lowest loss that both reach."""
    made = []
    for seed, ours, theirs in trails:
        level = max(TARGET, *(min(row[0] for row in trail) for trail in (ours, theirs)))
        made.append(Pair(seed, forgetting(ours, level), forgetting(theirs, level)))
    return made


def within(runs: list, id: str) -> list[Pair]:
    """Two results of each run, as ROLES names them."""
    ours, theirs = ROLES[id]["method"], ROLES[id]["baseline"]
    return [Pair(run["seed"], run[ours], run[theirs]) for run in runs]


def by_closed_form(beta: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """DPO's loss, and its gradients for all adapters of a small model, computed in two ways.

    Ours: the loss, with adapters switched off for the reference, then backward. Independent: a
    second copy of the base as the reference, and -beta sigmoid(-margin) times the difference of the
    gradients of the two answers' log-probabilities, pair by pair.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=30, dim=16, n_layers=2, n_heads=2, init_std=0.3))
    base = copy.deepcopy(model)
    rigochat.adapt_(model, 2)
    adapters = list(trainable(model).values())
    with torch.no_grad():
        for parameter in adapters:
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens, is_answer = torch.randint(30, (3, 2, 9)), torch.zeros(3, 2, 9, dtype=torch.bool)
    is_answer[:, 0, 4:8] = is_answer[:, 1, 4:] = True
    rows = rigochat.Rows(tokens, is_answer)
    start = rigochat.reference_scores(model, rows)
    loss = rigochat.preference_loss(rows, start, beta)(model, torch.arange(3))
    ours = torch.autograd.grad(loss, adapters)
    total, theirs = 0.0, [torch.zeros_like(parameter) for parameter in adapters]
    for pair in range(3):
        said = [spoken_log(model, tokens[pair, side], is_answer[pair, side]) for side in (0, 1)]
        with torch.no_grad():
            kept = [spoken_log(base, tokens[pair, side], is_answer[pair, side]) for side in (0, 1)]
        margin = beta * ((said[0] - kept[0]) - (said[1] - kept[1])).item()
        total += math.log1p(math.exp(-margin)) / 3
        weight = beta / (1 + math.exp(margin)) / 3  # beta sigmoid(-margin), of a mean over 3
        up, down = (torch.autograd.grad(value, adapters) for value in said)
        theirs = [g - weight * (u - d) for g, u, d in zip(theirs, up, down)]
    flat = [torch.cat([g.flatten() for g in part]) for part in (ours, theirs)]
    return torch.cat([loss.detach()[None], flat[0]]), torch.cat([torch.tensor([total]), flat[1]])


def spoken_log(model, tokens: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
    """log p of one answer, token by token, each from the text before it alone."""
    return sum(
        model(tokens[None, :place])[0, -1].log_softmax(-1)[tokens[place]]
        for place in is_answer.nonzero().flatten().tolist()
    )
