"""Labels, numbers and lists of them as a reader would say them."""

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# The tags that Plotly takes for markup; any other "<" is a letter.
_TAG = re.compile(r"</?(?:b|i|u|s|a|em|strong|sub|sup|span)(?: [^>]*)?>")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def words(text: Any) -> str:
    """A title, name or label without its markup."""
    text = text.get("text") if isinstance(text, Mapping) else text
    lines = _TAG.sub("", str(text or "").replace("<br>", " "))
    return " ".join(html.unescape(lines).split()).strip(",")


def short(text: str, most: int) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def ended(text: str) -> str:
    """The text with a full stop, where it has no end of its own."""
    return text if not text or text[-1] in ".?!…" else f"{text}."


def joined(name: str, *about: str) -> str:
    """What a name is, or the one of both that is there."""
    text = ", ".join(filter(None, about))
    return f"{name}: {text}" if name and text else name or text


def listed(items: Sequence[str], room: int) -> str:
    """The items with semicolons between, as many as fit into `room`, and how many are left out."""
    items = [item for item in items if item]
    for count in range(len(items), 0, -1):
        more = f"; and {len(items) - count} more" if count < len(items) else ""
        text = "; ".join(items[:count]) + more
        if len(text) < room:
            return text
    return short(items[0], room) if items and room > 20 else ""


def names(values: Iterable[Any]) -> str:
    """The labels of an axis, each once."""
    return listed([short(words(value), 60) for value in dict.fromkeys(map(str, values))], 130)


def value(number: Any) -> str:
    """A number in three digits, a large one whole; a date or name as it is."""
    if isinstance(number, str) or number is None:
        return words(number)
    number = float(number)
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e9 else f"{number:.3g}"


def extent(values: Iterable[Any]) -> str:
    """Lowest to highest number or date; of anything else the names."""
    given = [one for one in values if one is not None]
    try:
        known = np.asarray(given, dtype=float)
    except (TypeError, ValueError):
        dates = all(_DATE.match(str(one)) for one in given)
        return f"{min(given)} to {max(given)}" if dates else names(given)
    known = known[np.isfinite(known)]
    if not known.size:
        return ""
    low, high = value(known.min()), value(known.max())
    return low if low == high else f"{low} to {high}"


def numbers(values: Any) -> Any:
    """The values as a sequence; Plotly stores an array as base64 and its NumPy type."""
    if isinstance(values, Mapping):
        flat = np.frombuffer(base64.b64decode(values["bdata"]), np.dtype(values["dtype"]))
        shape = [int(part) for part in str(values.get("shape", len(flat))).split(",")]
        return flat.reshape(shape)
    return None if values is None or isinstance(values, str) else values
