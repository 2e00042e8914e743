"""The catalogue: 120 papers, their claims, and from each slug every path."""

import difflib
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lablib.paths import PACKAGE, data_dir, project_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("number", "formula", "direction")


class UnknownPaper(KeyError):
    """No paper has this slug or lab number; the message names the nearest ones."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    kind: "number" (equals `value` within the relative `tolerance`), "formula" (equals an
    independent implementation within the absolute `tolerance`), or "direction" (the paired
    difference method - baseline is `better`, "lower" or "higher", than zero over seeds).
    paper: the paper's own figure, with its table or figure number.
    """

    id: str
    kind: str
    text: str
    paper: str
    value: float | None = None
    tolerance: float | None = None
    better: str | None = None

    def __post_init__(self):
        needs = {"number": ("value", "tolerance"), "formula": ("tolerance",)}
        if self.kind not in KINDS:
            raise ValueError(f"claim {self.id}: kind {self.kind!r} is none of {', '.join(KINDS)}")
        missing = [key for key in needs.get(self.kind, ()) if getattr(self, key) is None]
        if missing:
            raise ValueError(f"claim {self.id}: a {self.kind} needs {' and '.join(missing)}")
        if self.kind == "direction" and self.better not in ("lower", "higher"):
            raise ValueError(f"claim {self.id}: a direction is better = 'lower' or 'higher'")


@dataclass(frozen=True)
class Paper:
    """One paper: its row of papers.toml. `present` says that its lab is there."""

    entry: int
    slug: str
    title: str
    date: str
    theme: str
    part: int
    part_title: str
    lab: int
    present: bool = False
    claims: tuple[Claim, ...] = ()

    def claim(self, id: str) -> Claim:
        """The claim called `id`. Raises KeyError, with the paper's claims, when there is none."""
        for claim in self.claims:
            if claim.id == id:
                return claim
        known = ", ".join(claim.id for claim in self.claims) or "none"
        raise KeyError(f"{self.slug} has no claim {id!r}; papers.toml has {known}")

    @property
    def module(self) -> str:
        """Name of the technique's module."""
        return f"lablib.{self.theme}.{self.slug.replace('-', '_')}"

    @property
    def paths(self) -> dict[str, Path]:
        """The six places of the paper, by what they hold; `result` and `lab` as in a checkout."""
        root = project_dir() or PACKAGE.parent
        name = self.slug.replace("-", "_")
        folder = f"{self.part:02d}-{self.theme.replace('_', '-')}"
        return {
            "catalogue": PACKAGE / "papers.toml",
            "technique": PACKAGE / self.theme / f"{name}.py",
            "lab": root / "labs" / folder / f"{self.lab}-{self.slug}.ipynb",
            "exercises": PACKAGE / "exercises" / f"{name}.py",
            "tests": root / "tests" / self.theme / f"test_{name}.py",
            "result": data_dir() / "results" / f"{self.slug}.json",
        }


@lru_cache(maxsize=1)
def papers() -> tuple[Paper, ...]:
    """Every paper, in the order of the labs."""
    rows = tomllib.loads((PACKAGE / "papers.toml").read_text("utf-8"))
    parts = {part["theme"]: part for part in rows["part"]}
    found = []
    for row in rows["paper"]:
        part = parts[row["theme"]]
        claims = tuple(Claim(**claim) for claim in row.pop("claim", ()))
        row["date"] = str(row["date"])
        found.append(Paper(**row, part=part["number"], part_title=part["title"], claims=claims))
    return tuple(sorted(found, key=lambda paper: paper.lab))


def paper(key: str | int) -> Paper:
    """The paper with this slug or lab number. Raises UnknownPaper with the nearest ones."""
    key = str(key)
    for found in papers():
        if key in (found.slug, str(found.lab)):
            return found
    raise UnknownPaper(f"no paper is called {key!r}; did you mean {', '.join(nearest(key))}?")


def nearest(key: str, n: int = 3) -> list[str]:
    """The `n` slugs nearest to `key` in spelling: as a whole, or in one of their words."""

    def likeness(slug: str) -> float:
        ratios = [difflib.SequenceMatcher(None, key.lower(), slug).ratio()]
        ratios += [difflib.SequenceMatcher(None, key.lower(), w).ratio() for w in slug.split("-")]
        return max(ratios)

    return sorted((found.slug for found in papers()), key=likeness, reverse=True)[:n]
