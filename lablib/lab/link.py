"""A call across processes, with what only one side has: functions, and graphs of gradients.

Each side hands out numbers for what stays with it (`Link.mine`). A tensor that comes out of a
graph arrives as a tensor whose gradient is asked for on the side where the graph is.
"""

import builtins
import io
import pickle
from functools import cache
from multiprocessing.connection import Connection
from types import FunctionType
from typing import Any

from lablib.exercises import is_tensor
from lablib.lab import wire

LARGEST = 1 << 26  # bytes of a message


class Link:
    """One end of a connection; what the two ends share is in JudgesEnd and StudentsEnd."""

    def __init__(self, connection: Connection):
        self.connection = connection
        self.mine: list[Any] = []  # what the other side may ask for, by number
        self.leaves: list[Any] = []  # tensors that the call's gradients are for, on both sides

    def number(self, value: Any) -> int:
        """A number by which the other side can ask for `value`."""
        self.mine.append((value, self.leaves))
        return len(self.mine) - 1

    def gradients(self, number: int, gradient: Any) -> list[Any]:
        """The gradients of the leaves, for that of the tensor of a number; None for no path."""
        import torch

        value, leaves = self.mine[number]
        return list(
            torch.autograd.grad(value, leaves, gradient, retain_graph=True, allow_unused=True)
        )

    def attached(self, value: Any, number: int) -> Any:
        """`value` as if it came out of the other side's graph."""
        return _elsewhere().apply(value, lambda g: self.ask_gradients(number, g), *self.leaves)

    def ask_gradients(self, number: int, gradient: Any) -> list[Any]:
        """The other side's `gradients`."""
        raise NotImplementedError


class JudgesEnd(Link):
    """The end that has the test; what it receives is JSON, what it sends is pickled."""

    def call(self, names: list[str], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """("returned", what the student's function returns), or ("wrong", why), or another kind.

        names: of the parameters. Raises EOFError when the other process is gone, wire.Unreadable
        when it sends nonsense.
        """
        self.leaves = _leaves([*arguments, *options.values()])
        self.send("call", names, self.leaves, self.dumps((arguments, options)))
        return self._answer()

    def ask_gradients(self, number: int, gradient: Any) -> list[Any]:
        """The student's side's gradients of its tensor."""
        self.send("gradients", number, gradient)
        return self._answer()[1]

    def send(self, *message: Any) -> None:
        """Send what the judge has made."""
        self.connection.send_bytes(pickle.dumps(message))

    def dumps(self, value: Any) -> bytes:
        """Pickle arguments; functions of exercises and tensors with a graph become numbers."""
        file = io.BytesIO()
        _Pickler(file, self).dump(value)
        return file.getvalue()

    def _answer(self) -> tuple[str, Any]:
        """Serve what the other side asks for until it answers."""
        while True:
            kind, *rest = wire.loads(self.connection.recv_bytes(LARGEST))
            if kind == "call":
                self._serve(*rest)
            elif kind == "gradients":
                self.send("value", self.gradients(rest[0], wire.unpack(rest[1])))
            else:
                return kind, wire.unpack(rest[0], self._tensor)

    def _serve(self, number: int, packed: Any) -> None:
        """Call a function of the exercise for the student; its error is raised on their side."""
        function, _ = self.mine[number]
        try:
            arguments, options = wire.unpack(packed)
            value = function(*arguments, **options)
        except Exception as error:
            self.send("error", type(error).__name__, str(error))
        else:
            self.send("value", value)

    def _tensor(self, value: Any, packed: dict[str, Any]) -> Any:
        if "leaf" in packed:
            return self.leaves[packed["leaf"]]
        return self.attached(value, packed["number"]) if "number" in packed else value


class StudentsEnd(Link):
    """The end that has the student's function: it unpickles what the judge sends."""

    def receive(self) -> tuple[Any, ...]:
        """The judge's next message."""
        return pickle.loads(self.connection.recv_bytes())

    def send(self, kind: str, value: Any) -> None:
        """Send an answer; of a tensor with a graph also the number of that graph."""
        self.connection.send_bytes(wire.dumps([kind, wire.pack(value, self._tensor)]))

    def arguments(self, leaves: list[Any], pickled: bytes) -> tuple[tuple[Any, ...], dict]:
        """The arguments of a call, and its options."""
        self.leaves = leaves
        return _Unpickler(io.BytesIO(pickled), self).load()

    def ask(self, number: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the judge's function of a number returns; raises as it does."""
        return self._asked("call", number, (arguments, options))

    def ask_gradients(self, number: int, gradient: Any) -> list[Any]:
        """The judge's gradients of its tensor."""
        return self._asked("gradients", number, gradient)

    def _asked(self, what: str, number: int, value: Any) -> Any:
        self.connection.send_bytes(wire.dumps([what, number, wire.pack(value)]))
        kind, *rest = self.receive()
        if kind == "value":
            return rest[0]
        name, text = rest
        known = getattr(builtins, name, None)
        raise (known if known in _ERRORS else RuntimeError)(text)

    def _tensor(self, value: Any) -> dict[str, Any]:
        packed = wire.pack_tensor(value)
        if not value.requires_grad or "tensor" not in packed:
            return packed
        for at, leaf in enumerate(self.leaves):
            if leaf is value:
                return packed | {"leaf": at}
        return packed | {"number": self.number(value)}


_ERRORS = {ValueError, TypeError, IndexError, KeyError, RuntimeError, ZeroDivisionError}


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, link: Link):
        super().__init__(file)
        self.link = link

    def persistent_id(self, value: Any) -> tuple[str, Any, Any] | None:
        if isinstance(value, FunctionType) and value.__module__.startswith("lablib.exercises"):
            return "function", self.link.number(value), None
        if is_tensor(value) and value.requires_grad:
            at = next((i for i, leaf in enumerate(self.link.leaves) if leaf is value), None)
            if at is not None:
                return "leaf", at, None
            return "graph", self.link.number(value), value.detach()
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, link: StudentsEnd):
        super().__init__(file)
        self.link = link

    def persistent_load(self, name: tuple[str, Any, Any]) -> Any:
        kind, number, value = name
        if kind == "leaf":
            return self.link.leaves[number]
        if kind == "graph":
            return self.link.attached(value, number)
        link = self.link
        return lambda *arguments, **options: link.ask(number, arguments, options)


def _leaves(values: Any) -> list[Any]:
    """The tensors in containers that gradients are asked for."""
    found = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (tuple, list, dict)):
            found += _leaves(value)
        elif is_tensor(value) and value.is_leaf and value.requires_grad:
            found.append(value)
    return found


@cache
def _elsewhere() -> Any:
    """A function of autograd whose graph is in another process; torch is imported for it only."""
    import torch

    class Elsewhere(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, ask, *leaves):
            ctx.ask = ask
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return None, None, *ctx.ask(gradient)

    return Elsewhere
