"""Several corpora as one stream of tokens: the text that small models are compared on."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lablib.data import documents, tokenizers
from lablib.data.batches import sequential
from lablib.data.corpora import load, prepare
from lablib.data.tokenizers import BPETokenizer
from lablib.files import atomic_write, note_opened, sha256
from lablib.paths import cache_dir

DOMAINS = ("shakespeare", "bible", "django-docs", "python-docs")


@dataclass(frozen=True)
class Mixture:
    """The tokens of several domains under one tokenizer, split by document.

    train_of, held_out_of: name of the domain -> (n,) int32 ids, each document followed by eos.
    train, held_out: (n,) int32 ids, all domains in order; `Batches` shuffles them.
    """

    tokenizer: BPETokenizer
    train: np.ndarray
    held_out: np.ndarray
    train_of: dict[str, np.ndarray]
    held_out_of: dict[str, np.ndarray]

    def windows(
        self, batch_size: int = 32, length: int = 64, limit: int | None = None
    ) -> list[Tensor]:
        """Held-out rows in order, what a loss is taken on: (up to batch_size, length + 1) int64.

        limit: at most so many rows, spread evenly over the text, so that every domain keeps its
        share. Raises ValueError for a limit below 1.
        """
        (rows,) = sequential(self.held_out, len(self.held_out), length)
        if limit is not None:
            if limit < 1:
                raise ValueError(f"{limit} windows leave nothing to evaluate on")
            places = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round()
            rows = rows[torch.from_numpy(places).long()]
        return list(rows.split(batch_size))


def mixture(
    names: Sequence[str] = DOMAINS,
    vocab_size: int = 1024,
    held_out: float = 0.05,
    seed: int = 0,
) -> Mixture:
    """All text of some corpora, in tokens of a byte-level BPE trained on the training part of it.

    names: of the registry, fetched first when set-up has not. held_out: each domain's share of
    characters held out, by document; seed decides which documents. Domains keep their sizes: by
    default about 2.19, 1.43, 2.41 and 0.89 million training tokens and 110, 69, 119 and 47 thousand
    held out (the last pair with Python 3.11's documentation).
    Ids are kept in the process and in the cache, and made anew (10 s) when a corpus, the tokenizer
    or the split changes.
    Raises DataError for an unknown corpus, ValueError for a share or a vocab_size that can't be.
    """
    paths = tuple((name, prepare(name)) for name in names)
    for name, path in paths:
        note_opened(f"corpus {name}", path)
    return _mixture(paths, vocab_size, held_out, seed)


@lru_cache(maxsize=2)
def _mixture(
    paths: tuple[tuple[str, Path], ...], vocab_size: int, held_out: float, seed: int
) -> Mixture:
    names = [name for name, _ in paths]
    key = _key(paths, vocab_size, held_out, seed)
    path = cache_dir() / "mixtures" / f"{key}.npz"
    if not path.is_file():
        _write(path, names, vocab_size, held_out, seed)
    with np.load(path) as kept:
        return _read(kept, names)


def _key(paths: Sequence[tuple[str, Path]], *settings: object) -> str:
    """A hash of all that the ids depend on: settings, content and code."""
    import tokenizers as library

    digest = hashlib.sha256(repr((settings, library.__version__)).encode())
    for name, path in paths:
        digest.update(f"{name} {sha256(path)}".encode())
    for source in (__file__, documents.__file__, tokenizers.__file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:24]


def _write(path: Path, names: Sequence[str], vocab_size: int, share: float, seed: int) -> None:
    """Train the tokenizer, encode, and write both as one file, whole or not at all."""
    parts = [documents.split(load(name), (1 - share, share), seed) for name in names]
    tokenizer = tokenizers.train_bpe((d.text for train, _ in parts for d in train), vocab_size)
    arrays = {"tokenizer": np.frombuffer(tokenizer.tokenizer.to_str().encode(), np.uint8)}
    for name, pair in zip(names, parts):
        for part, texts in zip(("train", "held_out"), pair):
            ids = tokenizers.encode_documents(texts, tokenizer)
            arrays[f"{part} {name}"] = ids.astype(np.uint16 if vocab_size <= 2**16 else np.int32)
    content = io.BytesIO()
    np.savez(content, **arrays)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def _read(kept, names: Sequence[str]) -> Mixture:
    from tokenizers import Tokenizer

    tokenizer = BPETokenizer(Tokenizer.from_str(kept["tokenizer"].tobytes().decode()))
    train, held_out = (
        {name: kept[f"{part} {name}"].astype(np.int32) for name in names}
        for part in ("train", "held_out")
    )
    whole, whole_held_out = (np.concatenate([*of.values()]) for of in (train, held_out))
    return Mixture(tokenizer, whole, whole_held_out, train, held_out)
