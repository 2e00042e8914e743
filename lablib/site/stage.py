"""The sources that Sphinx reads: labs and theme pages as they are in labs/, and a front page."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from lablib.evidence.coverage import markers
from lablib.files import atomic_write
from lablib.lab.figures import PLOTLY, bundle
from lablib.lab.map import paper_map
from lablib.papers import papers, theme_folder, themes
from lablib.paths import project_dir
from lablib.site import frames, outputs
from lablib.site.notebooks import file_of, staged

START = "labs/00-start-here"
MAP = "A point a paper, a row a theme, from left to right in time."


def stage(folder: Path) -> list[str]:
    """Write what the site is built from into `folder`; the labs whose stored frames are old.

    A file that has not changed is not written again, so that Sphinx does not read it again.
    Raises FileNotFoundError outside of a checkout.
    """
    if project_dir() is None:
        raise FileNotFoundError("the site is built in a checkout: the wheel has no labs")
    wanted, old = {"index.md": _front()}, []
    wanted[f"{START}.ipynb"] = _notebook(START, "start-here", {})
    for row in papers():
        if row.present:
            stored = frames.load(row)
            old += [row.slug] if not stored and frames.path_of(row).is_file() else []
            place = f"labs/{theme_folder(row.part, row.theme)}/{row.lab_name}"
            wanted[place] = _notebook(place.removesuffix(".ipynb"), row.slug, stored)
            wanted |= dict(_frame_files(row.slug, stored))
    wanted |= dict(_themes())
    _write_all(folder, wanted)
    return old


def _notebook(place: str, slug: str, stored: dict) -> str:
    book = json.loads((project_dir() / f"{place}.ipynb").read_text("utf-8"))
    up = "../" * place.count("/")
    return json.dumps(staged(book, slug, stored, up), ensure_ascii=False, indent=1)


def _frame_files(slug: str, stored: dict) -> Iterator[tuple[str, str]]:
    """A script an explorer, which pages opened from a disk can load, too."""
    for key, made in stored.items():
        name = file_of(slug, key)
        part = outputs.in_script({"pool": made["pool"], "frames": made["frames"]})
        yield f"_frames/frames/{name}.js", f"lablibFrames({json.dumps(name)}, {part});\n"


def _themes() -> Iterator[tuple[str, str]]:
    """Each theme's generated page, its labs below it in the site's tree."""
    for theme, about in themes().items():
        folder = theme_folder(about["number"], theme)
        readme = project_dir() / "labs" / folder / "README.md"
        if readme.is_file():
            mine = [row for row in papers() if row.theme == theme and row.present]
            names = [row.lab_name.removesuffix(".ipynb") for row in mine]
            yield f"labs/{folder}/index.md", f"{readme.read_text('utf-8')}\n{_tree(names)}"


def _front() -> str:
    """The front page: the README's promise and table, the map of papers, a row a lab."""
    readme = (project_dir() / "README.md").read_text("utf-8")
    promise = re.search(r"^\*\*.*?\*\*$", readme, re.MULTILINE | re.DOTALL)[0]
    begin, end = markers()
    overview = readme.split(begin)[1].split(end)[0].strip().replace("/README.md", "/index.md")
    labs = (project_dir() / "labs" / "README.md").read_text("utf-8")
    labs = labs.replace("# The labs", "## The labs", 1).replace("](", "](labs/")
    plot = bundle(paper_map(), MAP)
    there = re.findall(r"\((labs/[\w-]+/index)\.md\)", overview)
    parts = [
        f"# lablib\n\n{promise}\n\nBegin with [lab 00]({START}.ipynb).",
        f"## What was measured\n\n{overview}",
        f"## The papers\n\n{outputs.figure(plot[PLOTLY], MAP)}",
        labs,
        _tree([START, *there]),
    ]
    return "\n\n".join(parts)


def _tree(names: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```", ""])


def _write_all(folder: Path, wanted: dict[str, str]) -> None:
    """Make the folder hold `wanted`, path -> text, and nothing else."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
    (folder / "_frames").mkdir(parents=True, exist_ok=True)
    for name, text in wanted.items():
        path = folder / name
        if not path.is_file() or path.read_text("utf-8") != text:
            with atomic_write(path) as temporary:
                temporary.write_text(text, "utf-8")
