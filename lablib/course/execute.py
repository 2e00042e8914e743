"""How nbgrader runs a submission of a course: its cells behind a fence, its checks by a judge.

nbgrader gives a check cell its points when the cell shows no error. Here what it shows is written
by the judge's verdict alone; whatever the submission printed or patched does not count.
"""

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.preprocessors import Execute
from nbgrader.utils import setenv

from lablib.course import fence
from lablib.course.judge import Judge
from lablib.course.kernel import COURSE
from lablib.lab.grading import JUDGE

# Files that were handed in lie in the kernel's folder, so nothing is imported from there yet.
KERNEL = "import sys; sys.path.remove(''); from lablib.course.kernel import main; main()"
Verdict = tuple[str, str] | None


class JudgedExecute(Execute):
    """nbgrader's Execute with a judge beside it; configured as `c.Execute`."""

    def create_kernel_manager(self) -> Any:
        """Of the kernel of `lablib.course.kernel`, whatever the notebook asks for."""
        manager = super().create_kernel_manager()
        manager.kernel_spec.argv = ["python", "-c", KERNEL, "-f", "{connection_file}"]
        return manager

    def preprocess(self, nb: NotebookNode, resources: Any, km: Any = None) -> tuple[Any, Any]:
        """Run every cell, then let each check cell show its verdict."""
        if not _judge().alive:
            _judge.cache_clear()
        self.module = module_of(resources["nbgrader"]["notebook"])
        self.verdicts: dict[str, Verdict] = {}
        why = _why
        if not fence.available():
            self.log.warning("This system has no Landlock: submissions can read the references")
        try:
            with setenv(**_settings()):
                super().preprocess(nb, resources, km)
        except DeadKernelError:
            self.log.warning("The submission ended its kernel; its other checks get no points")
            why = _ended
        for cell in nb.cells:
            if name := exercise_of(cell):
                nothing = "wrong", f"No function came to the check. {why(name, nb)}"
                cell.outputs = [_shown(*(self.verdicts.get(name) or nothing))]
        return nb, resources

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> tuple[Any, Any]:
        """Run a cell; for a check, the judge waits meanwhile for the function of its name."""
        name = exercise_of(cell)
        if not name or not _judge().open(self.module, name):
            return super().preprocess_cell(cell, resources, index)
        try:
            return super().preprocess_cell(cell, resources, index)
        finally:
            self.verdicts[name] = _judge().close()


@cache
def _judge() -> Judge:
    return Judge()


def _settings() -> dict[str, str]:
    """The environment of a kernel: its judge, the course, and a temporary folder of its own."""
    scratch = _judge().scratch / "kernel"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    own = ("TMPDIR", "IPYTHONDIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR")
    places = {name: str(scratch) for name in own}
    return {**places, JUDGE: _judge().address, COURSE: os.getcwd()}


def module_of(notebook: str) -> str:
    """The exercises of a notebook: "302-switch-transformers" has those of switch_transformers."""
    return Path(notebook).stem.partition("-")[2].replace("-", "_")


def exercise_of(cell: NotebookNode) -> str:
    """The exercise that a cell checks; empty when it checks none."""
    id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
    return id.removeprefix("check-").replace("-", "_") if id.startswith("check-") else ""


def _shown(kind: str, text: str) -> NotebookNode:
    """A verdict as a cell's output; an error, which earns nothing, unless it is correct."""
    if kind == "correct":
        return new_output("display_data", {"text/plain": text})
    return new_output("error", ename="Wrong", evalue=text, traceback=[text])


def _ended(name: str, nb: NotebookNode) -> str:
    return "A cell above ended the process that the notebook runs in"


def _why(name: str, nb: NotebookNode) -> str:
    """What is the matter with the cell that should define the function."""
    for cell in nb.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == name.replace("_", "-"):
            errors = [o for o in cell.outputs if o.output_type == "error"]
            if errors:
                return f"The cell of `{name}` raised {errors[0].ename}: {errors[0].evalue}"
    return f"Define `{name}` in its cell, and leave `lab` and the check below it as they are"
