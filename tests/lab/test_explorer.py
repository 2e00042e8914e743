import html
import json

import ipywidgets
import pytest

from lablib.lab import explore, figures

PLOTLY = "application/vnd.plotly.v1+json"
VIEW = "application/vnd.jupyter.widget-view+json"


def growing(order, corpus):
    if order == 3:
        raise ValueError("order 3 <b>breaks</b>\nsecond line")
    fig = figures.figure(f"{corpus}", x="x", y="y")
    return figures.line(fig, range(order), [range(order)], corpus)


def test_it_redraws_in_place_and_shows_errors_there(shown):
    made = explore(growing, order=(1, 5), corpus=["a", "b"])
    made._ipython_display_()
    assert len(made.figure.data[0].x) == 1 and sum(PLOTLY in data for data in shown.data.values())
    made.controls["order"].value = 2
    made.controls["corpus"].value = "b"
    assert len(made.figure.data[0].x) == 2 and made.figure.layout.title.text == "b"
    assert shown.changes[-1][PLOTLY]["layout"]["title"]["text"] == "b"
    made.controls["order"].value = 3
    assert made.error == "ValueError: order 3 <b>breaks</b>"
    assert "&lt;b&gt;" in shown.page and PLOTLY not in shown.kinds()
    made.controls["order"].value = 4
    assert made.error == "" and shown.kinds().count(PLOTLY) == 1
    assert made.seconds < 0.15


def test_only_the_controls_are_widgets(shown):
    made = explore(growing, order=(1, 5), corpus=["a", "b"])
    made._ipython_display_()
    views = [data for data in shown.data.values() if VIEW in data]
    plots = [data for data in shown.data.values() if PLOTLY in data]
    assert len(views) == len(plots) == 1 and VIEW not in plots[0]
    assert len(json.dumps(plots)) < 25_000


def test_a_plot_is_replaced_over_a_blank_of_its_height(shown):
    # JupyterLab's Plotly renderer ignores new data while it is kept.
    made = explore(growing, order=(1, 5), corpus=["a", "b"])
    made._ipython_display_()
    made.controls["order"].value = 2
    blank, plot = shown.changes
    assert "height:400px" in blank["text/html"] and PLOTLY in plot


def test_html_changes_at_once(shown):
    made = explore(lambda text: f"<b>{html.escape(text)}</b>", text="a")
    made._ipython_display_()
    made.controls["text"].value = "<i>"
    assert [data["text/html"] for data in shown.changes] == ["<b>&lt;i&gt;</b>"]


def test_stored_it_is_a_figure_and_a_line(shown, stored):
    labels = {"order": "order <n>"}
    explore(growing, labels, order=(1, 5), corpus=["a", "b"])._ipython_display_()
    assert PLOTLY in shown[0] and "order &lt;n&gt;, corpus" in shown[1] and VIEW not in str(shown)


def test_labels_are_of_controls():
    made = explore(growing, labels={"order": "words before"}, order=(1, 5), corpus=["a"])
    assert made.controls["order"].description == "words before"
    with pytest.raises(ValueError, match="labels for ordre"):
        explore(growing, labels={"ordre": "words before"}, order=(1, 5), corpus=["a"])


def test_a_cell_run_again_takes_over_the_readers_widget():
    calls = []

    def run_cell(widget):
        def draw(x):
            calls.append(x)
            return figures.figure(str(x))

        return explore(draw, x=widget)

    def other(x):
        calls.append(-x)
        return figures.figure(str(x))

    widget = ipywidgets.IntSlider(1, 1, 5)
    for _ in range(3):
        run_cell(widget)
    explore(other, x=widget)
    calls.clear()
    widget.value = 4
    assert sorted(calls) == [-4, 4]


def still(fig):
    return figures.fixed(fig, x=(0, 10), y=(0, 10))


def test_a_rehearsal_moves_every_control_and_puts_it_back(shown, tested):
    calls = []

    def draw(n, part, kind, flag, text):
        calls.append((n, part, kind, flag, text))
        return still(figures.line(figures.figure(), [0], [[n]], "a"))

    made = explore(draw, n=(1, 5, 1, 3), part=(0.0, 1.0), kind=["a", "b"], flag=True, text="hello")
    start = (3, 0.0, "a", True, "hello")
    assert calls[0] == start and len(set(calls)) == len(calls) == 1 + 2 + 1 + 1 + 1 + 4
    assert {call[0] for call in calls} == {1, 3, 5} and {call[2] for call in calls} == {"a", "b"}
    assert {len(call[4]) for call in calls} >= {0, 5000}
    assert tuple(widget.value for widget in made.controls.values()) == start
    assert made.figure.data[0].y[0] == 3
    made.controls["n"].value = 4
    assert calls[-1][0] == 4, "it follows its controls again"


@pytest.mark.parametrize("kind", ["html", "figure"])
def test_a_rehearsal_finds_what_is_not_escaped(kind, shown, tested):
    def careless(text):
        return f"<b>{text}</b>" if kind == "html" else figures.figure(text)

    def careful(text):
        return careless(html.escape(text))

    explore(careful, text="hello")
    with pytest.raises(AssertionError, match=r"careless, text = '<img.*html\.escape"):
        explore(careless, text="hello")


def test_a_rehearsal_finds_what_raises(shown, tested):
    def inverse(order):
        return figures.figure(str(1 / (5 - order)))

    with pytest.raises(AssertionError, match="inverse, order = '5': ZeroDivisionError") as caught:
        explore(inverse, order=(1, 5))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(AssertionError, match="text = '': IndexError"):
        explore(lambda text: text[0], text="hello")


def test_a_rehearsal_finds_ranges_that_move(shown, tested):
    def slope(a):
        return figures.figure().add_scatter(x=[0, 1], y=[0, a])

    def square(a):
        return figures.figure().add_heatmap(z=[[0, a]])

    with pytest.raises(AssertionError, match=r"slope: ranges that move.*y: 0 to 5\)"):
        explore(slope, a=(1, 5))
    with pytest.raises(AssertionError, match="color: 0 to 5"):
        explore(square, a=(1, 5))
    explore(lambda a: figures.fixed(slope(a), y=(0, 5)), a=(1, 5))
    explore(lambda a: figures.fixed(square(a), color=(0, 5)), a=(1, 5))
    explore(lambda a: slope(a).update_yaxes(autorange=True), a=(1, 5))
    explore(slope, a=[1, 5])  # a menu's entries may have axes of their own


def test_a_tree_has_no_scale_of_colors_that_could_move(shown, tested):
    def tree(marked):
        colors = ["#fff", "#d55e00" if marked else "#000"]
        made = figures.figure().add_icicle(labels=["all", "leaf"], parents=["", "all"])
        return made.update_traces(marker_colors=colors)

    assert explore(tree, marked=False).figure.data[0].marker.colors[1] == "#000"


def test_a_reader_is_not_rehearsed(shown, monkeypatch):
    monkeypatch.setenv("LABLIB_TIER", "smoke")
    calls = []
    explore(lambda n: calls.append(n) or figures.figure(), n=(1, 5))
    assert calls == [1]


def test_colab_gets_html_in_an_output_widget(shown, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google.colab", object())
    made = explore(growing, order=(1, 5), corpus=["a", "b"])
    made._ipython_display_()
    made.controls["corpus"].value = "b"
    place, first = [data for data in shown.data.values() if "newPlot" in str(data)][:2]
    second = list(shown.data.values())[-1]
    assert place[VIEW]["model_id"] == made._place.output.model_id
    assert place["text/html"] == first["text/html"], "what a page without widgets shows"
    assert VIEW not in second and '"text":"b"' in second["text/html"].partition("newPlot")[2]
    assert shown.changes == [] and PLOTLY not in shown.kinds()


def test_a_text_does_not_end_colabs_script(shown, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google.colab", object())
    made = figures.bundle(figures.figure("</script><b>"))["text/html"]
    assert made.count("</script>") == 1 and made.count("<b>") == 0 and "\\u003cb" in made
