"""What a cell shows, kept instead of sent to a notebook."""

import pytest

PLOTLY = "application/vnd.plotly.v1+json"
VIEW = "application/vnd.jupyter.widget-view+json"


class Shown(list):
    """The texts that were displayed; `data` are MIME bundles by display id, as they are now."""

    def __init__(self):
        super().__init__()
        self.data = {}
        self.changes = []

    def display(self, *objects, raw=False, display_id=None, **options):
        for thing in objects:
            self.append(str(thing) if raw else str(getattr(thing, "data", thing)))
            if raw:
                self.data[display_id or len(self.data)] = thing

    def update(self, thing, raw=False, display_id=None):
        assert display_id in self.data, "only what is shown can change"
        self.data[display_id] = thing
        self.changes.append(thing)

    @property
    def page(self):
        """The HTML that stands on the page now."""
        return "\n".join(str(data.get("text/html", "")) for data in self.data.values())

    def kinds(self):
        return [kind for data in self.data.values() for kind in data]


@pytest.fixture
def shown(monkeypatch):
    kept = Shown()
    for module in ("runtime", "explorer", "guesses", "place", "code", "grading"):
        monkeypatch.setattr(f"lablib.lab.{module}.display", kept.display)
    monkeypatch.setattr("lablib.lab.figures.display", kept.display)
    monkeypatch.setattr("lablib.lab.place.update_display", kept.update)
    monkeypatch.delenv("LABLIB_STATIC", raising=False)
    return kept


@pytest.fixture
def stored(monkeypatch):
    """Outputs are being stored at the cpu tier: no reader, and no rehearsal."""
    monkeypatch.setenv("LABLIB_STATIC", "1")
    monkeypatch.setenv("LABLIB_TIER", "cpu")


@pytest.fixture
def tested(monkeypatch):
    """A test runs the notebook."""
    monkeypatch.setenv("LABLIB_STATIC", "1")
    monkeypatch.setenv("LABLIB_TIER", "smoke")
