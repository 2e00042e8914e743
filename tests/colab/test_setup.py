"""The setup cell on a machine that has nothing yet, and on one that has everything on its disk."""

import nbformat
import pytest

from lablib.paths import project_dir

pytestmark = pytest.mark.colab

LAB = project_dir() / "labs/07-peft/701-unified-peft.ipynb"  # SmolLM2 is the largest download


def set_up(colab, times=1):
    """Run the lab's setup cell in a new kernel; what its runs printed."""
    book = nbformat.v4.new_notebook()
    text = nbformat.read(LAB, as_version=4).cells[1].source
    book.cells = [nbformat.v4.new_code_cell(text) for _ in range(times)]
    colab.execute(book)
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in book.cells]


def test_it_replaces_nothing_and_is_quick(fresh, tmp_path, crowd, stopwatch, record_property):
    fresh.variables |= {
        "PIP_CACHE_DIR": str(tmp_path / "pip"),
        "LABLIB_HOME": str(tmp_path / "home"),
    }
    stopwatch()
    first, second = set_up(fresh, times=2)
    record_property("setup cell, nothing on the disk", f"{stopwatch():.0f} s")
    assert "corpora, tasks and models are ready" in first and second == ""
    assert fresh.replaced() == {}
    added = sorted(set(fresh.versions()) - set(fresh.shipped))
    record_property("setup cell, packages it adds", ", ".join(added))
    assert not {"torch", "numpy", "ipywidgets", "plotly", "transformers"} & set(added)
    assert not [name for name in added if name.startswith(("nvidia", "cuda", "triton"))]
    assert "jupyterlab" not in added, "Colab has a page of its own"
    warm = fresh.bare()
    stopwatch()
    set_up(warm)
    seconds = stopwatch()
    record_property("setup cell, all on the disk", f"{seconds:.0f} s")
    assert seconds < 60 * crowd and warm.replaced() == {}


def test_what_is_missing_says_the_one_command(fresh, tmp_path):
    fresh.variables["LABLIB_HOME"] = str(tmp_path / "home")
    install = nbformat.read(LAB, as_version=4).cells[1].source
    without = "\n".join(line for line in install.splitlines() if "setup" not in line)
    load = "from lablib.data.tasks import load_task\ntry:\n    load_task('movies')\n"
    load += "except RuntimeError as error:\n    print(error)"
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(text) for text in (without, load)]
    fresh.execute(book)
    assert "run `python -m lablib setup`" in book.cells[1].outputs[0]["text"]
