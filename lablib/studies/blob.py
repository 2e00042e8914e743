"""The study of lab 704: how far a classifier trained on 100 sentences can be believed.

MiniLM with its lower four blocks frozen and computed once; LoRA of rank 8 on the query and value
matrices of the last two, and a head, learn whether a movie critic's sentence is positive. Judged on
1,000 other such sentences, and on tweets and product reviews. The paper trains 31 epochs on the
smallest of its sets; here it is 18, three cycles of the divergence's weights.

Rates were tuned on seeds 100 and 101, on the validation split, with ten tries for either side: the
lowest negative log-likelihood among settings whose accuracy is within a point of the best. That is
6e-4 for LoRA and 1e-2 for BLoB. Beside them are judged: both at one rate between, "fast", at which
LoRA's training loss falls to zero as the paper's does ("fastblob" is BLoB); and LoRA at the rate
with the lowest likelihood loss of all, "gentle", whose accuracy was lower. The divergence's rate is
larger than the paper's 0.01, whose training is 22 times as long. With one sign a token instead of
one a text (as in the authors' code), noise partly averages out over the text; pilots gained less
from their draws.

The paper's other rivals, `OTHERS`, are LoRAs as well: with a prior on their matrices ("map"), with
dropout that stays on when they predict, and three of them averaged. They take the rate that was
tuned for LoRA; prior, dropout and number are the paper's. Laplace's approximation is over the head,
not over all of LoRA. An earlier design trained one block and judged 400 sentences, on other seeds.
"""

import copy
from functools import lru_cache

import numpy as np
import torch

from lablib.data.tasks import few_shot, load_task
from lablib.evidence import Pair, grid, matching
from lablib.evidence.studies import against
from lablib.models import anatomy, scores
from lablib.models.classifier import (
    Classifier,
    Encoded,
    cached_below,
    encode,
    encoder,
    pooling,
)
from lablib.peft import blob
from lablib.peft.adapter import trainable
from lablib.peft.lora import lora_
from lablib.peft.tuning import tune

BELOW = 4  # blocks that are frozen and computed once
SIZE, BATCH, STEPS = 100, 8, 228  # sentences to learn from
RANK, ALPHA, ROLES_OF = 8, 16, ("query", "value")
DRAWS, MEMBERS, DROPOUT = 10, 3, 0.1
DECAY = 1e-5  # of the prior on LoRA's matrices, where there is one
LENGTH = 32  # tokens of a sentence that are read
SHIFTED = ("tweets", "products")


def run(
    kind: str,
    seed: int,
    rate: float = 1e-3,
    kl_rate: float = 0.0,
    steps: int = STEPS,
    size: int = SIZE,
    draws: int = DRAWS,
    texts: int = 1000,
    shifted: int = 300,
    split: str = "test",
    settings: dict | None = None,
) -> dict:
    """One classifier, or an ensemble, and how good its probabilities are.

    kind: "mle", LoRA; "base", untrained; "blob"; "tokens", BLoB with signs for each token; "map",
        LoRA with a prior; "dropout", LoRA with dropout, also when it predicts; "ensemble" of
        `MEMBERS` LoRAs;
        "several", those of `settings`, name -> (kind, rate, kl_rate), on the same sentences: each
        result's key is then preceded by the name.
    texts: of movies, from `split`; shifted: of each other domain, 0 for none.
    """
    judged = {"": sample("movies", split, 0, texts)}
    judged |= {name: sample(name, split, 0, shifted) for name in SHIFTED if shifted}
    if kind != "several":
        return one(kind, seed, rate, kl_rate, steps, size, draws, judged)
    made = {
        name: one(each, seed, fast, pull, steps, size, draws, judged)
        for name, (each, fast, pull) in (settings or {}).items()
    }
    return {f"{name}_{key}": value for name, told in made.items() for key, value in told.items()}


def one(kind, seed, rate, kl_rate, steps, size, draws, judged) -> dict:
    """A kind's scores on the texts that it is judged on: name -> (encoded, labels)."""
    members = range(MEMBERS if kind == "ensemble" else 1)
    learned = [trained(kind, seed, 1000 * m, rate, kl_rate, steps, size) for m in members]
    n = draws if kind in ("blob", "tokens", "dropout") else 0
    torch.manual_seed(seed)
    logits = {
        name: torch.cat([blob.draws(classifier, encoded, n) for classifier, _ in learned])
        for name, (encoded, _) in judged.items()
    }
    told = scored({k: blob.averaged(v) for k, v in logits.items()}, judged)
    told |= {"train": float(np.mean(learned[0][1][-10:])) if steps else 0.0}
    told |= {"bins": bins(blob.averaged(logits[""]), judged[""][1])}
    if kind in ("blob", "tokens"):
        told |= posterior(learned[0][0], logits[""], judged)
    if kind == "mle":
        told |= afterwards(learned[0][0], seed, size, judged)
    return told


def trained(kind, seed, member, rate, kl_rate, steps, size) -> tuple[Classifier, list[float]]:
    """A classifier that has learned from a seed's sentences, and its losses."""
    encoded, labels = lesson(seed, size)
    classifier = untrained(kind, seed + member)
    if kind == "base" or not steps:
        return classifier, [0.0]
    options: dict = {"batch": BATCH, "seed": seed + member}
    if kind in ("blob", "tokens"):
        losses = blob.tune_blob(classifier, encoded, labels, steps, rate, kl_rate, **options)
    else:
        if kind == "map":
            options["penalty"] = lambda step: DECAY / 2 * squares(classifier)
        losses = tune(classifier, encoded, labels, steps, rate, **options)
    return classifier, losses


def squares(classifier: Classifier) -> torch.Tensor:
    """The sum of squares of all that the adapters brought: twice a unit prior's negative log."""
    return sum(p.square().sum() for p in trainable(classifier).values())


def untrained(kind: str, seed: int) -> Classifier:
    """MiniLM's upper blocks with a kind's adapters and a new head."""
    torch.manual_seed(seed)
    model = upper()
    if kind in ("blob", "tokens"):
        blob.blob_(model, ROLES_OF, RANK, ALPHA, tokenwise=kind == "tokens")
    else:
        dropout = DROPOUT if kind == "dropout" else 0.0
        lora_(model, ROLES_OF, RANK, ALPHA, dropout=dropout)
    return Classifier(model, 2)


def scored(probabilities: dict, judged: dict) -> dict[str, float]:
    """Accuracy, calibration error and negative log-likelihood, of movies and of the mean shift."""
    told, names = {}, ("accuracy", "ece", "nll")
    for name in names:
        made = {k: getattr(scores, name)(p, judged[k][1]) for k, p in probabilities.items()}
        told[name] = made.pop("")
        if made:
            told[f"shift_{name}"] = float(np.mean(list(made.values())))
    return told


def bins(probabilities, labels) -> list[list[float]]:
    """The reliability diagram: of each bin, how many, mean confidence, accuracy."""
    rows = scores.reliability(probabilities, labels, 10)
    return [[round(value, 3) for value in row.tolist()] for row in rows]


def posterior(classifier, logits, judged) -> dict:
    """What the mean alone predicts, what fewer draws do, and how wide the posterior is."""
    encoded, labels = judged[""]
    alone = blob.averaged(blob.draws(classifier, encoded, 0))
    told = {f"mean_{k}": v for k, v in scored({"": alone}, judged).items()}
    fewer = [scores.nll(blob.averaged(logits[:n]), labels) for n in range(1, len(logits) + 1)]
    wide = [layer.deviation.mean().item() for layer in blob.layers(classifier)]
    return told | {"by_draws": [round(v, 4) for v in fewer], "deviation": float(np.mean(wide))}


def afterwards(classifier, seed: int, size: int, judged: dict) -> dict:
    """What can be done to a trained model: its logits cooled, or its head made a distribution.

    One number of each is chosen by the likelihood of 200 more labelled sentences.
    """
    texts, labels = sample("movies", "validation", 800, 200)
    fitted = features(classifier, lesson(seed, size)[0])
    helds, outputs = (
        features(classifier, texts),
        {k: features(classifier, e) for k, (e, _) in judged.items()},
    )
    told = {}
    for name, way, options in (("cooled", cooled, TEMPERATURES), ("laplace", laplace, PRECISIONS)):
        losses = [scores.nll(way(classifier.head, fitted, helds, o), labels) for o in options]
        chosen = options[int(np.argmin(losses))]
        made = {k: way(classifier.head, fitted, x, chosen) for k, x in outputs.items()}
        told |= {f"{name}_{k}": v for k, v in scored(made, judged).items()}
        told |= {f"{name}_option": float(chosen)}
    return told


PRECISIONS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TEMPERATURES = tuple(2.0 ** (k / 4) for k in range(-8, 29))


@torch.no_grad()
def cooled(head, fitted, x, temperature: float):
    """Temperature scaling: (texts, dim) features -> (texts, labels) probabilities."""
    return (head(x).double() / temperature).softmax(1)


@torch.no_grad()
def laplace(head, fitted, x, precision: float, n: int = 200):
    """Laplace's approximation over the head's weights: (texts, dim) -> (texts, labels).

    Their precision is the Gauss-Newton matrix of the loss of `fitted`, beside the prior's.
    """
    p, (_, dim) = head(fitted).double().softmax(1), x.shape
    known, new, labels = fitted.double(), x.double(), p.shape[1]
    curve = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # (n, labels, labels)
    hessian = torch.einsum("nab,ni,nj->aibj", curve, known, known).reshape(labels * dim, -1)
    hessian += precision * torch.eye(labels * dim, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian).view(labels, dim, labels, dim)
    spread = torch.einsum("ti,aibj,tj->tab", new, inverse, new)  # of the logits
    factor = torch.linalg.cholesky(spread + 1e-9 * torch.eye(labels, dtype=torch.float64))
    normal = torch.Generator().manual_seed(0)
    noise = torch.randn(n, len(x), labels, dtype=torch.float64, generator=normal)
    return (head(x).double() + torch.einsum("tab,ntb->nta", factor, noise)).softmax(-1).mean(0)


@torch.no_grad()
def features(classifier: Classifier, encoded: Encoded):
    """(texts, dim): what the head reads."""
    classifier.eval()
    parts = [encoded.at(slice(i, i + 64)) for i in range(0, len(encoded.mask), 64)]
    return torch.cat([pooling(classifier.states(e), e.mask, classifier.pool) for e in parts])


@lru_cache(maxsize=1)
def minilm():
    """MiniLM and its tokenizer, as they are stored."""
    return encoder()


def upper():
    """A copy of MiniLM without the blocks that are computed once."""
    model = copy.deepcopy(minilm()[0])
    del anatomy.blocks(model)[:BELOW]
    return model


def known_states(examples) -> tuple[Encoded, torch.Tensor]:
    """Examples, the shortest first, as states after the frozen blocks, and their labels."""
    model, tokenizer = minilm()
    encoded = encode(tokenizer, [example.text for example in examples], length=LENGTH)
    order = encoded.mask.sum(1).argsort(stable=True)
    labels = torch.tensor([example.label for example in examples])[order]
    return cached_below(model, Encoded(*(part[order] for part in encoded)), BELOW), labels


@lru_cache(maxsize=8)
def sample(task: str, split: str, start: int, n: int) -> tuple[Encoded, torch.Tensor]:
    """n sentences of a task's split, from a place on."""
    return known_states(getattr(load_task(task), split)[start : start + n])


@lru_cache(maxsize=2)
def lesson(seed: int, size: int) -> tuple[Encoded, torch.Tensor]:
    """The sentences that a seed learns from, half of them positive."""
    return known_states(few_shot(load_task("movies").train, size // 2, seed))


TRIED = (100, 101)
SETTINGS = {  # kind, rate, rate of the divergence
    "mle": ("mle", 6e-4, 0.0),
    "blob": ("blob", 1e-2, 0.05),
    "gentle": ("mle", 3e-4, 0.0),
    "base": ("base", 1e-3, 0.0),
}
OTHERS = {kind: (kind, 6e-4, 0.0) for kind in ("map", "dropout", "ensemble")}
SHARED = {  # both at one rate
    "fast": ("mle", 3e-3, 0.0),
    "fastblob": ("blob", 3e-3, 0.05),
}
TUNED_ON = {"texts": 600, "shifted": 0, "split": "validation"}
MLE_RATES = (2e-4, 3e-4, 5e-4, 6e-4, 7e-4, 8.5e-4, 1e-3, 3e-3, 5e-3, 1e-2)
BLOB_RATES = ((5e-4, 0.05), (1e-3, 0.05), (3e-3, 0.05), (1e-2, 0.05))  # and the divergence's
BLOB_RATES += ((3e-2, 0.05), (1e-3, 0.1), (3e-3, 0.1), (1e-2, 0.1), (3e-3, 0.025), (1e-2, 0.025))


def tried(kind: str, rates, kl_rates=0.0) -> list[dict]:
    """Points of the tuning seeds."""
    return grid(kind=kind, seed=TRIED, rate=rates, kl_rate=kl_rates, **TUNED_ON)


def together(settings: dict) -> list[dict]:
    """Points with several settings each."""
    lists = {name: list(setting) for name, setting in settings.items()}
    return grid(kind="several", seed=SEEDS, settings=[lists])


SEEDS = range(10, 20)
POINTS = [point for settings in (SETTINGS, SHARED, OTHERS) for point in together(settings)]
TUNING = [
    *tried("mle", MLE_RATES),
    *(point for rates in BLOB_RATES for point in tried("blob", *rates)),
]
CANARY = {
    "kind": "blob",
    "seed": 200,
    "rate": 1e-2,
    "kl_rate": 0.05,
    "steps": 2,
    "size": 8,
    "draws": 2,
    "texts": 4,
    "shifted": 2,
}


MARGIN = 0.01  # of accuracy, allowed where it is not to be worse
ROLES = {
    # An untrained model is calibrated: it knows nothing, and says so. "accuracy" and "coin" ask
    # for knowledge. LoRA trained gently is calibrated as well; "gentle" is its rival.
    "ece": against("blob_ece", "mle_ece", None),
    "nll": against("blob_nll", "mle_nll", "base_nll"),
    # An untrained model would do: LoRA at this rate is worse than a coin.
    "fast": against("fastblob_nll", "fast_nll", None),
    "shift": against("blob_shift_nll", "mle_shift_nll", "base_shift_nll"),
    # LoRA would do, and an untrained model, too: both are believable beside this mean.
    "mean-is-not-enough": against("blob_nll", "blob_mean_nll", None),
    "accuracy": against("blob_accuracy", "mle_accuracy", "base_accuracy"),
    # Compared with LoRA. Who has learned nothing is not near it, and stands here in its place.
    "accuracy-near": against("blob_accuracy", "base_accuracy", None),
    "coin": against("blob_nll", "base_nll", "mle_nll"),
    "gentle": against("blob_nll", "gentle_nll", "base_nll"),
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed that has both."""
    both = {id: (role["method"], role["baseline"]) for id, role in ROLES.items()}
    judged = {
        id: [Pair(run["seed"], run[a], run[b]) for run in runs if {a, b} <= run.keys()]
        for id, (a, b) in both.items()
    }
    near = [pair._replace(method=pair.method + MARGIN) for pair in judged["accuracy"]]
    return judged | {"accuracy-near": near}


def flat(runs: list) -> list[dict]:
    """One row a setting: its name, kind, rates and seed, and its results by their own keys."""
    rows = [run for run in runs if run["kind"] != "several"]
    for run in matching(runs, kind="several"):
        for name, (kind, rate, kl_rate) in run["settings"].items():
            told = {
                k.removeprefix(f"{name}_"): v for k, v in run.items() if k.startswith(f"{name}_")
            }
            point = {"name": name, "kind": kind, "seed": run["seed"], "rate": rate}
            rows.append(point | {"kl_rate": kl_rate} | told)
    return rows
