"""Byte and BPE tokenizers: text to lists of ids and back, without loss. Letters, with loss."""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from lablib.files import atomic_write

END_OF_TEXT = "<|endoftext|>"


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the start and end of a text."""

    vocab_size = 257
    bos = eos = 256

    def encode(self, text: str) -> list[int]:
        """Ids of the text's UTF-8 bytes, without bos and eos."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bos/eos are dropped, bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")


class LetterTokenizer:
    """27 symbols: space as 0, a to z as 1 to 26. Small letters, and one space for all else.

    Source: Shannon, "Prediction and entropy of printed English" (1951).
    """

    symbols = " abcdefghijklmnopqrstuvwxyz"
    vocab_size = 27

    def encode(self, text: str) -> list[int]:
        """Ids of the text's letters."""
        letters = re.sub("[^a-z]+", " ", text.lower()).encode()
        return list(letters.translate(bytes.maketrans(self.symbols.encode(), bytes(range(27)))))

    def decode(self, ids: Iterable[int]) -> str:
        """The symbols of ids."""
        return "".join(self.symbols[token] for token in ids)


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al., 2016), kept by the `tokenizers` package.

    `END_OF_TEXT` is one token and stands for both the start and the end of a text; where a text has
    these letters, they are letters.
    """

    def __init__(self, tokenizer):
        tokenizer.encode_special_tokens = True  # as text, that is; `save` does not keep it
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.bos = self.eos = tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos and eos."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        return [found.ids for found in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, the end token dropped."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, the format that transformers reads, too."""
        with atomic_write(path) as temporary:
            self.tokenizer.save(str(temporary))

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read a `tokenizer.json` that `save` wrote."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)))

    @cached_property
    def fast(self):
        """The same tokenizer as transformers' `PreTrainedTokenizerFast`."""
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            split_special_tokens=True,
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE of at most `vocab_size` tokens (at least 257: the bytes and the end token).

    Raises ValueError when vocab_size is below 257 or above a million, or there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = list(texts)
    if vocab_size < 257:
        raise ValueError(f"vocab_size {vocab_size} is below 257, the bytes and the end token")
    if vocab_size > 1_000_000:  # the library sets room for all of them aside before it begins
        raise ValueError(f"vocab_size {vocab_size} is above a million")
    if not any(texts):
        raise ValueError("there is no text to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer)


def encode_documents(documents: Iterable, tokenizer: ByteTokenizer | BPETokenizer):
    """One int64 array of all documents' ids, each followed by the tokenizer's eos."""
    import numpy as np

    texts = [document.text for document in documents]
    if isinstance(tokenizer, BPETokenizer):
        pieces = tokenizer.encode_batch(texts)
    else:
        pieces = [tokenizer.encode(text) for text in texts]
    parts = [np.asarray([*piece, tokenizer.eos], dtype=np.int64) for piece in pieces]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
