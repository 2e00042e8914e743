import contextlib
import functools

import pytest
import torch

from lablib.lab import code, figures, source
from lablib.lab.widgets import control


class Base:
    def forward(self, x):
        """Base's docstring."""
        return x


class Child(Base):
    """What a child is."""

    def forward(self, x):
        first = x + 1
        return first  # (batch, dim)

    @property
    def size(self):
        """The size's docstring."""
        # why it is two
        return 2

    @functools.cached_property
    def kept(self):
        "One line."
        return 3

    @staticmethod
    def apart(x):
        """Apart's docstring."""
        return x - 1

    def margin(self):
        """Margin's docstring."""
        return """
left of the method
"""


def wrapped(function):
    @functools.wraps(function)
    def outer(*arguments):
        return function(*arguments)

    return outer


@wrapped
def decorated(x):
    """Decorated's docstring."""
    return x * 2


@contextlib.contextmanager
def managed():
    """Managed's docstring."""
    yield 4


@torch.no_grad()
def without_gradients(x):
    """Its docstring, in
    two lines.
    """
    y = x.sum(1)  # (batch,)
    return y


def undocumented(x):
    x = x + 5
    return x


def string_first(x):
    "a" + x
    return 6


def only_a_docstring():
    """Nothing else."""


def fenced():
    """Shows
    ```python
    <script>alert(1)</script>
    ```
    """
    return 7


@pytest.mark.parametrize(
    ("object", "gone", "kept"),
    [
        (Child.forward, "Base", ["first = x + 1", "return first  # (batch, dim)"]),
        (Base.forward, "Base's", ["def forward", "return x"]),
        (Child.size, "docstring", ["@property", "# why it is two", "return 2"]),
        (Child.__dict__["kept"], "One line", ["@functools.cached_property", "return 3"]),
        (Child.apart, "docstring", ["@staticmethod", "return x - 1"]),
        (Child.margin, "docstring", ["def margin", "left of the method"]),
        (Child, "What a child is", ["class Child(Base):", "first = x + 1", "The size's docstring"]),
        (decorated, "docstring", ["@wrapped", "return x * 2"]),
        (managed, "docstring", ["@contextlib.contextmanager", "yield 4"]),
        (without_gradients, "docstring", ["@torch.no_grad()", "x.sum(1)  # (batch,)", "return y"]),
        (functools.partial(undocumented, 1), "partial", ["x = x + 5"]),
        (undocumented, "zzz", ["def undocumented(x):", "x = x + 5", "return x"]),
        (string_first, "zzz", ['"a" + x', "return 6"]),
        (only_a_docstring, "zzz", ['"""Nothing else."""']),
        (code, "shown from its source", ["import ast", "def source", "Raises TypeError"]),
    ],
)
def test_only_the_objects_own_docstring_goes(object, gone, kept, shown):
    source(object)
    source(object, docstring=False)
    whole, text = shown
    assert gone not in text and all(line in text and line in whole for line in kept)
    body = [line for line in text.split("```python\n")[1].splitlines() if line]
    assert not body[0].startswith(" "), "flush left"


def test_it_is_lablibs_own_and_says_where(shown):
    source(figures.interval)
    assert "`lablib/evidence/intervals.py`, line " in shown[0] and "t.ppf" in shown[0]
    assert '"""' in shown[0]
    source(control, docstring=False)
    assert "`lablib/lab/widgets.py`" in shown[1] and '"""' not in shown[1]


def test_code_cannot_leave_its_fence(shown):
    source(fenced)
    head, fence = shown[0].split("\n\n", 1)[1].split("python\n")[0], "````"
    assert head == fence and shown[0].endswith(f"\n{fence}")


def test_what_has_no_source_is_refused():
    with pytest.raises(TypeError, match="has no Python source"):
        source(len)
    with pytest.raises(TypeError, match="has no Python source"):
        source(3)
