"""Real text by name, tokenizers, batches, and worlds with a known truth."""

from lablib.lazy import lazy

_PLACES = {
    "CORPORA": "corpora",
    "Corpus": "corpora",
    "load": "corpora",
    "prepare": "corpora",
    "DataError": "packages",
    "fetch": "packages",
    "members": "packages",
    "Document": "documents",
    "read_documents": "documents",
    "own_or": "documents",
    "split": "documents",
    "words": "text",
    "sentences": "text",
    "ByteTokenizer": "tokenizers",
    "LetterTokenizer": "tokenizers",
    "BPETokenizer": "tokenizers",
    "train_bpe": "tokenizers",
    "END_OF_TEXT": "tokenizers",
    "encode_documents": "tokenizers",
    "Batches": "batches",
    "sequential": "batches",
    "ByteText": "byte_texts",
    "byte_text": "byte_texts",
    "Mixture": "mixtures",
    "mixture": "mixtures",
    "TokenData": "module",
    "MarkovSource": "worlds",
}

__all__ = list(_PLACES)
__getattr__, __dir__ = lazy(__name__, _PLACES)
