"""What the site is made of, without Sphinx and without a browser."""

import ast
import gzip
import json
from dataclasses import replace

import ipywidgets
import numpy as np
import pytest

from lablib.lab import explore, figures
from lablib.lab.figures import PLOTLY
from lablib.lab.frames import KIND, of, record, thinned
from lablib.papers import paper
from lablib.paths import PACKAGE
from lablib.site import code, frames, notebooks, outputs

EVIL = "<img src=x onerror=alert(1)></script>"


def test_a_figure_escapes_its_text_and_its_data():
    plot = {"data": [{"type": "bar", "name": EVIL}], "layout": {"height": 300}}
    shown = outputs.figure(plot, EVIL)
    assert "<img" not in shown and shown.count("</script>") == 1
    assert "height:300px" in shown and "&lt;img src=x" in shown
    stored = shown.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(stored) == plot, "the script reads what the lab stored"


def test_a_text_alternative_is_said_as_words():
    assert outputs.spoken("2 <b>bits</b><br><sup>a &lt;b&gt; c</sup>") == "2 bits a <b> c"
    assert outputs.spoken(EVIL) == EVIL, "text, which the attribute escapes"


def test_controls_escape_what_they_say():
    controls = [
        {"label": EVIL, "kind": kind, "stops": [EVIL, "b"], "start": 1}
        for kind in ("range", "select", "checkbox")
    ]
    shown = outputs.replay("x", controls, "")
    assert "<img" not in shown
    assert 'type="range" min="0" max="1" value="1" aria-valuetext="b"' in shown
    assert "<option selected>b</option>" in shown and 'type="checkbox" checked>' in shown
    still = {"label": "text", "kind": "", "stops": ["a"], "start": 0}
    assert outputs.replay("x", [still], "").count("<label>") == 0
    assert "Open the lab to move also: text." in outputs.note([*controls, still])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("<a href='01-a/101-b.ipynb'>", "<a href='01-a/101-b.html'>"),
        ('<a class="x" href="../b.ipynb#part">', '<a class="x" href="../b.html#part">'),
        ("<a href='https://x.org/b.ipynb'>", "<a href='https://x.org/b.ipynb'>"),
        ("<a href='a.html'>b.ipynb</a>", "<a href='a.html'>b.ipynb</a>"),
    ],
)
def test_links_between_labs_lead_to_pages(before, after):
    assert outputs.linked(before) == after


def test_shown_code_links_to_where_it_is_now():
    lines = (PACKAGE / "experts/moe.py").read_text("utf-8").splitlines()
    line = next(n for n, text in enumerate(lines, start=1) if text.startswith("class Experts("))
    shown = f"`lablib/experts/moe.py`, line {line + 7}\n\n```python\n{lines[line - 1]}\n```"
    linked = outputs.shown_code(shown, "../../")
    assert f'href="../../code/lablib/experts/moe.html#L-{line}"' in linked
    assert linked.endswith(f"```python\n{lines[line - 1]}\n```")
    for other in ("`lablib/exercises/glam.py`, line 1\n\n```python\nx\n```", "some *words*"):
        assert outputs.shown_code(other, "") == other


def test_exercises_have_no_page():
    assert not [name for name in code.modules() if "exercises" in name]
    assert code.target("lablib.exercises", "Exercise") is None
    assert {"lablib", "lablib.experts.moe", "lablib.lab.figures"} <= set(code.modules())


@pytest.mark.parametrize(
    ("module", "name", "found"),
    [
        ("lablib.experts", "moe", ("lablib.experts.moe", None)),
        ("lablib.lab", "explore", ("lablib.lab.explorer", "def explore(")),
        ("lablib.lab.explorer", "loose", ("lablib.lab.ranges", "def loose(")),
        ("lablib.lab.paint", "PALETTE", ("lablib.lab.paint", "PALETTE =")),
    ],
)
def test_a_name_is_followed_to_its_definition(module, name, found):
    there, line = code.target(module, name)
    assert there == found[0]
    if found[1]:
        assert code.text_of(there).splitlines()[line - 1].startswith(found[1])
    assert code.target(module, "no_such_name") is None


def test_imports_are_linked():
    text = "from lablib.lab import explore as e, nothing\nfrom torch import nn\nx = lablib.lab\n"
    pygments = pytest.importorskip("pygments")
    formatter = pygments.formatters.get_formatter_by_name("html")
    shown = pygments.highlight(text, pygments.lexers.get_lexer_by_name("ipython3"), formatter)
    linked = code.link_imports(shown, "../")
    assert linked.count("<a ") == 2
    assert 'href="../code/lablib/lab.html#L-1">lablib.lab</a>' in linked
    assert '">explore</a>' in linked and ">nothing</span>" in linked


def test_every_top_level_import_of_a_lab_is_found():
    """No name that labs import leads nowhere."""
    lost = set()
    for row in (paper("302"), paper("201"), paper("1008")):
        for cell in json.loads(row.paths["lab"].read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or "%pip" in source:
                continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("lablib"):
                    lost |= {a.name for a in node.names if not code.target(node.module, a.name)}
    assert lost == set()


def test_stops_of_controls():
    whole = of(ipywidgets.IntSlider(value=3, min=1, max=5, step=1, description="n"))
    assert (whole.values, whole.stops, whole.start) == ((1, 2, 3, 4, 5), tuple("12345"), 2)
    power = of(ipywidgets.FloatLogSlider(value=10, base=10, min=0, max=2, step=1))
    assert power.values == (1, 10, 100) and power.start == 1
    menu = of(ipywidgets.Dropdown(options={"one": 1, "two": 2}, value=2))
    assert (menu.kind, menu.values, menu.stops, menu.start) == ("select", (1, 2), ("one", "two"), 1)
    tick = of(ipywidgets.Checkbox(value=True))
    assert (tick.values, tick.start) == ((False, True), 1)
    assert of(ipywidgets.Text(value="a")).values == ("a",)


def test_many_stops_are_thinned_and_a_menu_stays_whole():
    long = of(ipywidgets.IntSlider(value=77, min=0, max=1000, step=1))
    menu = of(ipywidgets.Dropdown(options=list("abcdef")))
    kept, whole = thinned([long, menu], 64)
    assert whole == menu and len(kept.values) * 6 <= 64
    assert {0, 77, 1000} <= set(kept.values) and kept.values[kept.start] == 77
    assert list(kept.values) == sorted(kept.values)
    big = replace(menu, values=tuple(range(99)), stops=tuple(map(str, range(99))), start=5)
    assert [len(control.values) for control in thinned([menu, big], 64)] == [6, 1]
    assert thinned([menu, big], 64)[1].values == (5,)


def picture(n, kind):
    fig = figures.figure(f"{kind} {n}")
    return fig.add_scatter(x=np.arange(3.0), y=np.arange(3) * n / 3, name=kind)


def test_frames_are_recorded_packed_and_read_again(monkeypatch, tmp_path):
    explorer = explore(picture, n=(1, 3, 1, 2), kind=["a", "b"])
    made = record(explorer.controls, explorer._made)
    assert [c["start"] for c in made["controls"]] == [1, 0] and len(made["frames"]) == 6
    pack = frames.packed(made)
    frame = pack["frames"][2 * 2 + 1]  # n = 3, kind = "b"
    trace = pack["pool"][frame["data"][0]]
    assert trace["y"] == [0, 1, 2] and trace["name"] == "b"
    assert pack["pool"][frame["alt"]].startswith("b 3")
    assert pack["pool"][frame["layout"]["title"]]["text"] == "b 3"
    row = paper("302")
    monkeypatch.setattr(frames, "data_dir", lambda: tmp_path)
    code_now = frames.fingerprint(row.paths["lab"])
    line = frames.write(frames.path_of(row), code_now, {"c:0": pack})
    assert "1 explorers, 6 frames" in line and frames.load(row) == {"c:0": pack}
    frames.write(frames.path_of(row), "another", {"c:0": pack})
    assert frames.load(row) == {}, "the lab has changed since"
    frames.path_of(row).write_bytes(gzip.compress(b"{"))
    with pytest.raises(ValueError, match="record it again with `python -m lablib frames switch"):
        frames.load(row)


def test_large_frames_are_left_out_and_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2**60, 40_000).tolist()
    some = {"controls": [], "pool": [1], "frames": [{"html": 0}]}
    line = frames.write(tmp_path / "x.json.gz", "", {"big": {**some, "pool": noise}, "small": some})
    assert "too large and left out: big" in line
    assert (tmp_path / "x.json.gz").stat().st_size <= frames.LIMIT


def test_a_function_that_fails_is_named():
    def fails(n):
        raise ValueError("no such n")

    with pytest.raises(RuntimeError, match=r"no frame for \(1,\): ValueError: no such n"):
        record({"n": ipywidgets.IntSlider(min=1, max=2)}, fails)


def test_frames_are_in_an_output_only_when_asked_for(monkeypatch):
    shown = []
    monkeypatch.setattr("lablib.lab.explorer.display", lambda data, **_: shown.append(data))
    monkeypatch.setenv("LABLIB_STATIC", "1")
    monkeypatch.delenv("LABLIB_FRAMES", raising=False)
    explore(picture, n=(1, 3), kind=["a", "b"])._ipython_display_()
    assert KIND not in shown[0]
    monkeypatch.setenv("LABLIB_FRAMES", "1")
    explore(picture, n=(1, 3), kind=["a", "b"])._ipython_display_()
    assert len(shown[2][KIND]["frames"]) == 6 and PLOTLY in shown[2]


def test_a_notebook_is_staged():
    plot = {PLOTLY: {"data": [], "layout": {}}, "text/plain": "a title"}
    move = {"text/html": f"{notebooks.MOVE}n.</i>", "text/plain": ""}
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# A\n", "[![Open](https://a)](b) x"]},
        {
            "cell_type": "code",
            "id": "c",
            "metadata": {"jupyter": {"source_hidden": True}},
            "source": "explore(f)",
            "outputs": [{"output_type": "display_data", "data": data} for data in (plot, move)],
        },
    ]
    book = {"cells": cells, "metadata": {}}
    head, cell = notebooks.staged(book, "s", {}, "../")["cells"]
    assert head["source"] == "# A\nx" and cell["metadata"]["tags"] == ["hide-input"]
    assert 'aria-label="a title"' in cell["outputs"][0]["data"]["text/html"]
    assert cell["outputs"][1]["data"]["text/html"] == "<i>Open the lab to move: n.</i>"
    stored = {"controls": [{"label": "n", "kind": "range", "stops": ["1", "2"], "start": 0}]}
    cell = notebooks.staged(book, "s", {"c:0": stored}, "../")["cells"][1]
    assert 'data-frames="s-c-0"' in cell["outputs"][0]["data"]["text/html"]
    assert "Replayed" in cell["outputs"][1]["data"]["text/html"]
    assert cells[1]["outputs"][0]["data"] is plot, "the one given stays as it is"
