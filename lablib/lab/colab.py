"""Colab: whether a notebook runs there, and Plotly's figures as its pages can draw them."""

import sys
from uuid import uuid4

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs_version

# Colab puts HTML into a page that is there already. Scripts with an address then run after those
# with text, so that Plotly's own HTML draws before Plotly has come; this waits for it.
_PAGE = """\
<div id="{id}"></div>
<script>
(() => {{
  const draw = () => Plotly.newPlot("{id}", {figure});
  if (window.Plotly) return draw();
  const script = document.createElement("script");
  script.src = "https://cdn.plot.ly/plotly-{version}.min.js";
  script.onload = draw;
  document.head.append(script);
}})();
</script>"""


def here() -> bool:
    """Whether this is Colab, whose kernel has imported google.colab before the first cell."""
    return "google.colab" in sys.modules


def page(fig: go.Figure) -> str:
    """A figure as HTML that loads Plotly's script, where it is not yet there, and then draws."""
    # `<` stands in texts alone, where JSON may write it so; as it is, it could end the script.
    figure = (fig.to_json() or "{}").replace("<", "\\u003c")
    return _PAGE.format(id=uuid4().hex, figure=figure, version=get_plotlyjs_version())
