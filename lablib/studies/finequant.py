"""The study of FineQuant (2023): bits, groups and schemes on models that were never quantized.

The paper's models and tables are out of reach; what is judged is the abstract's claims at our size.

Evaluation only: nothing is trained or calibrated, so a seed is a slice of held-out text, 4,096
tokens that no other seed shares, and a loss is that of the same tokens minus the whole model's,
token by token. `tiny-4m` is scored; MiniLM embeds the slice's passages. Its groups are fixed where
it is measured on these slices, and chosen on tuning slices alone.
Speeds are medians of turns that all ways take in one process, in the seconds of its one thread:
a first round by the wall clock counted the waiting on a busy machine, and was made again. They were
made once more when one token got a way of its own: in tiles, 4 bits had taken twice as long as
float32, and 8 bits as long.

Which groups a matrix chooses depends on a rule and on its alpha. Two rules were tried for `tiny-4m`
and for MiniLM, on slices that judge nothing: how much a range shrinks with each halving, whatever
that costs, and how much the squared range falls for each bit of scales. Each stood beside its rival
of one size, at alphas where the rival stores hardly more, so that both had as many tries. None beat
its rival on average. By shrinking alone, a matrix that begins to halve goes on to the finest
groups, since ranges of bell-shaped weights shrink faster the smaller their groups are; for MiniLM
that was far behind. By bits, matrices of `tiny-4m` choose nearly one size. The alpha that came
nearest to its rival is judged.

Fixed groups are a whole grid: 8, 4, 3 and 2 bits, one scale a row and groups of 128 to 16, levels
symmetric or not, for both models. Of it 3 and 4 bits with symmetric levels are judged, and of 8
bits a row was made with them, for `tiny-4m`; the rest came later, nothing was chosen on it, and no
claim is judged on it. Zeros of asymmetric levels count as stored bits, 16 a group like scales.
Single roles are computed in the lab.

"tasks" are MiniLM's, rounded with 3 and 4 bits and whole: how much like people its cosines order
pairs of sentences, and at what place a heading finds the section that it stands above. Pairs and
headings of a seed are no other seed's. Nothing was tuned for them. On a tuning slice rows of 3 bits
were far behind, and rows and groups of 4 bits told nothing apart: 4 bits are not judged.
"""

from functools import lru_cache
from statistics import median
from time import thread_time

import numpy as np
import torch

from lablib.compression import finequant as fq
from lablib.compression.calibration import token_losses
from lablib.compression.quantize import (
    QuantizedLinear,
    matrices,
    quantize,
    quantize_,
    rounded,
    stored_bytes,
)
from lablib.data.tasks import load_task
from lablib.embeddings import collections, evaluate
from lablib.evidence import Pair, grid, paired
from lablib.models import anatomy, pretrained
from lablib.models.weights import pretrained_path
from lablib.resources import release_memory
from lablib.training.checkpoints import corpora

LENGTH = 256
SLICES = 60  # slices that the held-out text has
PASSAGE = 128  # tokens of a passage that MiniLM reads at most


def run(
    seed: int,
    model: str = "tiny-4m",
    bits: int = 4,
    group: int | str = "row",
    scheme: str = "symmetric",
    rule: str = "fixed",
    gain: str = "per_bit",
    alpha: float = 8.0,
    role: str = "all",
    rows: int = 16,
    size: int = 4096,
) -> dict:
    """Round a model's weights and score a slice of held-out text.

    model: "tiny-4m", for the loss over the whole model's, nats a token; "minilm-l6-v2", for how far
        embeddings are from the whole model's, 1 - cosine; "tasks", see `on_tasks`; or "product",
        for the seconds of one token's product with a matrix of size x size.
    rule: "fixed" groups; "adaptive" ones, each matrix's own by gain and alpha, as
        `finequant.adaptive_groups` takes them; "equal", one size for all that stores at least as
        many bits as the adaptive ones, the baseline.
    role: of the projections that are rounded, "all" by default. rows: of 256 tokens.
    """
    if model == "product":
        return seconds_of_products(size)
    if model == "tasks":
        return on_tasks(seed, rows)
    weights = weights_of(model, role)
    chosen = groups_of(weights, rule, group, gain, alpha)
    stored = {"stored_bits": bits + scale_bits_of(weights, chosen, scheme)}
    small = {
        name: lambda w, g=chosen[name]: quantize(w, bits, group=g, scheme=scheme).dequantize()
        for name in weights
    }
    if model == "tiny-4m":
        return {"over": loss_over(small, seed, rows, role)} | stored
    return {"off": off_whole(model, small, seed, rows)} | stored


def weights_of(model: str, role: str = "all") -> dict[str, torch.Tensor]:
    """Name -> matrix of what is rounded: blocks' projections, or all of an encoder's."""
    if model == "tiny-4m":
        return matrices(scored()[0], *roles_of(role))
    return fq.linear_weights(encoder(model)[0])


def groups_of(
    weights: dict, rule: str, group: int | str, gain: str, alpha: float
) -> dict[str, int]:
    """Name -> group size."""
    if rule == "fixed":
        return {name: w.shape[1] if group == "row" else group for name, w in weights.items()}
    own = {name: own_group(w, gain, alpha) for name, w in weights.items()}
    if rule == "adaptive":
        return own
    shapes = [tuple(w.shape) for w in weights.values()]
    rivals = fq.matched_groups(shapes, fq.scale_bits(shapes, own.values()))
    return dict(zip(weights, rivals, strict=True))


def own_group(weight: torch.Tensor, gain: str, alpha: float) -> int:
    """A matrix's own choice."""
    gains = {"per_bit": fq.per_bit, "shrinking": fq.shrinking}
    return fq.adaptive_groups(fq.ranges(weight), alpha, gains[gain])


def scale_bits_of(weights: dict, chosen: dict[str, int], scheme: str) -> float:
    """Bits that scales add to a weight, and zeros where a scheme has them."""
    shapes = [tuple(w.shape) for w in weights.values()]
    return fq.scale_bits(shapes, chosen.values()) * (2 if scheme == "asymmetric" else 1)


def loss_over(small: dict, seed: int, rows: int, role: str) -> float:
    """How much rounding adds to the loss of `tiny-4m`, a mean over the same tokens."""
    model, _ = scored()
    whole = whole_losses(seed, rows)
    with rounded(model, lambda name, w: small[name](w), *roles_of(role)):
        losses = token_losses(model, slice_of(seed, rows))
    return (losses.double() - whole.double()).mean().item()


def with_other_scales(bits: int, group: int | str, factor: float, seed: int, rows: int) -> float:
    """The same where every scale is `factor` times what it would be: how much is luck?"""

    def stretched(w: torch.Tensor) -> torch.Tensor:
        small = quantize(w, bits, group=group)
        options = {"scale": factor * small.scale, "zero": small.zero}
        return quantize(w, bits, group=group, **options).dequantize()

    return loss_over(dict.fromkeys(weights_of("tiny-4m"), stretched), seed, rows, "all")


def roles_of(role: str) -> tuple[str, ...]:
    """As `matrices` takes them."""
    return () if role == "all" else (role,)


@lru_cache(maxsize=1)
def scored() -> tuple:
    """`tiny-4m` and its tokenizer."""
    return pretrained("tiny-4m")


@lru_cache(maxsize=1)
def held_out() -> torch.Tensor:
    """(rows, LENGTH + 1) of all documents that were held out, in one random order."""
    _, tokenizer = scored()
    texts = [document.text for part in corpora()[1].values() for document in part]
    ids = [token for row in tokenizer(texts)["input_ids"] for token in row]
    table = torch.tensor(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)]).view(-1, LENGTH + 1)
    return table[torch.from_numpy(np.random.default_rng(0).permutation(len(table)))]


def slice_of(seed: int, rows: int) -> torch.Tensor:
    """(rows, LENGTH + 1): 16 rows belong to a seed and to no other."""
    start = 16 * (seed % SLICES)
    return held_out()[start : start + rows]


@lru_cache(maxsize=8)
def whole_losses(seed: int, rows: int) -> torch.Tensor:
    """Of the model as it is."""
    return token_losses(scored()[0], slice_of(seed, rows))


def passages(seed: int, rows: int) -> list[str]:
    """The slice's rows as text."""
    _, tokenizer = scored()
    return [tokenizer.decode(row) for row in slice_of(seed, rows)]


@lru_cache(maxsize=1)
def encoder(name: str) -> tuple:
    """An encoder of transformers from the models that set-up prepares, and its tokenizer."""
    from transformers import AutoTokenizer, BertModel

    folder = pretrained_path(name)
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embed(name: str, texts: list[str]) -> torch.Tensor:
    """(texts, dim): means over a text's tokens, of length 1."""
    model, tokenizer = encoder(name)
    options = {"padding": True, "truncation": True, "max_length": PASSAGE, "return_tensors": "pt"}
    given = tokenizer(texts, **options)
    with torch.no_grad():
        states = model(**given).last_hidden_state  # (texts, length, dim)
    mask = given["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def off_whole(name: str, small: dict, seed: int, rows: int) -> float:
    """1 - the cosine between the rounded and the whole model's embedding, a mean over passages."""
    texts, weights = passages(seed, rows), fq.linear_weights(encoder(name)[0])
    whole = embed(name, texts)
    kept = {key: weight.detach().clone() for key, weight in weights.items()}
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(small[key](weight))
        near = (whole * embed(name, texts)).sum(1).mean().item()
        for key, weight in weights.items():
            weight.copy_(kept[key])
    return 1 - near


ROUNDED = {"whole": None, "4_row": (4, "row"), "3_row": (3, "row"), "3_32": (3, 32)}


def on_tasks(seed: int, rows: int, name: str = "minilm-l6-v2") -> dict:
    """What an encoder's embeddings are good for, whole and rounded, as ROUNDED names it.

    people_...: Spearman's rank correlation of the cosine of 2 x rows pairs of sentences with what
        people said (STS-B). search_...: nDCG@10 of rows headings, each looking for its section.
    """
    (a, b, said), (headings, sections) = pairs_of(seed, rows)
    weights = fq.linear_weights(encoder(name)[0])
    kept, found = {key: weight.detach().clone() for key, weight in weights.items()}, {}

    def put(how) -> None:
        with torch.no_grad():
            for key, w in kept.items():
                new = quantize(w, how[0], group=how[1]).dequantize() if how else w
                weights[key].copy_(new)

    for word, how in ROUNDED.items():
        put(how)
        scores = embed(name, headings) @ embed(name, sections).t()
        search = evaluate.retrieval(scores, range(rows))["ndcg@10"]
        people = evaluate.sts(embed(name, a), embed(name, b), said)["spearman"]
        found |= {f"people_{word}": round(people, 5), f"search_{word}": round(search, 5)}
    put(None)
    return found


def pairs_of(seed: int, rows: int) -> tuple[tuple, tuple]:
    """Sentences, sentences and people's ratings; headings and the sections below them.

    Of the test splits, other ones for each seed; of the validation splits for seeds from 100 on.
    """
    split = "test" if seed < 100 else "validation"
    rated = [(e.text, e.pair, e.label) for e in getattr(load_task("sts-b"), split)]
    named = [(head, body) for head, body in collections.pairs("headings", split)]
    return (
        tuple(zip(*part_of(rated, seed, 2 * rows), strict=True)),
        tuple(zip(*part_of(named, seed, rows), strict=True)),
    )


def part_of(items: list, seed: int, n: int) -> list:
    """n of them, mixed, that no other seed below len(items) / n has."""
    order = np.random.default_rng(0).permutation(len(items))
    start = seed % (len(items) // n) * n
    return [items[place] for place in order[start : start + n]]


def seconds_of_products(size: int = 4096, tokens: int = 1, repeats: int = 15) -> dict:
    """The median seconds of each way to multiply with a matrix of size x size.

    Of this thread's own time, so that nobody else's work on the processor counts.
    """
    made, times = ways(size, tokens), {}
    for _ in range(repeats):
        for key, way in made.items():
            start = thread_time()
            way()
            times.setdefault(key, []).append(thread_time() - start)
    return {key: median(seconds[2:]) for key, seconds in times.items()}


def ways(size: int, tokens: int) -> dict:
    """Products of the same shape: in float32, in our layers, and in torch's own fused ops.

    int8 has one scale a row, int4 one for each 64 neighbours. Ours read one token from codes that
    lie ready for it, as they do from a model's second token on; "half" is their input in bfloat16.
    """
    torch.manual_seed(0)
    weight, x = torch.randn(size, size) / size**0.5, torch.randn(tokens, size)
    small = {8: quantize(weight, 8), 4: quantize(weight, 4, group=64)}
    ours = {bits: QuantizedLinear(matrix) for bits, matrix in small.items()}
    half, short = x.bfloat16(), weight.bfloat16()
    signed, by = (small[8].codes.int() - 127).to(torch.int8), small[8].scale[:, 0].bfloat16()
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(small[4].codes.int(), 1)
    scales = small[4].scale
    both = torch.stack([scales, scales], -1).transpose(0, 1).contiguous().bfloat16()
    return {
        "float32_seconds": lambda: x @ weight.t(),
        "bfloat16_seconds": lambda: half @ short.t(),
        "int8_seconds": lambda: ours[8](x),
        "int4_seconds": lambda: ours[4](x),
        "half_int4_seconds": lambda: ours[4](half),
        "fused_int8_seconds": lambda: torch._weight_int8pack_mm(half, signed, by),
        "fused_int4_seconds": lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
            half, codes, 64, both
        ),
    }


def at_work(name: str, text: str, bits: int = 0, group: int = 0) -> tuple[float, float, float]:
    """A model with packed projections, or whole without bits: asymmetric, in groups.

    Returns its loss on 256 tokens of a text, its megabytes, and how many tokens it writes in a
    second of its thread's own time.
    """
    release_memory()
    model, tokenizer = pretrained(name)
    for role in anatomy.family(model).projections if bits else ():
        quantize_(model, bits, role, group=group, scheme="asymmetric")
        release_memory()
    ids = torch.tensor(tokenizer(text)["input_ids"][:257])
    model.generate(ids[:8], 2, greedy=True)  # lays codes out for one token at a time
    start = thread_time()
    model.generate(ids[:8], 16, greedy=True)
    speed = 16 / (thread_time() - start)
    return token_losses(model, ids[None]).mean().item(), stored_bytes(model) / 1e6, speed


SIZES = ("row", 128, 64, 32, 16)
BITS = (8, 4, 3, 2)
SCHEMES = ("symmetric", "asymmetric")
SEEDS = range(5)
TINY = {"model": "tiny-4m", "scheme": "symmetric", "role": "all"}
MINI = {"model": "minilm-l6-v2", "scheme": "symmetric"}
TUNED = {"gain": "per_bit", "alpha": 9.0}
ALPHAS = {  # at which the rival stores hardly more
    "tiny-4m": {"per_bit": (5.25, 9.0, 20.0, 40.0), "shrinking": (0.072, 0.076, 0.084, 0.1)},
    "minilm-l6-v2": {"per_bit": (7.5, 20.0, 45.0), "shrinking": (0.094,)},
}


def tried(kind: dict) -> list[dict]:
    """Every gain and alpha, and the rival of each."""
    points = []
    for gain, alphas in ALPHAS[kind["model"]].items():
        rules = {"rule": ("adaptive", "equal"), "gain": gain, "alpha": alphas}
        points += grid(**kind, bits=3, **rules, seed=(100, 101))
    return points


def every_way(kind: dict) -> list[dict]:
    """A model in all bits, fixed groups and schemes, on every slice that judges."""
    kinds = kind | {"scheme": SCHEMES, "rule": "fixed"}
    return grid(**kinds, bits=BITS, group=SIZES, seed=SEEDS)


TUNING = tried(TINY) + tried(MINI)
POINTS = [
    *every_way(TINY),
    *grid(**TINY, rule=("adaptive", "equal"), bits=(3, 4), **TUNED, seed=SEEDS),
    *grid(model="product", size=4096, seed=SEEDS),
    *grid(model="tasks", rows=100, seed=SEEDS),
    *every_way(MINI),
]
CANARY = {"seed": 200, "bits": 3, "rule": "adaptive", "alpha": 20.0, "rows": 2}


def _at(bits: int, group: int | str) -> dict:
    return TINY | {"rule": "fixed", "bits": bits, "group": group}


def _by(rule: str, bits: int) -> dict:
    return TINY | {"rule": rule, "bits": bits}


def _seconds(method: str, baseline: str, control: str | None = None) -> dict:
    sides = {"method": method, "baseline": baseline, "control": control}
    return {side: way and f"{way}_seconds" for side, way in sides.items()}


# Groups of 64 for all matrices were chosen by nothing, and store a little more than chosen ones.
# The rest have no control: all groups that are stored are finer than a row, "gain" needs groups of
# 32 at other bits, and what is not float32 has fewer bytes, too.
ROLES = {
    "adaptive": {"method": _by("adaptive", 3), "baseline": _by("equal", 3), "control": _at(3, 64)},
    "adaptive-4": {
        "method": _by("adaptive", 4),
        "baseline": _by("equal", 4),
        "control": _at(4, 64),
    },
    "finer": {"method": _at(3, 32), "baseline": _at(3, "row"), "control": None},
    "finer-4": {"method": _at(4, 32), "baseline": _at(4, "row"), "control": None},
    "gain": {"method": {"bits": 3}, "baseline": {"bits": 4}, "control": None},
    "speed": _seconds("int4", "float32"),
    "speed-8": _seconds("int8", "float32"),
    "fused": _seconds("fused_int4", "bfloat16", "float32"),
    # No control is stored: groups of as many weights that are no neighbours.
    "people": {"method": "people_3_32", "baseline": "people_3_row", "control": None},
    "search": {"method": "search_3_32", "baseline": "search_3_row", "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed; and a number that no run is needed for."""
    made = {}
    for id, sides in ROLES.items():
        if id == "gain":
            continue
        if isinstance(sides["method"], str):
            timed = [run for run in runs if sides["method"] in run]
            made[id] = [
                Pair(run["seed"], run[sides["method"]], run[sides["baseline"]]) for run in timed
            ]
        else:
            made[id] = paired(runs, sides["method"], sides["baseline"], "over")
    three, four = (gains(runs, ROLES["gain"][side]["bits"]) for side in ("method", "baseline"))
    made["gain"] = [Pair(seed, three[seed], four[seed]) for seed in sorted(three)]
    return made | {"bits": [fewer_bytes()]}


def fewer_bytes() -> float:
    """A matrix's bytes in 16 bits, over those in 4 with a scale for each 64 neighbours."""
    weight = torch.linspace(-1, 1, 2**12).view(16, 256)
    return weight.half().nbytes / quantize(weight, 4, group=64).stored_bytes()


def gains(runs: list, bits: int) -> dict[int, float]:
    """What groups of 32 take off a row's loss, seed by seed."""
    pairs = paired(runs, _at(bits, 32), _at(bits, "row"), "over")
    return {pair.seed: pair.baseline - pair.method for pair in pairs}


PEER_CASES = [
    (kind, bits, group)
    for kind in ("given", "clipped", "integer-zero")
    for bits in (4, 8)
    for group in (32, 64, 128)
]


def peer_weight() -> torch.Tensor:
    """(1, 128) from no random generator: what torchao's recorded values are about."""
    k = torch.arange(128, dtype=torch.float64)
    return (torch.sin(0.7 * k**2) * (1 + 0.3 * torch.cos(k))).float()[None]


def peer_small(kind: str, bits: int, group: int):
    """Our version of a recorded case: torchao given our scales, or with its own two mappings."""
    scheme = "symmetric" if kind == "given" else kind
    options = {"scheme": scheme, "scale_dtype": torch.float32}
    return quantize(peer_weight(), bits, group=group, **options)


def peer_values(kind: str, bits: int, group: int) -> dict[str, list]:
    """Codes as torchao counts them, scales, and dequantized weights."""
    small = peer_small(kind, bits, group)
    first = {"given": 2 ** (bits - 1) - 1, "clipped": 2 ** (bits - 1), "integer-zero": 0}[kind]
    return {
        "scale": small.scale.flatten().tolist(),
        "codes": (small.codes.flatten().int() - first).tolist(),
        "back": small.dequantize().flatten().tolist(),
    }
