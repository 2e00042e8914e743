"""Real text by name, tokenizers, batches, and worlds with a known truth."""

from importlib import import_module

_HOME = {
    "CORPORA": "corpora",
    "Corpus": "corpora",
    "load": "corpora",
    "prepare": "corpora",
    "DataError": "packages",
    "fetch": "packages",
    "members": "packages",
    "Document": "documents",
    "read_documents": "documents",
    "split": "documents",
    "words": "text",
    "sentences": "text",
    "ByteTokenizer": "tokenizers",
    "BPETokenizer": "tokenizers",
    "train_bpe": "tokenizers",
    "END_OF_TEXT": "tokenizers",
    "encode_documents": "tokenizers",
    "Batches": "batches",
    "sequential": "batches",
    "TokenData": "module",
    "MarkovSource": "worlds",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
