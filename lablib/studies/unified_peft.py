"""The study of the unified view (2021): which modification of a frozen model learns most.

`tiny-1m` knows Shakespeare, the Bible and Python; it is adapted to licence texts, frozen but for
one method's additions, and judged on licences that are no near-copies of those it learned from. A
seed is a draw of training windows, their order, the additions' start, and a slice of held-out text.
Methods of the large budget add as many parameters as the paper's MAM does to BART-large, as a share
of the base; those of the small one a twentieth of that. LoRA, which has no biases, gets its rank so
that it has no fewer. A run of "judged" trains all methods one after the other, on the same
text, for several seeds.

Tuned on another seed: the rate. Three tries half a decade apart for each method of the large
budget, then a fourth: between two of them where the best stood inside, beyond them where it stood
at the edge; prefixes, which like rates ten times as high, got two more. Full fine-tuning has four,
as have the heads of the small budget; what they are compared with has three. Four things were added
when all this was known, each at rates of its own: a middle budget of some 2 %, with four tries;
training for four times as many steps, with three; a prefix whose rows a network makes, as the paper
trains them, with four; and messages of programs that are put into French, with five, two more for
the prefix. Those are judged on seeds of their own.

"kit" and "rest" runs are for the lab's construction kit only: one seed, at the rate of the method
that they differ least from, so they are no fair comparison, and no claim is judged on them. Smaller
than it might be, for time: 150 steps, 600 for five methods. The paper trains for 50,000 steps and
more, and through an MLP where there is a prefix.
"""

import copy
from functools import lru_cache
from itertools import product

import numpy as np
import torch

from lablib.compression.recover import language_loss, recover
from lablib.data.tasks import licence_texts, parallel
from lablib.evidence import Pair, grid
from lablib.models import pretrained
from lablib.peft.adapter import n_trainable, trainable
from lablib.peft.bottleneck import INSERTIONS
from lablib.peft.prefix import prefix_
from lablib.peft.rigochat import Preference, Rows, encode, supervised_loss
from lablib.peft.unified_peft import (
    COMPOSE,
    PLACES,
    WEIGHTS,
    Modification,
    mam,
    modify_,
    share_of_bart,
    why_not,
)

MODEL = "tiny-1m"
LENGTH = 64  # tokens of a row
STEPS, BATCH = 150, 8
HELD_OUT = 96  # rows a seed
CHARACTERS = 2000  # of each licence
DOCUMENTS = {"train": 400, "held_out": 120}
LETTERS = 80  # of a message that is translated, at most


def _one(form: str, insertion: str, place: str, compose: str, rank: int) -> tuple:
    return (Modification(form, insertion, place, compose, rank),)


LARGE = {
    "serial": _one("relu", "serial", "mlp", "add", 94),
    "parallel": _one("relu", "parallel", "mlp", "add", 94),
    "serial-attention": _one("relu", "serial", "attention", "add", 94),
    "parallel-attention": _one("relu", "parallel", "attention", "add", 94),
    "scaled": _one("relu", "parallel", "mlp", "scale", 94),
    "lora": _one("linear", "parallel", "mlp weights", "scale", 17),
    "lora-attention": _one("linear", "parallel", "attention weights", "scale", 55),
    "prefix": _one("softmax", "parallel", "heads", "gate", 190),
    "mam": mam(16, 86),
}
SMALL = {
    "few-heads": _one("relu", "parallel", "heads", "add", 4),
    "few-attention": _one("relu", "parallel", "attention", "add", 4),
    "few-prefix": _one("softmax", "parallel", "heads", "gate", 8),
}
RANKS = {"attention": 94, "heads": 95, "mlp": 94, "attention weights": 55, "mlp weights": 17}


def _kit() -> dict[str, tuple]:
    """All other choices of the menus, at as many parameters; "relu, serial, mlp, scale" is one."""
    there = {method[0] for method in LARGE.values() if len(method) == 1}
    kit = {}
    for choice in product(("linear", "relu", "softmax"), INSERTIONS, PLACES, COMPOSE):
        method = _one(*choice, RANKS[choice[2]])
        if not why_not(method[0]) and method[0] not in there and choice[3] != "gate":
            kit[", ".join(choice)] = method
    return kit


KIT = _kit()
TRIED = (  # of the kit, for the lab's picture
    "linear, parallel, mlp, scale",
    "softmax, parallel, mlp, scale",
    "linear, parallel, mlp, add",
    "softmax, parallel, mlp, add",
    "relu, serial, mlp, scale",
    "relu, parallel, attention, scale",
    "relu, parallel, heads, add",
    "relu, parallel, heads, scale",
)
METHODS = {
    **LARGE,
    **SMALL,
    **KIT,
    "everything": (*LARGE["serial"], *LARGE["mam"], *SMALL["few-heads"], *LARGE["lora"]),
    "full": (),
}
MIDDLE = {  # three tenths of the large budget's ranks
    "middle-serial": _one("relu", "serial", "mlp", "add", 28),
    "middle-parallel": _one("relu", "parallel", "mlp", "add", 28),
    "middle-serial-attention": _one("relu", "serial", "attention", "add", 28),
    "middle-parallel-attention": _one("relu", "parallel", "attention", "add", 28),
    "middle-scaled": _one("relu", "parallel", "mlp", "scale", 28),
    "middle-lora": _one("linear", "parallel", "mlp weights", "scale", 5),
    "middle-lora-attention": _one("linear", "parallel", "attention weights", "scale", 17),
    "middle-prefix": _one("softmax", "parallel", "heads", "gate", 57),
    "middle-mam": mam(5, 26),
}
LONG = {f"long-{kind}": LARGE[kind] for kind in ("serial", "parallel", "scaled", "lora", "mam")}
BY_MLP, WIDE = "prefix-mlp", 800  # a prefix whose rows a network of this width makes
FRENCH = {f"french-{kind}": method for kind, method in (LARGE | {"full": ()}).items()}
EVERY = METHODS | MIDDLE | LONG | FRENCH | {BY_MLP: LARGE["prefix"]}
GROUPS = {
    "judged": (*LARGE, "few-heads", "few-attention", "full"),
    "kit": TRIED,
    "tried finer": ("serial", "serial-attention", "scaled", "mam"),
    "tried higher": ("parallel", "parallel-attention", "prefix"),
    "tried lower": ("lora", "lora-attention"),
    "prefixes": ("prefix", "few-prefix"),
    "few": tuple(SMALL),
    "middle": tuple(MIDDLE),
    "long": tuple(LONG),
    "rest": tuple(kind for kind in KIT if kind not in TRIED),
    "network": ("prefix", BY_MLP),
    "french": tuple(FRENCH),
}
TUNED = {  # learning rates
    "serial": 1.7e-2,
    "parallel": 3e-2,
    "serial-attention": 1e-2,
    "parallel-attention": 3e-2,
    "scaled": 1e-2,
    "lora": 1e-2,
    "lora-attention": 1e-2,
    "prefix": 3e-1,
    "mam": 1.7e-2,
    "few-heads": 3e-2,
    "few-attention": 3e-2,
    "few-prefix": 3e-1,
    "full": 3e-3,
    "middle-serial": 3e-2,
    "middle-parallel": 3e-2,
    "middle-serial-attention": 1e-2,
    "middle-parallel-attention": 3e-2,
    "middle-scaled": 3e-2,
    "middle-lora": 1e-2,
    "middle-lora-attention": 1e-2,
    "middle-prefix": 3e-1,
    "middle-mam": 3e-2,
    "long-serial": 1e-2,
    "long-parallel": 3e-2,
    "long-scaled": 1e-2,
    "long-lora": 1e-2,
    "long-mam": 1e-2,
    BY_MLP: 3e-3,
    "french-serial": 3e-2,
    "french-parallel": 3e-2,
    "french-serial-attention": 1e-2,
    "french-parallel-attention": 3e-2,
    "french-scaled": 1e-2,
    "french-lora": 1e-2,
    "french-lora-attention": 3e-3,
    "french-prefix": 3e-1,
    "french-mam": 1e-2,
    "french-full": 3e-3,
}


def run(
    kind: str,
    seed: int,
    rate: float | None = None,
    steps: int = STEPS,
    batch: int = BATCH,
    rows: int = HELD_OUT,
    repeats: int = 1,
    text: str = "licences",
) -> dict:
    """One point. start, loss: nats a token of held-out text, of the base and after training.

    kind: one of EVERY, or of GROUPS, whose methods are trained one after the other on the same
        text; then each has its loss under its own name. "full" trains the base's own weights.
    rate: None is the tuned one. rows: of held-out text.
    text: "licences", or "french", translations of messages, whose French part alone has a loss.
    train: the loss of one method while it trained, in five parts.
    repeats: how many seeds from this one on a group is trained with; then losses are lists.
    """
    if repeats > 1:
        each = [run(kind, seed + n, rate, steps, batch, rows, 1, text) for n in range(repeats)]
        return {key: [made[key] for made in each] for key in each[0]}
    learn, judge = lesson(text, seed, steps * batch, rows)
    told = {"start": loss_of(base(), *judge)}
    options = {"seed": seed, "rate": rate, "steps": steps, "batch": batch}
    group = GROUPS.get(kind)
    if group is None:
        return told | adapted(kind, learn, judge, **options)
    return told | {name: adapted(name, learn, judge, **options)["loss"] for name in group}


def adapted(kind: str, learn, judge, seed: int, rate: float | None, steps: int, batch: int) -> dict:
    """Train one method on `learn`; its loss on `judge`, and what it adds."""
    model = copy.deepcopy(base())
    torch.manual_seed(seed)
    if kind == BY_MLP:
        prefix_(model, LARGE["prefix"][0].rank, mlp=WIDE)
    else:
        modify_(model, *EVERY[kind])
    chosen = list(trainable(model)) or "all"
    learning = n_trainable(model) or model.n_parameters()
    rate = rate or TUNED.get(kind) or TUNED[nearest(EVERY[kind][0])]
    options = {"batch": batch, "trainable": chosen, "seed": seed, "loss": learn[1]}
    losses = recover(model, learn[0], steps, rate, **options)
    parts = [round(float(np.mean(part)), 4) for part in np.array_split(losses, min(5, steps))]
    return {"loss": loss_of(model, *judge), "learning": learning, "train": parts}


def nearest(m: Modification) -> str:
    """The method of the large budget whose rate a choice of the kit takes."""
    if m.place in WEIGHTS:
        return "lora" if m.place == "mlp weights" else "lora-attention"
    if m.compose == "scale":
        return "scaled"
    return m.insertion if m.place == "mlp" else f"{m.insertion}-attention"


def kind_of(m: Modification) -> str:
    """The kind that is this choice of the four menus, at the large budget."""
    menus = (m.form, m.insertion, m.place, m.compose)
    for kind in (*LARGE, *KIT):
        first, *more = METHODS[kind]
        if not more and (first.form, first.insertion, first.place, first.compose) == menus:
            return kind
    raise KeyError(f"no run has {menus}")


@torch.no_grad()
def loss_of(model, rows, loss=language_loss) -> float:
    """Nats a token."""
    return loss(model, rows).item()


@lru_cache(maxsize=1)
def base():
    """The checkpoint as it is stored."""
    return pretrained(MODEL)[0]


@lru_cache(maxsize=1)
def texts() -> dict:
    """Token ids of the beginnings of licences: to learn from, and held out."""
    _, tokenizer = pretrained(MODEL)
    ids = {}
    for (part, n), documents in zip(DOCUMENTS.items(), licence_texts(), strict=True):
        texts = [document.text[:CHARACTERS] for document in documents[:n]]
        ids[part] = torch.tensor([i for row in tokenizer(texts)["input_ids"] for i in row])
    return ids


def lesson(text: str, seed: int, n: int, rows: int) -> list[tuple]:
    """What a seed learns from, and what it is judged on: rows each, and their loss."""
    if text == "licences":
        return [(part, language_loss) for part in drawn(seed, n, rows)]
    made = []
    for pairs, count, own in zip(messages(), (n, rows), (seed, seed + 1000)):
        draw = np.random.default_rng(own)
        places = draw.choice(len(pairs.tokens), count, replace=count > len(pairs.tokens))
        made.append((torch.from_numpy(places), supervised_loss(pairs)))
    return made


@lru_cache(maxsize=1)
def messages() -> list[Rows]:
    """Messages of programs and their French translation, to learn from and held out.

    The other answer of each pair, the message untranslated, is not read.
    """
    _, tokenizer = pretrained(MODEL)
    train, _, test = parallel(["fr"])
    return [
        encode(
            tokenizer,
            [
                Preference(f"English: {english}\nFrench:", french, english, "en")
                for english, french in part
                if max(len(english), len(french)) <= LETTERS
            ],
        )
        for part in (train, test)
    ]


def drawn(seed: int, n: int, rows: int) -> tuple:
    """A seed's rows, (n, LENGTH + 1) to learn from and (rows, LENGTH + 1) held out."""
    both = texts()
    return windows(both["train"], n, seed), windows(both["held_out"], rows, seed + 1000)


def windows(ids, n: int, seed: int):
    """(n, LENGTH + 1) windows of a text, drawn at random."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - LENGTH, n)
    return torch.stack([ids[start : start + LENGTH + 1] for start in starts])


NEW = 110  # the seed that rates are tuned on
RATES = (3e-3, 1e-2, 3e-2)
POINTS = [
    *grid(kind="judged", seed=0, repeats=3),
    *grid(kind="judged", seed=3, repeats=2),
    *grid(kind=("kit", "rest"), seed=0),
    *grid(kind="middle", seed=(0, 2), repeats=2),
    *grid(kind="middle", seed=4),
    *grid(kind="long", seed=range(5), steps=4 * STEPS),
    *grid(kind="network", seed=range(5)),
    *grid(kind="french", seed=range(5, 10), text="french"),
]
TUNING = [
    *grid(kind=tuple(LARGE), seed=NEW, rate=RATES),
    *grid(kind="tried finer", seed=NEW, rate=1.7e-2),
    *grid(kind="tried higher", seed=NEW, rate=1e-1),
    *grid(kind="tried lower", seed=NEW, rate=5.6e-3),
    *grid(kind="few", seed=NEW, rate=(1e-2, 3e-2, 1e-1)),
    *grid(kind="few-heads", seed=NEW, rate=(3e-3, 1e-2)),
    *grid(kind="prefixes", seed=NEW, rate=(3e-1, 1.0)),
    *grid(kind="full", seed=NEW, rate=(3e-4, 1e-3, 3e-3, 1e-2)),
    *grid(kind="middle", seed=NEW, rate=(3e-3, 1e-2, 3e-2, 1e-1)),
    *grid(kind="middle-prefix", seed=NEW, rate=(3e-1, 1.0)),
    *grid(kind=BY_MLP, seed=NEW, rate=(1e-3, 3e-3, 1e-2, 3e-2)),
    *grid(kind="long", seed=NEW, steps=4 * STEPS, rate=(3e-3, 1e-2, 3e-2)),
    {"kind": "long-parallel", "seed": NEW, "steps": 4 * STEPS, "rate": 1e-1},
    *grid(kind="french", seed=NEW, rate=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), text="french"),
    *grid(kind="french-prefix", seed=NEW, rate=(3e-1, 1.0), text="french"),
]
CANARY = {"kind": "everything", "seed": 200, "rate": 1e-3, "steps": 2, "batch": 2, "rows": 2}

MARGIN = 0.1  # nats: what "comparable to full fine-tuning" allows


def against(method: str, baseline: str) -> dict[str, str]:
    """What a claim compares, two results of one run, and the base that nothing has trained."""
    return {"method": method, "baseline": baseline, "control": "start"}


ROLES = {  # "scaled" in the place of "mam" would do, too: "mam-adapter" judges what a prefix adds
    "mam": against("mam", "serial"),
    "parallel": against("parallel", "serial"),
    "ffn": against("parallel", "parallel-attention"),
    "ffn-lora": against("lora", "lora-attention"),
    "parallel-attention": against("parallel-attention", "serial-attention"),
    "scaled": against("scaled", "parallel"),
    "heads": against("few-heads", "few-attention"),
    "mam-adapter": against("mam", "scaled"),
    "mam-prefix": against("mam", "prefix"),
    "full": against("mam", "full"),
    "mam-middle": against("middle-mam", "middle-serial"),
    "parallel-middle": against("middle-parallel", "middle-serial"),
    "ffn-lora-middle": against("middle-lora", "middle-lora-attention"),
    "parallel-long": against("long-parallel", "long-serial"),
    "scaled-long": against("long-scaled", "long-parallel"),
    "mam-long": against("long-mam", "long-serial"),
    "prefix-mlp": against(BY_MLP, "prefix"),
    "mam-french": against("french-mam", "french-serial"),
    "parallel-french": against("french-parallel", "french-serial"),
    "ffn-lora-french": against("french-lora", "french-lora-attention"),
}


def judged(runs: list, kind: str) -> list[float]:
    """A method's loss, one a seed; kind "start": the base's on licences."""
    large = kind in (*GROUPS["judged"], "start")
    found = [run[kind] for run in runs if kind in run and large == (run["kind"] == "judged")]
    return [loss for one in found for loss in listed(one)]


def listed(value) -> list:
    """A group's result, one a seed."""
    return value if isinstance(value, list) else [value]


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed of groups that have both sides, or a number."""
    made: dict = {}
    for id, role in ROLES.items():
        both = role["method"], role["baseline"]
        made[id] = [
            Pair(run["seed"] + n, *row)
            for run in runs
            if {*both} <= {*GROUPS.get(run["kind"], ())}
            for n, row in enumerate(zip(*(listed(run[kind]) for kind in both)))
        ]
    made["full"] = [pair._replace(method=pair.method - MARGIN) for pair in made["full"]]
    return made | {"lora-share": [100 * share_of_bart(LORA_102)]}


LORA_102 = Modification("linear", "parallel", "mlp weights", "scale", 102)
