"""The catalogue: 120 papers, one TOML each, their claims, and from each slug every path."""

import difflib
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lablib.paths import PACKAGE, data_dir, labs_dir, project_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent
KINDS = ("number", "formula", "direction")
EFFECTS = ("difference", "ratio")


class UnknownPaper(KeyError):
    """No paper has this slug or lab number; the message names the nearest ones."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Claim:
    """One claim of a paper; the first of a paper's claims leads its lab.

    kind: "number" (equals `value` within the relative `tolerance`), "formula" (equals an
    independent implementation within the absolute `tolerance`), or "direction" (over seeds the
    method is `better`, "lower" or "higher", than the baseline).
    paper: the paper's own figure, with its table or figure number.
    effect: what a direction's pairs are judged by, "difference" (method - baseline) or "ratio"
    (method / baseline, averaged as logarithms). unit: of that effect, or of a number.
    aside: judged from the study and in its table, but not in the lab, whose story it is no part of.
    """

    id: str
    kind: str
    text: str
    paper: str
    value: float | None = None
    tolerance: float | None = None
    better: str | None = None
    effect: str = "difference"
    unit: str = ""
    aside: bool = False

    def __post_init__(self):
        needs = {"number": ("value", "tolerance"), "formula": ("tolerance",)}
        if self.kind not in KINDS:
            raise ValueError(f"claim {self.id}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        missing = [key for key in needs.get(self.kind, ()) if getattr(self, key) is None]
        if missing:
            raise ValueError(f"claim {self.id}: a {self.kind} needs {' and '.join(missing)}")
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise ValueError(f"claim {self.id}: tolerance {self.tolerance} is not zero or more")
        if self.kind == "number" and not self.value:
            raise ValueError(f"claim {self.id}: a tolerance relative to 0 allows nothing")
        if self.kind == "direction" and self.better not in ("lower", "higher"):
            raise ValueError(f"claim {self.id}: a direction is better = 'lower' or 'higher'")
        if self.aside and self.kind == "formula":
            raise ValueError(f"claim {self.id}: a formula is measured in the lab, not aside of it")
        if self.effect not in EFFECTS:
            raise ValueError(f"claim {self.id}: effect {self.effect!r} is none of {EFFECTS}")


@dataclass(frozen=True)
class Paper:
    """One paper, as its TOML tells it. entry: its line of abstracts.txt."""

    entry: int
    slug: str
    title: str
    date: str
    theme: str
    part: int
    part_title: str
    lab: int
    claims: tuple[Claim, ...] = ()

    def claim(self, id: str) -> Claim:
        """The claim called `id`. Raises KeyError, with the paper's claims, when there is none."""
        for claim in self.claims:
            if claim.id == id:
                return claim
        known = ", ".join(claim.id for claim in self.claims) or "none"
        raise KeyError(f"{self.slug} has no claim {id!r}; {self.slug}.toml has {known}")

    @property
    def name(self) -> str:
        """The slug as a Python name, which the paper's modules have."""
        return self.slug.replace("-", "_")

    @property
    def module(self) -> str:
        """Name of the technique's module."""
        return f"lablib.{self.theme}.{self.name}"

    @property
    def paths(self) -> dict[str, Path]:
        """Every place of the paper, by what it holds."""
        root = project_dir() or PACKAGE.parent
        return {
            "catalogue": FOLDER / f"{self.slug}.toml",
            "technique": PACKAGE / self.theme / f"{self.name}.py",
            "study": PACKAGE / "studies" / f"{self.name}.py",
            "exercises": PACKAGE / "exercises" / f"{self.name}.py",
            "lab": labs_dir() / theme_folder(self.part, self.theme) / self.lab_name,
            "tests": root / "tests" / self.theme / f"test_{self.name}.py",
            "runs": data_dir() / "studies" / f"{self.slug}.jsonl",
            "result": data_dir() / "results" / f"{self.slug}.json",
        }

    @property
    def lab_name(self) -> str:
        """File name of the lab."""
        return f"{self.lab}-{self.slug}.ipynb"

    @property
    def present(self) -> bool:
        """Whether the paper's lab is there."""
        return self.paths["lab"].is_file()


def theme_folder(part: int, theme: str) -> str:
    """Name of a theme's folder under labs/."""
    return f"{part:02d}-{theme.replace('_', '-')}"


@lru_cache(maxsize=1)
def themes() -> dict[str, dict[str, Any]]:
    """The twelve themes in order: package name -> number and title."""
    return _read(FOLDER / "_themes.toml")


@lru_cache(maxsize=1)
def papers() -> tuple[Paper, ...]:
    """Every paper, in the order of the labs. Raises ValueError that names a file it can't read."""
    files = (path for path in FOLDER.glob("*.toml") if not path.name.startswith("_"))
    return tuple(sorted(map(_paper, files), key=lambda paper: paper.lab))


def _paper(path: Path) -> Paper:
    row = _read(path)
    try:
        claims = tuple(Claim(**claim) for claim in row.pop("claim", ()))
        part = themes()[row["theme"]]
        row["date"] = str(row["date"])
        return Paper(
            **row,
            slug=path.stem,
            part=part["number"],
            part_title=part["title"],
            claims=claims,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} can't be read: {error}") from error


def paper(key: str | int) -> Paper:
    """The paper with this slug or lab number. Raises UnknownPaper with the nearest ones."""
    key = str(key)
    for row in papers():
        if key in (row.slug, str(row.lab)):
            return row
    raise UnknownPaper(f"no paper is called {key!r}; did you mean {', '.join(nearest(key))}?")


def nearest(key: str, n: int = 3) -> list[str]:
    """The `n` slugs nearest to `key` in spelling: as a whole, or in one of their words."""

    def likeness(slug: str) -> float:
        ratios = [difflib.SequenceMatcher(None, key.lower(), slug).ratio()]
        ratios += [difflib.SequenceMatcher(None, key.lower(), w).ratio() for w in slug.split("-")]
        return max(ratios)

    return sorted((row.slug for row in papers()), key=likeness, reverse=True)[:n]
