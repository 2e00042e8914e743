"""A lab's notebook as the site shows it: stored outputs turned into HTML, folded cells folded."""

import re
from collections.abc import Mapping
from typing import Any

from lablib.lab.figures import PLOTLY
from lablib.site import outputs

BADGE = re.compile(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)[ \t]*")
MOVE = "<i>Run this cell to move: "


def staged(book: dict[str, Any], slug: str, frames: Mapping[str, Any], up: str) -> dict[str, Any]:
    """The notebook with what the site changes; the one given stays as it is.

    slug: of its frames' files. frames: "CELL:OUTPUT" -> packed frames. up: the way from its page
    to the site's root, such as "../../".
    """
    cells = [_cell(cell, slug, frames, up) for cell in book["cells"]]
    language = {"name": "python", "pygments_lexer": "ipython3"}
    return {**book, "metadata": {**book["metadata"], "language_info": language}, "cells": cells}


def _cell(cell: dict[str, Any], slug: str, frames: Mapping[str, Any], up: str) -> dict[str, Any]:
    if cell["cell_type"] != "code":
        return {**cell, "source": BADGE.sub("", text(cell["source"]))}
    folded = ["hide-input"] if cell["metadata"].get("jupyter", {}).get("source_hidden") else []
    made = list(cell["outputs"])
    for place, output in enumerate(made):
        key = f"{cell.get('id')}:{place}"
        if key in frames and place + 1 < len(made) and MOVE in _html(made[place + 1]):
            made[place] = _replayed(output, frames[key]["controls"], file_of(slug, key))
            made[place + 1] = _as_html(outputs.note(frames[key]["controls"]))
        else:
            made[place] = _output(output, up)
    return {**cell, "metadata": {"tags": folded}, "outputs": made}


def file_of(slug: str, key: str) -> str:
    """The name, without its ending, of the file that an explorer's frames are served from."""
    return f"{slug}-{key.replace(':', '-')}"


def _output(output: dict[str, Any], up: str) -> dict[str, Any]:
    """One output; a figure, a link to a lab, or code of lablib becomes what a page can show."""
    data = output.get("data", {})
    if PLOTLY in data:
        return _as_html(outputs.figure(data[PLOTLY], text(data.get("text/plain", ""))))
    if "text/markdown" in data:
        shown = outputs.shown_code(text(data["text/markdown"]), up)
        return {**output, "data": {"text/markdown": shown}}
    if shown := _html(output):
        return _as_html(outputs.linked(outputs.unmoved(shown)))
    return output


def _replayed(output: dict[str, Any], controls: Any, key: str) -> dict[str, Any]:
    return _as_html(outputs.replay(key, controls, _html(_output(output, ""))))


def _as_html(shown: str) -> dict[str, Any]:
    return {"output_type": "display_data", "metadata": {}, "data": {"text/html": shown}}


def _html(output: Mapping[str, Any]) -> str:
    return text(output.get("data", {}).get("text/html", ""))


def text(value: str | list[str]) -> str:
    """A notebook's text, which its file has as lines."""
    return value if isinstance(value, str) else "".join(value)
