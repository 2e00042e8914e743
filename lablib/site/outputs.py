"""What a lab stores, as HTML of a page: figures, explorers, code shown from lablib, links."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lablib.site import code

# The tags that Plotly understands in a title.
TAGS = re.compile(r"</?(?:br|sup|sub|b|i|em|span|a)\b[^>]*>", re.IGNORECASE)
HEIGHT = 450  # px, Plotly's own where a figure has none
SHOWN = re.compile(r"`(lablib/[\w/]+\.py)`(?:, line (\d+))?\n\n(`{3,})python\n(.*?)\n\3", re.DOTALL)


def spoken(alt: str) -> str:
    """A text alternative as plain words: Plotly's markup taken out, nothing escaped."""
    return " ".join(html.unescape(TAGS.sub(" ", alt)).split())


def in_script(value: Any) -> str:
    """JSON that no HTML parser takes for a tag, for a <script> element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def figure(plot: Mapping[str, Any], alt: str) -> str:
    """HTML of a Plotly figure: its text alternative, its place and its data; a script draws it."""
    height = plot.get("layout", {}).get("height") or HEIGHT
    part = {key: plot[key] for key in ("data", "layout") if key in plot}
    return (
        f'<div class="lab-figure" tabindex="0" role="group" aria-label="Figure">'
        f'<div class="lab-plot" role="img" aria-label="{html.escape(spoken(alt))}" '
        f'style="height:{int(height)}px"></div>'
        f'<script type="application/json">{in_script(part)}</script></div>'
    )


def replay(key: str, controls: Sequence[Mapping[str, Any]], shown: str) -> str:
    """HTML of an explorer whose frames are stored as `key`, with what it shows at first."""
    rows = "".join(_control(control) for control in controls if len(control["stops"]) > 1)
    return (
        f'<div class="lab-replay" data-frames="{html.escape(key)}">'
        f'<div class="lab-controls">{rows}</div><p class="lab-said" role="status"></p>'
        f'<div class="lab-shown">{shown}</div></div>'
    )


def _control(control: Mapping[str, Any]) -> str:
    label, stops, start = html.escape(control["label"]), control["stops"], control["start"]
    if control["kind"] == "checkbox":
        checked = " checked" if start else ""
        return f'<label><input type="checkbox"{checked}> <span>{label}</span></label>'
    if control["kind"] == "select":
        options = "".join(
            f"<option{' selected' if place == start else ''}>{html.escape(stop)}</option>"
            for place, stop in enumerate(stops)
        )
        return f"<label><span>{label}</span> <select>{options}</select></label>"
    now, told = html.escape(stops[start]), html.escape(json.dumps(stops, ensure_ascii=False))
    return (
        f'<label><span>{label}</span> <input type="range" min="0" max="{len(stops) - 1}" '
        f'value="{start}" aria-valuetext="{now}" data-stops="{told}"> '
        f'<span class="lab-value" aria-hidden="true">{now}</span></label>'
    )


def note(controls: Sequence[Mapping[str, Any]]) -> str:
    """HTML below a replayed explorer: what is stored, and what only the lab moves."""
    still = ", ".join(c["label"] for c in controls if len(c["stops"]) == 1 and c["label"])
    more = f" Open the lab to move also: {html.escape(still)}." if still else ""
    return f"<p class='lab-note'><i>Replayed from stored pictures.{more}</i></p>"


def unmoved(text: str) -> str:
    """The line below an explorer without stored frames, as a page says it."""
    return text.replace("Run this cell to move:", "Open the lab to move:")


def shown_code(markdown: str, up: str) -> str:
    """A `source(...)` output whose first line links to the page of the code, where it is now.

    up: the way from the page to the site's root, such as "../../".
    """
    match = SHOWN.match(markdown)
    module = code.module_of(match[1]) if match else None
    if module is None:
        return markdown
    where = f"<code>{match[1]}</code>"
    line = code.line_of_text(module, match[4], int(match[2])) if match[2] else 0
    words = f", line {line}" if line else ""
    href = f"{up}{code.page(module)}.html{f'#L-{line}' if line else ''}"
    link = f'<a class="lab-code" href="{href}">{where}{words}</a>'
    return "\n\n".join([link, markdown.partition("\n\n")[2]])


def linked(text: str) -> str:
    """HTML whose links to labs lead to their pages."""
    return re.sub(
        r"(<a\b[^>]*\bhref=(['\"]))((?:(?!\2)[^:])*?)\.ipynb((?:#(?:(?!\2).)*)?\2)",
        r"\1\3.html\4",
        text,
    )
