"""A time limit on a call, in a notebook's kernel and elsewhere."""

import contextlib
import contextvars
import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

LIMIT = 20.0  # seconds an exercise's check may take; nbgrader gives a cell 30


class TooSlow(BaseException):
    """No Exception, so that `except Exception` in a loop does not swallow it."""


def within(limit: float, function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function; raises TooSlow when it takes more than `limit` seconds.

    On the main thread a signal stops it, elsewhere it is left behind on a thread of its own. A
    single call into C that never returns holds up the former.
    """
    main = threading.current_thread() is threading.main_thread()
    if not (main and hasattr(signal, "setitimer")):
        return _on_a_thread(limit, function, *arguments)
    with _alarm(limit):
        function(*arguments)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise TooSlow

    start, handler = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    # It rings each second from then on: a bare `except` may swallow the first.
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:
            left = max(left - (time.monotonic() - start), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)


def _on_a_thread(limit: float, function: Callable[..., Any], *arguments: Any) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            function(*arguments)
        except BaseException as error:
            errors.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(work,), daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        stop = ctypes.c_ulong(thread.ident), ctypes.py_object(TooSlow)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(*stop)
        raise TooSlow
    if errors:
        raise errors[0]
