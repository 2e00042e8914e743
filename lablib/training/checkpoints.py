"""Train our own small checkpoints: `python -m lablib.training.checkpoints tiny-1m tiny-2m`.

Each is trained on the set-up corpora, with documents held out from every one of them, and
written to data/models/NAME: bfloat16 weights, config, tokenizer and training.json, which tells
what was trained on and what the model reaches. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lablib import data
from lablib.files import atomic_write, write_json
from lablib.models import GPT, GPTConfig
from lablib.paths import cache_dir, data_dir
from lablib.training import evaluate, fit

# Characters taken of each corpus; None takes all. Python's source is cut to prose's size.
CORPORA = {"shakespeare": None, "bible": None, "python-docs": None, "python-source": 4_000_000}
HELD_OUT = 0.05
VOCAB = 4096
LENGTH = 256


class Recipe(NamedTuple):
    """What differs between our checkpoints."""

    config: GPTConfig
    steps: int
    batch_size: int
    lr: float


def _config(dim: int, n_layers: int, ffn_dim: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=VOCAB,
        dim=dim,
        n_layers=n_layers,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=ffn_dim,
        max_length=LENGTH,
    )


RECIPES = {
    "tiny-1m": Recipe(_config(128, 3, 352), steps=2400, batch_size=8, lr=4e-3),
    "tiny-2m": Recipe(_config(128, 8, 352), steps=3000, batch_size=8, lr=4e-3),
    "tiny-4m": Recipe(_config(256, 4, 688), steps=4000, batch_size=8, lr=3e-3),
}
Texts = Mapping[str, list]


def corpora(names: Mapping[str, int | None] = CORPORA, seed: int = 0) -> tuple[Texts, Texts]:
    """Documents to train on and to hold out, by corpus: (train, held_out)."""
    train, held_out = {}, {}
    for name, limit in names.items():
        documents = _at_most(data.load(name), limit, seed)
        train[name], held_out[name] = data.split(documents, (1 - HELD_OUT, HELD_OUT), seed)
    return train, held_out


def _at_most(documents: list, limit: int | None, seed: int) -> list:
    """Whole documents in random order until the limit of characters is reached."""
    if limit is None:
        return documents
    taken, size = [], 0
    for document in random.Random(seed).sample(documents, len(documents)):
        if size + len(document.text) <= limit:
            taken.append(document)
            size += len(document.text)
    return taken


def train(name: str, folder: Path | None = None, recipe: Recipe | None = None) -> dict:
    """Train one checkpoint, write it, and return what training.json says.

    folder: data/models/NAME by default. Raises ValueError for an unknown name.
    """
    import torch

    if recipe is None and name not in RECIPES:
        raise ValueError(f"{name!r} is none of our checkpoints: {', '.join(RECIPES)}")
    recipe = recipe or RECIPES[name]
    texts, held_out = corpora()
    tokenizer = data.train_bpe((d.text for part in texts.values() for d in part), VOCAB)
    tokens = data.encode_documents([d for part in texts.values() for d in part], tokenizer)
    checked = {key: data.encode_documents(part, tokenizer) for key, part in held_out.items()}

    torch.manual_seed(0)
    model = GPT(recipe.config)
    print(f"{name}: {model.n_parameters():,} parameters, {len(tokens):,} tokens", flush=True)
    resume = cache_dir() / "training" / name
    history = fit(
        model,
        data.Batches(tokens, recipe.batch_size, LENGTH),
        steps=recipe.steps,
        lr=recipe.lr,
        warmup=150,
        held_out=_sample(checked, recipe.batch_size),
        held_out_every=200,
        checkpoint=resume,
        every=100,
    )
    log = _log(recipe, model, history, texts, len(tokens)) | _reached(model, checked, held_out)
    _write(folder or data_dir() / "models" / name, model, tokenizer, {"name": name, **log})
    shutil.rmtree(resume, ignore_errors=True)
    return log


def _sample(checked: Mapping, batch_size: int, batches: int = 8) -> list:
    """A few held-out batches of every corpus, for the curve in the log."""
    parts = (data.sequential(ids, batch_size, LENGTH)[:batches] for ids in checked.values())
    return [batch for part in parts for batch in part]


def _reached(model: GPT, checked: Mapping, held_out: Texts) -> dict:
    """Perplexity a token and bits a byte on all held-out documents, and of each corpus."""
    rows, nats, tokens, size = {}, 0.0, 0, 0
    for name, ids in checked.items():
        loss = evaluate(model, data.sequential(ids, 16, LENGTH))
        in_bytes = sum(len(document.text.encode()) for document in held_out[name])
        rows[name] = _scores(loss * len(ids), len(ids), in_bytes)
        rows[name]["documents"] = [document.name for document in held_out[name]]
        nats, tokens, size = nats + loss * len(ids), tokens + len(ids), size + in_bytes
    return {"held_out": {"all": _scores(nats, tokens, size), **rows}}


def _scores(nats: float, tokens: int, size: int) -> dict:
    return {
        "perplexity": round(math.exp(nats / tokens), 3),
        "bits_per_byte": round(nats / size / math.log(2), 4),
        "tokens": tokens,
    }


def _log(recipe: Recipe, model: GPT, history, texts: Texts, tokens: int) -> dict:
    steps = range(0, len(history.losses), 10)
    means = [sum(history.losses[i : i + 10]) / len(history.losses[i : i + 10]) for i in steps]
    return {
        "parameters": model.n_parameters(),
        "corpora": {name: len(part) for name, part in texts.items()},
        "train_tokens": tokens,
        "seen_tokens": recipe.steps * recipe.batch_size * LENGTH,
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "length": LENGTH,
        "lr": recipe.lr,
        "losses_every_10": [round(loss, 4) for loss in means],
        "held_out_sample": [[step, round(loss, 4)] for step, loss in history.held_out],
        "seconds": round(history.seconds, 1),
        "resumed_from": history.resumed_from,
    }


def _write(folder: Path, model: GPT, tokenizer, log: dict) -> None:
    """The checkpoint's folder, whole or not at all."""
    import torch

    from lablib.models.hub import to_hf

    with atomic_write(folder) as temporary:
        to_hf(model, temporary, torch.bfloat16)
        tokenizer.fast.save_pretrained(temporary)
        write_json(temporary / "training.json", log)


def main() -> None:
    """Train the checkpoints named on the command line, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=RECIPES)
    for name in parser.parse_args().names:
        reached = train(name)["held_out"]["all"]
        print(f"{name}: {reached}", flush=True)


if __name__ == "__main__":
    main()
