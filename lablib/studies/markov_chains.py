"""The study of Large Language Models as Markov Chains (2024): forgetting, learning in context.

Kind "toy" is the paper's toy chain (section 3.2): a small GPT of two tokens that reads three,
trained on 40 bits of which each is the parity of the three before it. The paper does not say for
how long; the steps of training were fixed on the tuning seeds as those after which temperature 1
needs about as many steps to forget as the paper reports. Forgotten means a distance of 1/100.

Kind "in-context": a pretrained model reads a chain of three symbols, drawn anew for each prompt,
and predicts the next one at every position. Its rivals count: what followed the present symbol so
far; or only how frequent each symbol was, which knows nothing of transitions. How the chain is
spelled was tuned for the model, what is added to each count for the rivals, with as many tries.
Digits and commas, the paper's spelling, left the model above the context-free rival at every length
on the tuning seed; letters and commas were best; without commas it learned least.

"both" is for the canary alone.
"""

from functools import lru_cache

import numpy as np
import torch

from lablib.data import MarkovSource
from lablib.evidence import Pair, grid
from lablib.models import GPT, GPTConfig, pretrained
from lablib.scaling.fits import fit_power_law
from lablib.theory import convergence
from lablib.theory.few_symbols import parity_text
from lablib.theory.in_context import (
    frequency_predictions,
    in_context_predictions,
    in_context_risk,
    octaves,
    symbol_share_predictions,
)
from lablib.theory.markov_chains import next_token_logits, transition_matrix
from lablib.training import fit

FORGOTTEN = 0.01  # total-variation distance
LIMIT = 10**12  # steps; beyond, a double holds too few digits of one minus an eigenvalue
FIRST = 4  # the position at which the first octave begins
SPELLINGS = {
    "digits,": ("012", ","),
    "digits": ("012", ""),
    "letters,": ("abc", ","),
    "letters": ("abc", ""),
}


def run(
    seed: int,
    kind: str = "toy",
    steps: int = 175,
    reader: str = "smollm2-135m-instruct",
    spelling: str = "digits,",
    smoothing: float = 1.0,
    chains: int = 6,
    length: int = 256,
) -> dict:
    """One toy chain, or one set of prompts that a pretrained model reads; see the module.

    steps: of the toy's training. reader: the model's name. spelling: one of SPELLINGS. smoothing:
    added to each count of the rivals. chains: how many prompts, each of a chain of its own. length:
    of a prompt, in symbols.
    """
    made = {}
    if kind in ("toy", "both"):
        made |= toy(seed, steps)
    if kind in ("in-context", "both"):
        made |= in_context(seed, reader, spelling, smoothing, chains, length)
    return made


def toy_logits(seed: int, steps: int) -> np.ndarray:
    """The trained toy's logits after each of its 14 states: (14, 2)."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=2, dim=16, n_layers=4, n_heads=4, max_length=8))
    rows = torch.as_tensor(parity_text(40)).unfold(0, 4, 1)  # 37 rows: three bits, and the next
    options = {"schedule": "constant", "progress": False, "compile": False}
    fit(model, [rows], steps=steps, lr=1e-3, seed=seed, **options)
    return next_token_logits(model.eval(), 3, range(2))


def toy(seed: int, steps: int) -> dict:
    """Steps until the toy has forgotten its prompt, at the paper's three temperatures."""
    logits = toy_logits(seed, steps)
    needed = {"cold": 0.2, "one": 1.0, "hot": 2.0}
    return {f"steps_{name}": forgetting_time(logits, 3, t) for name, t in needed.items()}


def forgetting_time(logits: np.ndarray, context: int, temperature: float) -> int:
    """Steps until the distance is FORGOTTEN at most, from every full context; LIMIT at most."""
    matrix = transition_matrix(logits, context, temperature)
    stationary = convergence.stationary_distribution(matrix)
    try:
        return convergence.mixing_time(matrix, stationary, FORGOTTEN, LIMIT)
    except ValueError:
        return LIMIT


@lru_cache(maxsize=1)
def reading(name: str):
    """A pretrained model and its tokenizer, loaded once."""
    return pretrained(name)


def prompts_of(seed: int, chains: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts (chains, length) of three symbols, and the matrices (chains, 3, 3) they come from."""
    sources = [MarkovSource(3, seed=1000 * seed + chain) for chain in range(chains)]
    prompts = np.stack([source.sample(length, seed=seed) for source in sources])
    return prompts, np.stack([source.transition for source in sources])


def predictions_of(prompts: np.ndarray, reader: str, spelling: str, smoothing: float) -> dict:
    """Who predicts -> what is expected next at every position: (chains, length, 3)."""
    model, tokenizer = reading(reader)
    letters, separator = SPELLINGS[spelling]
    symbols = [tokenizer.encode(letter)[0] for letter in letters]
    after = tokenizer.encode(separator)[0] if separator else None
    return {
        "model": in_context_predictions(model, symbols, prompts, after),
        "symbols": symbol_share_predictions(prompts, 3, smoothing),
        "transitions": frequency_predictions(prompts, 3, smoothing),
        "equal": np.full((*prompts.shape, 3), 1 / 3),
    }


def in_context(seed, reader, spelling, smoothing, chains, length) -> dict:
    """Each one's risk over all positions, its mean in each octave, and the exponent of those."""
    prompts, transitions = prompts_of(seed, chains, length)
    made = {}
    for who, predicted in predictions_of(prompts, reader, spelling, smoothing).items():
        risk = in_context_risk(predicted, prompts, transitions)
        centers, means = octaves(risk, FIRST)
        made |= {f"risk_{who}": risk.mean(), f"octaves_{who}": means.round(5)}
        made[f"exponent_{who}"] = fit_power_law(centers, means).exponent
    return made | {"centers": centers.round(3)}


SEEDS = range(10, 22)
POINTS = [
    *grid(kind="toy", steps=175, seed=SEEDS),
    *grid(kind="in-context", spelling="letters,", smoothing=2.0, seed=SEEDS),
]
TUNING = [
    *grid(kind="toy", steps=(100, 150, 175, 200, 300), seed=(100, 101)),
    *grid(kind="in-context", spelling=list(SPELLINGS), smoothing=1.0, seed=100),
    *grid(kind="in-context", spelling="digits,", smoothing=(0.25, 0.5, 2.0), seed=100),
]
CANARY = {"seed": 200, "kind": "both", "steps": 5, "reader": "tiny-1m", "chains": 2, "length": 16}

ROLES = {
    "temperature": {"method": "steps_hot", "baseline": "steps_one", "control": "steps_cold"},
    "in-context-risk": {
        "method": "octaves_model",
        "baseline": "octaves_symbols",
        "control": "octaves_equal",
    },
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed; for the exponent, a number a seed.

    The risk is that of the last octave: what a model has learned shows where the prompt is long.
    """
    toys = [run for run in runs if "steps_one" in run]
    readers = [run for run in runs if "octaves_model" in run]
    hot, one = (ROLES["temperature"][side] for side in ("method", "baseline"))
    model, symbols = (ROLES["in-context-risk"][side] for side in ("method", "baseline"))
    return {
        "temperature": [Pair(run["seed"], run[hot], run[one]) for run in toys],
        "in-context-risk": [Pair(run["seed"], run[model][-1], run[symbols][-1]) for run in readers],
        "in-context-exponent": [run["exponent_model"] for run in readers],
    }
