"""The study of the survey on mixtures of experts (2024): every gate on one model and one budget.

Two layers of dim 32 over the mixture of four domains, 1,024 BPE pieces, batches of 32 x 64 tokens.
Both feed-forward layers are layers of the survey, and in all of them a token meets 96 hidden units.
Of what has experts all store the same 768 hidden units a layer. No token is dropped. The rate falls
with one over the root of the step. A dense gate and one of sigmoids are left to the reader's row.

A run trains the rows of one question, all from one seed and on the same batches. The rate is tuned,
on other seeds, for all rows that a claim compares; the initialization is that of lab 302, where it
was tuned for dense models and for experts. Losses are taken twice: as in training, where a layer
may look at later tokens, and with later tokens cut off.
"""

import time

import torch

from lablib.data import Batches
from lablib.data.mixtures import mixture
from lablib.evidence import Pair, grid, matching
from lablib.experts.moe import moe_layers, recorded
from lablib.experts.moe_survey import blindfold, survey_
from lablib.experts.switch_transformers import reduced_init_
from lablib.models import GPT, GPTConfig
from lablib.training import evaluate, fit

EVERY = 100  # steps between two points of a curve
PLACES = (4, 8, 16, 24, 32, 40, 48, 56, 64)  # tokens read, where the loss is taken blindfold

GATES = {
    "dense layer": {"router": "none"},
    "top 1": {"router": "token", "n_experts": 8},
    "top 2": {"router": "token", "n_experts": 16, "top_k": 2},
    "shared and top 1": {"router": "token", "n_experts": 15, "shared": True},
    "hash": {"router": "hash", "n_experts": 8},
    "random": {"router": "random", "n_experts": 8},
    "expert choice": {"router": "expert", "n_experts": 8},
    "soft": {"router": "soft", "n_experts": 8},
}
QUESTIONS = {
    "who chooses": ("top 1", "hash", "random"),
    "how many": ("dense layer", "top 2", "shared and top 1"),
    "who sees all": ("expert choice", "soft"),
}


def run(
    seed: int,
    question: str = "who chooses",
    steps: int = 300,
    lr: float = 1e-2,
    rows: int = 256,
    **parts,
) -> dict:
    """Train the rows of one question; of each its loss in nats a token, its load and its cost.

    question: one of QUESTIONS; "" trains one row of your own, whose parts are those of
        `survey_layer`. Keys begin with the row's name.
    rows: how many held-out windows of 64 tokens a loss is taken on.
    """
    text = mixture()
    held_out = text.windows(limit=rows)
    made = {}
    for name in QUESTIONS.get(question, ("own",)):
        model = build(seed, **GATES.get(name, parts))
        start = time.process_time()
        history = train(model, text.train, steps, lr, seed, held_out)
        spent = time.process_time() - start
        seeing, blind = blindfold(model, torch.cat(held_out)[: rows // 2], PLACES)
        made |= {
            f"{name}: loss": history.held_out[-1][1],
            f"{name}: curve": [round(loss, 4) for _, loss in history.held_out],
            f"{name}: seeing": seeing,
            f"{name}: blindfold": blind,
            f"{name}: load": load(model, held_out),
            f"{name}: parameters": model.n_parameters(),
            f"{name}: train seconds": spent,
        }
    return made


def build(seed: int, router: str, **parts) -> GPT:
    """A model of the study, its feed-forward layers as the survey's parts say."""
    torch.manual_seed(seed)
    sizes = {"dim": 32, "ffn_dim": 96, "n_layers": 2, "n_heads": 2, "max_length": 64}
    model = GPT(GPTConfig(vocab_size=1024, qk_norm=True, **sizes))
    return reduced_init_(survey_(model, router, **parts))


def train(model, tokens, steps, lr, seed, held_out):
    """The study's training: batches of 32 x 64, 100 steps of warmup, inverse square root."""
    options = {"schedule": "inverse-sqrt", "warmup": 100, "progress": False}
    data = Batches(tokens, 32, 64, seed)
    held = {"held_out": held_out, "held_out_every": EVERY}
    return fit(model, data, steps=steps, lr=lr, seed=seed, **held, **options)


def load(model: GPT, held_out: list) -> list[float]:
    """Share of the last layer's rows that each expert computes; none where nothing is routed."""
    with recorded(model) as records:
        evaluate(model, held_out[:4])
    last = [*records.values()][-1] if moe_layers(model) else []
    if not last:
        return []
    counts = sum(record.counts for record in last)
    return [round(share, 4) for share in (counts / counts.sum()).tolist()]


POINTS = grid(question=tuple(QUESTIONS), seed=range(5))
TUNING = grid(question=("who chooses", "how many"), lr=(1e-2, 2e-2), seed=100)
CANARY = {"seed": 200, "question": "who chooses", "steps": 3, "rows": 16}

ROLES = {
    "random": {"method": "top 1: loss", "baseline": "random: loss"},
    "hash": {"method": "top 1: loss", "baseline": "hash: loss"},
    "shared": {"method": "shared and top 1: loss", "baseline": "top 2: loss"},
    "looks-ahead": {"method": "expert choice: seeing", "baseline": "expert choice: blindfold"},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    return {
        id: [
            Pair(run["seed"], run[role["method"]], run[role["baseline"]])
            for run in runs
            if role["method"] in run
        ]
        for id, role in ROLES.items()
    }


def table(runs: list) -> dict[str, list[dict]]:
    """Each row of the table: its results of every seed, keys without the row's name."""
    made = {}
    for name in GATES:
        (question,) = (key for key, names in QUESTIONS.items() if name in names)
        some = sorted(matching(runs, question=question), key=lambda run: run["seed"])
        cut = f"{name}: "
        made[name] = [
            {key.removeprefix(cut): run[key] for key in run if key.startswith(cut)} for run in some
        ]
    return made
