"""axe-core finds nothing serious, on a phone in light and at a desk in dark."""

import pytest

from lablib.paths import project_dir

pytestmark = pytest.mark.site

AXE = project_dir() / "build" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = [
    "index.html",
    "labs/03-experts/index.html",
    "labs/03-experts/302-switch-transformers.html",
    "labs/02-theory/201-markov-chains.html",
    "labs/04-scaling/405-batch-size-law.html",
    "code/lablib/experts/moe.html",
]
FOUND = """async () => (await axe.run()).violations
    .filter(rule => ['serious', 'critical'].includes(rule.impact))
    .map(rule => [rule.id, rule.nodes.length, rule.nodes[0].html.slice(0, 200),
                  rule.nodes[0].failureSummary])"""


@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (1280, "dark")])
@pytest.mark.parametrize("path", PAGES)
def test_axe_finds_nothing_serious(path, width, theme, reader):
    one = reader(width, theme)
    one.open(path)
    one.page.evaluate("document.querySelectorAll('main details').forEach(one => one.open = true)")
    one.draw()
    one.page.add_script_tag(content=AXE.read_text("utf-8"))
    assert one.page.evaluate(FOUND) == []
