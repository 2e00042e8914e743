"""The shared study of the scaling-law labs: one grid of small trainings on bytes of prose.

Every model starts from weights of deviation dim^-0.5, not from the usual 0.02: lab 401 shows why.
- size-data: eight sizes, and each doubling of a quarter of a MiB up to 8 MiB for which size times
  bytes stays below 5.6e11. On seed 100 three rates a factor 2 apart were tried at 13 pairs of size
  and text. The judging seeds have one rate a width, 0.7 / dim, which lies near the best of them. In
  7 of the 13 pairs the best was at an end of the three: the highest, 0.04, for 1x16 with either
  text, for 1x32 with 2 MiB and for 2x32 with a quarter; the lowest for 2x48, 3x96 and 4x160 with a
  quarter. So a single cell may lie a little above what its size could reach.
- batch-rate: batches of 64 to 8,192 bytes, with 128 KiB up to 4,096 and with 2 MiB from 128; the
  largest size has 64 with the least text alone. Three rates by a formula of width and batch; where
  the best lay at an end on seed 100, all seeds have one more beyond it. Texts are 128 KiB, 512 KiB
  and 2 MiB in the place of 256 KiB, 1 and 4 MiB, for time.
- steps: batches of 256 to 16,384 bytes; three rates a factor 2 apart on every seed for the two
  sizes that were planned, one rate for a third. They read 2 MiB, and more where a large batch comes
  later to a loss. The middle rate is by a formula, or half of that where it was better on seed 100,
  which tried three at five batches, and a fourth where the highest was the best of a large batch.
- repetition: 64 KiB, 256 KiB and 1 MiB of text, each read again and again by three sizes until
  4 MiB are seen; 2 MiB by the largest.
The grid has grown four times, on the same judging seeds and by designs fixed before the new rows
were made: `at_first` are the rows of batch-rate that the labs judged first; last came the three
rates of steps and 2 MiB for all its batches, in the place of one rate and 1 MiB for most.

The plan reckoned with 303 minutes of one core, and with fewer seeds and no 4 MiB in batch-rate
beyond 360. The judging runs took about 600, and those for tuning 110. All five seeds and the whole
range of batches are kept; cut are the texts of batch-rate, by half.

Noise: lab 401 measures what the seeds of a cell of size-data differ by. It is about ten times the
delta, 1e-3, of the fits' Huber loss, which on this grid counts nearly every residual linearly.
"""

import math
from functools import partial

import torch

from lablib.data import Batches, byte_text
from lablib.evidence import grid
from lablib.models import GPT, GPTConfig
from lablib.training import evaluate, fit
from lablib.training.optimizers import adamw
from lablib.training.schedules import learning_rate_factor

KB, MB = 2**10, 2**20
SIZES = ((1, 16), (1, 32), (2, 32), (2, 48), (3, 64), (3, 96), (4, 112), (4, 160))
CURVE, FINAL = 128, 512  # held-out windows of 128 bytes: of a curve's points, of the final loss


def run(
    part: str,
    seed: int,
    n_layers: int,
    dim: int,
    tokens: int,
    batch: int,
    lr: float,
    unique: int | None = None,
    length: int = 128,
    schedule: str = "cosine",
    end_lr: float | None = None,
    init: float | None = None,
    points: int = 8,
    averages: tuple[float, ...] = (),
) -> dict:
    """Train one model on bytes; its final held-out loss in nats a byte, and its curve.

    part: what the point is for; it changes nothing. tokens: bytes seen; batch: bytes a step; both
        are whole numbers of `length`. unique: bytes that are there to be seen, else all are new.
    end_lr: the rate that a cosine falls to, else a tenth of the peak. init: deviation of
        the weights, else dim^-0.5.
    points: of the curve, evenly spaced, on a quarter of the text that the final loss is taken on.
    averages: decays per step of averaged weights, each evaluated as the curve is.
    """
    text = byte_text()
    rows = [text.windows(length, limit * 128 // length) for limit in (CURVE, FINAL)]
    model = build(seed, n_layers, dim, init)
    steps = tokens // batch
    every = max(1, steps // points)
    watch = weight_averages(averages, rows[0], every)
    own = [] if end_lr is None else [falling_to(end_lr / lr, steps)]
    history = fit(
        model,
        Batches(text.first(unique or tokens, length), batch // length, length, seed),
        steps=steps,
        optimizer=adamw(lr, betas=(0.9, 0.95 if batch >= 1024 else 0.99)),
        schedule=schedule,
        seed=seed,
        held_out=rows[0],
        held_out_every=every,
        progress=False,
        callbacks=[*watch, *own],
    )
    curve = [round(loss, 4) for _, loss in history.held_out]
    made = {
        "N": model.n_parameters(embeddings=False),
        "N_total": model.n_parameters(),
        "loss": round(evaluate(model, rows[1]), 5),
        "best_loss": min(curve),
        "train_loss": round(sum(history.losses[-every:]) / every, 4),
        "curve": curve,
    }
    if averages:
        made["averaged"] = [[round(loss, 4) for _, loss in c] for c in watch[0].curves]
    return made


def build(seed: int, n_layers: int, dim: int, init: float | None) -> GPT:
    """A model of the grid: heads of 16, bytes, room for 128 of them."""
    torch.manual_seed(seed)
    return GPT(
        GPTConfig(
            vocab_size=256,
            dim=dim,
            n_layers=n_layers,
            n_heads=dim // 16,
            max_length=128,
            init_std=dim**-0.5 if init is None else init,
        )
    )


def falling_to(floor: float, steps: int) -> object:
    """The callback of a cosine that ends at another share of the peak than a tenth."""
    from lablib.training.rates import OwnSchedule  # it imports Lightning

    warmup = math.ceil(0.05 * steps)
    return OwnSchedule(
        partial(learning_rate_factor, steps=steps, schedule="cosine", warmup=warmup, floor=floor)
    )


def weight_averages(decays: tuple[float, ...], held_out: list, every: int) -> list:
    """The callback that averages weights, in a list; none without decays."""
    if not decays:
        return []
    from lablib.scaling.averages import WeightAverages  # it imports Lightning

    return [WeightAverages(decays, held_out, every)]


def tuning_of_size_and_data() -> list[dict]:
    """Three rates a factor 2 apart, at the least data, and at more up to dim 64."""
    ends = [2, 2, 2, 2, 1, None, None, None]
    points = []
    for (n_layers, dim), end in zip(SIZES, ends):
        middle = 0.02 if dim <= 48 else 0.01 if dim <= 96 else 0.005
        tokens = [MB // 4] + ([end * MB] if end else [])
        lr = (middle / 2, middle, middle * 2)
        size = {"n_layers": n_layers, "dim": dim, "batch": 2048}
        points += grid(part="size-data", seed=100, **size, tokens=tokens, lr=lr)
    return points


def rate(dim: int) -> float:
    """The best rate of a width, as tuned; it hardly moves with the data."""
    return round(0.7 / dim, 4)


def size_and_data() -> list[dict]:
    """Every size with 0.25 MiB and its doubles, while size times bytes stays below 5.6e11."""
    most = (8, 8, 8, 8, 2, 1, 0.5, 0.25)  # MiB
    return [
        point
        for (n_layers, dim), end in zip(SIZES, most)
        for point in grid(
            part="size-data",
            seed=range(5),
            n_layers=n_layers,
            dim=dim,
            tokens=[MB // 4 * 2**i for i in range(6) if 2**i / 4 <= end],
            batch=2048,
            lr=rate(dim),
        )
    ]


def repetition() -> list[dict]:
    """2, 4, 8, ... epochs of little text; one epoch of as many bytes is in `size_and_data`."""
    most = {
        (1, 32): {64 * KB: 4 * MB, 256 * KB: 4 * MB, MB: 4 * MB},
        (2, 48): {64 * KB: 4 * MB, 256 * KB: 4 * MB, MB: 4 * MB},
        (3, 64): {64 * KB: 2 * MB, 256 * KB: 2 * MB, MB: 2 * MB},
    }
    return [
        point
        for (n_layers, dim), ends in most.items()
        for unique, end in ends.items()
        for point in grid(
            part="repetition",
            seed=range(5),
            n_layers=n_layers,
            dim=dim,
            tokens=[unique * 2**i for i in range(1, 7) if 256 * KB <= unique * 2**i <= end],
            batch=2048,
            lr=rate(dim),
            unique=unique,
        )
    ]


WINDOWS = (16 * KB, 48 * KB, 144 * KB)  # bytes that an average of the weights looks back over


def to_a_loss(
    seed: int | range, n_layers: int, dim: int, batch: int, lr, text: tuple
) -> list[dict]:
    """Constant rate, three averages of the weights: how many steps a batch needs.

    text: bytes that are seen, and points of a curve.
    """
    decays = [round(math.exp(-batch / window), 5) for window in WINDOWS]
    tokens, points = text
    size = {"n_layers": n_layers, "dim": dim, "tokens": tokens, "batch": batch, "lr": lr}
    points = grid(part="steps", seed=seed, **size, schedule="constant", points=points)
    return [point | {"averages": decays} for point in points]


def tuning_of_steps() -> list[dict]:
    """Three rates a factor 2 apart at five batches, and with less text than the judging runs."""
    points = []
    for n_layers, dim in ((1, 32), (2, 48), (3, 64)):
        for batch, text in ((8192, (2 * MB, 32)), (16384, (4 * MB, 64))):
            tried = (4, 2, 1) if dim == 48 else (4, 2, 1, 0.5)  # one more where the highest won
            lr = [round(steps_rate(dim, batch) / n, 4) for n in tried]
            points += to_a_loss(100, n_layers, dim, batch, lr, text)
    for n_layers, dim in ((1, 32), (2, 48), (3, 64)):
        for batch in (256, 1024, 4096):
            middle = 0.02 * math.sqrt(batch / 2048) * 32 / dim
            lr = [round(middle * factor, 4) for factor in (0.5, 1, 2)]
            points += to_a_loss(100, n_layers, dim, batch, lr, (MB, 32))
    return points


def steps_rate(dim: int, batch: int) -> float:
    """The best constant rate of a width and a batch for averaged weights, as tuned up to 4,096."""
    return round(0.0125 * (32 / dim) ** 1.25 * (batch / 1024) ** 0.4, 4)


HALF_RATE = {(48, 8192), (48, 16384)}  # dim, batch: half of the formula's was the best tried
FACTORS = {32: (0.5, 1, 2), 48: (0.5, 1, 2), 64: (1,)}  # of the tuned rate, by dim


def tuned_rate(dim: int, batch: int, factor: float = 1) -> float:
    """The rate of a width and a batch that was the best on the tuning seed, times a factor."""
    return round(steps_rate(dim, batch) / (1 + ((dim, batch) in HALF_RATE)) * factor, 4)


def rates_to_a_loss(dim: int, batch: int) -> list[float]:
    """The tuned rate, and those a factor 2 below and above it."""
    return [tuned_rate(dim, batch, factor) for factor in FACTORS[dim]]


def text_to_a_loss(dim: int, batch: int) -> tuple[int, int]:
    """Bytes seen, and points of a curve: 2 MiB, and more for batches that come to a loss later."""
    if dim == 32:
        more = {4096: (3 * MB, 48), 8192: (4 * MB, 32), 16384: (8 * MB, 64)}
    else:
        more = {8192: (3 * MB, 48), 16384: (4 * MB, 32)}
    return more.get(batch, (2 * MB, 32))


def steps_to_a_loss() -> list[dict]:
    """Three sizes, seven batches a factor 2 apart, from 256 bytes; two or three rates of each."""
    return [
        point
        for seed in range(5)
        for n_layers, dim in ((1, 32), (2, 48), (3, 64))
        for batch in [256 * 2**i for i in range(7)]
        for point in to_a_loss(
            seed, n_layers, dim, batch, rates_to_a_loss(dim, batch), text_to_a_loss(dim, batch)
        )
    ]


def middle_rate(dim: int, batch: int) -> float:
    """The middle of a cell's three rates under a cosine to a fixed floor, as tuned."""
    return 0.0125 * (32 / dim) ** 1.9 * (batch / 256) ** 0.4


def three_rates(dim: int, batch: int) -> list[float]:
    """The middle rate of a cell, and those a factor 2.2 below and above it."""
    return [float(f"{middle_rate(dim, batch) * 2.2**i:.3g}") for i in (-1, 0, 1)]


BATCHES = [64 * 2**i for i in range(8)]  # bytes a step: up to 8,192
BATCH_AND_RATE = (  # layers, dim, bytes seen, batches: the largest take 32 steps or more
    (1, 32, MB // 8, BATCHES[:-1]),
    (1, 32, MB // 2, BATCHES),
    (1, 32, 2 * MB, BATCHES[1:]),
    (2, 48, MB // 8, BATCHES[:-1]),
    (2, 48, MB // 2, BATCHES),
    (3, 64, MB // 8, BATCHES[:-1]),
    (3, 64, MB // 2, BATCHES[1:]),
)


# dim, bytes seen: batches whose best rate lay at an end of the three on the tuning seed; and 2,048
# bytes for the least text, so that it has as many tries as the most
LOWER = {
    (32, MB // 8): [2048, 4096],
    (32, MB // 2): [4096, 8192],
    (32, 2 * MB): [8192],
    (48, MB // 8): [4096],
    (48, MB // 2): [8192],
    (64, MB // 2): [8192],
}
HIGHER = {(32, MB // 2): [128], (32, 2 * MB): [2048], (64, MB // 8): [256, 512, 1024]}


def rates(dim: int, tokens: int, batch: int) -> list[float]:
    """A cell's three rates, and one beyond the end at which the best of them lay."""
    low, middle, high = three_rates(dim, batch)
    at = (dim, tokens)
    more = [low / 2.2] * (batch in LOWER.get(at, [])) + [high * 2.2] * (batch in HIGHER.get(at, []))
    return [low, middle, high, *(float(f"{lr:.3g}") for lr in more)]


def batch_and_rate(seed: int) -> list[dict]:
    """Batches a factor 2 apart, rates a factor 2.2 apart; sequences of 64 bytes."""
    return [
        point
        for n_layers, dim, tokens, batches in BATCH_AND_RATE
        for batch in batches
        for point in grid(
            part="batch-rate",
            seed=seed,
            n_layers=n_layers,
            dim=dim,
            tokens=tokens,
            batch=batch,
            lr=rates(dim, tokens, batch),
            length=64,
            end_lr=1e-5,
            points=2,
        )
    ]


def at_first(rows: list[dict]) -> list[dict]:
    """The rows of batch-rate that were judged first: three rates, and fewer batches and texts."""
    few = {"tokens": (MB // 8,), "batch": (128, 512, 2048)}  # of the largest size
    return [
        r
        for r in rows
        if r["lr"] in three_rates(r["dim"], r["batch"])
        and r["batch"] <= (4096 if r["tokens"] == 2 * MB else 2048)
        and (r["dim"] < 64 or all(r[key] in few[key] for key in few))
    ]


POINTS = sorted(
    [
        *size_and_data(),
        *repetition(),
        *steps_to_a_loss(),
        *(point for seed in range(5) for point in batch_and_rate(seed)),
    ],
    key=lambda point: point["seed"],
)
LIMIT_KB = 1000
TUNING = [*tuning_of_size_and_data(), *tuning_of_steps(), *batch_and_rate(100)]
CANARY = {
    "part": "canary",
    "seed": 7,
    "n_layers": 1,
    "dim": 16,
    "tokens": 8 * KB,
    "batch": 1024,
    "lr": 0.01,
    "unique": 4 * KB,
    "end_lr": 1e-5,
    "points": 2,
    "averages": [0.5],
}
