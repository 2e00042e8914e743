"""Colors, and texts painted with them."""

import html
from collections.abc import Sequence

import numpy as np

# Okabe and Ito (2008), without black and yellow, which vanish in a dark or a light theme.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#767676")
# No gray has a contrast of 4.5:1 with both themes' backgrounds, and Plotly takes no CSS variables.
INK, PAPER = "#333333", "#ffffff"
# Grounds for sixteen kinds of words, under black letters. Each has lines of its own, too.
GROUNDS = (
    "#56b4e9", "#e69f00", "#7fcdbb", "#cc79a7", "#b8b8b8", "#f0e442", "#ff9e80", "#b2df8a",
    "#9fa8da", "#80deea", "#dce775", "#bcaaa4", "#f48fb1", "#ffcc80", "#a5d6a7", "#ce93d8",
)  # fmt: skip
_LINES = ("none", "solid", "dotted", "dashed")


def painted(pieces: Sequence[str], colors: Sequence[str], titles: Sequence[str] = ()) -> str:
    """HTML of a text whose pieces have their own background; titles show under the pointer.

    colors: as CSS writes them, one a piece; one of six hex digits takes the letters, black or
    white, that stand out more, another opaque one black, one with an alpha below 1 the theme's.
    One of GROUNDS also gets lines over and under the piece, which tell it from the others.
    """
    spans = []
    for piece, color, title in zip(pieces, colors, titles or [""] * len(pieces), strict=True):
        style = f"background:{color}{_letters(color)}{_lines(color)}"
        told = f' title="{html.escape(title)}"' if title else ""
        spans.append(f'<span style="{html.escape(style)}"{told}>{html.escape(piece)}</span>')
    look = "font:16px monospace;line-height:1.7;white-space:pre-wrap;margin-top:.5em"
    wrap = "overflow-wrap:anywhere;max-width:60em"
    return f'<div style="{look};{wrap}">{"".join(spans)}</div>'


def _letters(color: str) -> str:
    if color.startswith("rgba"):
        return ""
    dark = len(color) == 7 and contrast(color, "#ffffff") > contrast(color, "#000000")
    return ";color:white" if dark else ";color:black"


def _lines(color: str) -> str:
    if color not in GROUNDS:
        return ""
    over, under = divmod(GROUNDS.index(color), len(_LINES))
    sides = (("top", over), ("bottom", under))
    return "".join(f";border-{side}:2px {_LINES[kind]}" for side, kind in sides if kind)


def contrast(one: str, other: str) -> float:
    """Contrast of two colors #rrggbb, 1 to 21. Source: WCAG 2.1, relative luminance."""

    def luminance(color: str) -> float:
        channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def key(labels: Sequence[str], colors: Sequence[str]) -> str:
    """HTML of what the colors of `painted` mean, on one line."""
    return painted([f" {label} " for label in labels], colors)
