"""Colors that readers with each kind of color blindness tell apart, computed."""

import itertools
import json
import re

import numpy as np
import plotly.colors
import pytest

from lablib.lab import paint
from lablib.paths import notebooks

# Machado, Oliveira and Fernandes (2009), table 1, severity 1: linear RGB as it is seen.
SEEN = {
    "everyone": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# IEC 61966-2-1: sRGB's primaries and white (D65) in CIE XYZ.
XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]
WHITE = [0.95047, 1.0, 1.08883]
# A difference (CIE 1976) of 2.3 is just noticed between large patches side by side (Mahy, Van
# Eycken and Oosterlinck, 1994). Lines and points are small and apart (Szafir, 2018): four of it.
APART = 4 * 2.3


def rgb(color):
    """0 to 1, of "#rrggbb" or "rgb(r, g, b)"."""
    if color.startswith("#"):
        return np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.array(plotly.colors.unlabel_rgb(color)) / 255


def lab(color, eyes):
    """CIE L*a*b* of a color as it is seen."""
    given = rgb(color)
    linear = np.where(given <= 0.04045, given / 12.92, ((given + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(SEEN[eyes]) @ linear, 0, 1)
    parts = np.asarray(XYZ) @ seen / WHITE
    f = np.where(parts > 216 / 24389, np.cbrt(parts), (24389 / 27 * parts + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(one, other, eyes):
    return float(np.linalg.norm(lab(one, eyes) - lab(other, eyes)))


def test_the_measure_is_cies():
    assert lab("#ffffff", "everyone") == pytest.approx([100, 0, 0], abs=0.01)
    assert lab("#ff0000", "everyone") == pytest.approx([53.24, 80.09, 67.20], abs=0.02)
    assert apart("#009e73", "#009e73", "deuteranopia") == 0
    red_and_green = [apart("#d7191c", "#1a9641", eyes) for eyes in SEEN]
    assert red_and_green[0] > 100 and red_and_green[2] < red_and_green[0] / 3, "the classic pair"


@pytest.mark.parametrize("eyes", SEEN)
def test_every_two_colors_of_the_palette_are_apart_and_stand_out_from_white(eyes):
    colors = (*paint.PALETTE, paint.PAPER)
    near = {pair: apart(*pair, eyes) for pair in itertools.combinations(colors, 2)}
    pair = min(near, key=near.get)
    print(f"{eyes}: nearest {' and '.join(pair)}, {near[pair]:.1f}")
    assert near[pair] > APART


def test_a_painted_word_has_lines_of_its_own_beside_its_color():
    signs = {paint.painted([" "], [color]).replace(color, "") for color in paint.GROUNDS}
    assert len(signs) == len(paint.GROUNDS)
    assert min(paint.contrast(color, "#000000") for color in paint.GROUNDS) > 4.5


def painted():
    """For each stored text that is painted: the lab and its opaque colors."""
    for path in notebooks():
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                page = "".join(output.get("data", {}).get("text/html", ""))
                if colors := set(re.findall(r'<span style="background:(#[0-9a-f]{6})', page)):
                    yield path.stem, sorted(colors)


def test_colors_painted_in_labs_have_lines_or_are_an_order_of_lightness():
    seen = list(painted())
    assert len(seen) >= 6
    for name, colors in seen:
        if not set(colors) <= set(paint.GROUNDS):
            light = sorted(paint.contrast(color, "#000000") for color in colors)
            assert all(up / down > 1.15 for down, up in itertools.pairwise(light)), (name, colors)


def scales():
    """The color scales of the labs' stored figures and of the template, each as a row of colors."""
    found = {"template": plotly.colors.get_colorscale("Viridis")}
    found["template, diverging"] = plotly.colors.get_colorscale("RdBu")
    for path in notebooks():
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                plot = output.get("data", {}).get("application/vnd.plotly.v1+json", {})
                for trace in plot.get("data", []):
                    scale = trace.get("colorscale") or (trace.get("marker") or {}).get("colorscale")
                    if scale:
                        found[f"{path.stem}: {scale[0][1]} to {scale[-1][1]}"] = scale
    return found


@pytest.mark.parametrize("eyes", SEEN)
@pytest.mark.parametrize("scale", scales().items(), ids=lambda item: item[0])
def test_a_color_scale_is_an_order_of_lightness(scale, eyes):
    """From dark to light or back; or from a light middle down to ends that can be told apart."""
    name, stops = scale
    light = np.array([lab(color, eyes)[0] for _, color in stops])
    steps = np.sign(np.round(np.diff(light), 1))
    turns = np.count_nonzero(np.diff(steps[steps != 0]))
    assert turns <= 1, f"{name}: {np.round(light)}"
    if turns:
        assert apart(stops[0][1], stops[-1][1], eyes) > APART, name


def test_the_template_names_these_scales():
    from lablib.lab import figures

    scale = figures.figure().layout.template.layout.colorscale
    for stops, name in ((scale.sequential, "Viridis"), (scale.diverging, "RdBu")):
        known = plotly.colors.get_colorscale(name)
        assert [color for _, color in stops] == [color for _, color in known]
