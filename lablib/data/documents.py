"""Documents, and how they are split: by document, so that nothing leaks."""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from lablib.data.packages import DataError


class Document(NamedTuple):
    """One document of a corpus: its name within the corpus, and its text."""

    name: str
    text: str


def decode(content: bytes, name: str, encoding: str = "utf-8") -> str:
    """Text of `content`, newlines as \\n. Raises DataError when empty or not in `encoding`."""
    try:
        text = content.decode(encoding).replace("\r\n", "\n").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not {encoding.upper()}: byte {content[error.start]:#04x} at position "
            f"{error.start}; convert it, for instance with `iconv -t utf-8`."
        ) from None
    if not text.strip():
        raise DataError(f"{name} is empty: a document needs some text.")
    return text


def read_documents(path: str | Path) -> list[Document]:
    """Documents of the reader's own: a text file, or every `*.txt` below a folder (UTF-8).

    Hidden files and folders, such as Jupyter's copies in `.ipynb_checkpoints`, are passed over.
    Raises DataError when there is none, or when one is empty or not UTF-8.
    """
    path = Path(path)
    files = sorted(filter(_visible(path), path.rglob("*.txt"))) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{path} holds no text file: give a .txt file, or a folder of them.")
    return [Document(file.stem, decode(file.read_bytes(), file.name)) for file in files]


def own_or(
    texts: Sequence[str], name: str, file: str | Path = "wiki.test.raw"
) -> tuple[list[str], str]:
    """Parts of the reader's file and its name, where there is one; else texts and name as they are.

    file: UTF-8, by default WikiText-2's test set as papers have it, in the current folder, which is
    a notebook's own. Its parts follow one another, and each is twice as long as the text that it
    stands for, since its tokens may be longer: take as many as you need.
    Raises DataError when it is too short, empty or not UTF-8.
    """
    if not (file := Path(file)).is_file():
        return list(texts), name
    (document,), sizes = read_documents(file), [2 * len(text) for text in texts]
    if len(document.text) < sum(sizes):
        raise DataError(
            f"{file.name} has {len(document.text):,} letters, and {sum(sizes):,} are read here: "
            "give a longer text, or move the file away."
        )
    ends = accumulate(sizes)
    return [document.text[end - n : end] for end, n in zip(ends, sizes, strict=True)], file.name


def _visible(root: Path) -> Callable[[Path], bool]:
    return lambda file: not any(part.startswith(".") for part in file.relative_to(root).parts)


def split(
    documents: Sequence[Document], fractions: Sequence[float] = (0.9, 0.1), seed: int = 0
) -> tuple[list[Document], ...]:
    """Split by document into parts whose shares of the characters are near `fractions`.

    Documents with equal text (case and white space aside) always go to the same part, so no text
    of one part appears as a document of another. Every part gets at least one document.
    Raises ValueError when fractions don't sum to 1 or distinct documents are too few.
    """
    if not (abs(sum(fractions) - 1) <= 1e-9 and all(part > 0 for part in fractions)):
        raise ValueError(f"fractions must be positive and sum to 1, not {tuple(fractions)}")
    groups = _same_text(documents)
    if len(groups) < len(fractions):
        raise ValueError(f"{len(groups)} distinct documents can't fill {len(fractions)} parts")
    random.Random(seed).shuffle(groups)
    parts: tuple[list[Document], ...] = tuple([] for _ in fractions)
    total = sum(len(document.text) for document in documents)
    part, done, bound = 0, 0, fractions[0] * total
    for left, group in zip(range(len(groups), 0, -1), groups):
        size = sum(len(document.text) for document in group)
        empty_after = len(fractions) - part - 1
        full = done + size / 2 > bound or left <= empty_after
        if parts[part] and full and empty_after:
            part += 1
            bound += fractions[part] * total
        parts[part].extend(group)
        done += size
    return parts


def _same_text(documents: Iterable[Document]) -> list[list[Document]]:
    groups: dict[bytes, list[Document]] = {}
    for document in documents:
        key = hashlib.sha256(" ".join(document.text.lower().split()).encode()).digest()
        groups.setdefault(key, []).append(document)
    return list(groups.values())
