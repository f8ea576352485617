"""An iterator whose next values are made in a thread, so that who takes them rarely waits."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Generic, TypeVar

Value = TypeVar("Value")

THREAD_NAME = "mmllm-ahead"


class Ahead(Iterator[Value]):
    """An iterator's values, in its order, made before they are asked for.

    An error comes where its value would have come. The thread begins with the first value that is asked for. It ends
    with the values, by `close`, or when nobody has this object any more. While the process forks there is none: a
    child would inherit the locks that it holds, without the thread that lets them go.

    Args:
        values: The iterator; nothing else may take from it.
        is_enough: Whether the values that are made and not taken, one at least, are enough for now.
    """

    def __init__(self, values: Iterator[Value], is_enough: Callable[[Sequence[Value]], bool]) -> None:
        self._work = _Work(values, is_enough)
        self._close = weakref.finalize(self, self._work.close)

    def __enter__(self) -> Ahead[Value]:
        """Itself; leaving it closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __next__(self) -> Value:
        """The next value.

        Raises:
            StopIteration: There is none, or it is closed.
            Exception: What the iterator raised.
        """
        try:
            return self._work.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the thread; values that were not taken are lost."""
        self._close()


class _Work(Generic[Value]):
    """What the thread and the one who takes share; the thread doesn't keep `Ahead` itself alive."""

    def __init__(self, values: Iterator[Value], is_enough: Callable[[Sequence[Value]], bool]) -> None:
        self._values, self._is_enough = values, is_enough
        self._ready: deque[Value] = deque()
        self._error: BaseException | None = None
        self._is_over = self._stops = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # with a lock that garbage collection may take again
        _LIVE.add(self)

    def take(self) -> Value:
        with self._changed:
            while not self._ready and not self._is_over:
                self._start()
                self._changed.wait()
            if self._ready:
                value = self._ready.popleft()
                if not self._has_enough():  # waking the thread for nothing would cost more than the rest of this
                    self._start()
                    self._changed.notify_all()
                return value
            if self._error is not None:
                raise self._error
            raise StopIteration

    def close(self) -> None:
        with self._changed:
            self._is_over = True
        self._pause()
        with self._changed:
            self._ready.clear()
            self._error = None
            self._changed.notify_all()

    def hold(self) -> None:
        """Ends the thread, and lets none begin until `release`."""
        self._pause()
        self._changed.acquire()
        while self._thread is not None:  # begun since
            self._changed.release()
            self._pause()
            self._changed.acquire()

    def release(self) -> None:
        """As after `hold`; the next value that is taken begins a thread."""
        self._changed.release()

    def is_own_thread(self) -> bool:
        """Whether the caller is the thread that makes the values."""
        return self._thread is threading.current_thread()

    def _has_enough(self) -> bool:
        return bool(self._ready) and self._is_enough(self._ready)

    def _start(self) -> None:
        if self._thread is None and not self._is_over:
            self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
            self._thread.start()

    def _pause(self) -> None:
        with self._changed:
            thread, self._stops = self._thread, True
            self._changed.notify_all()
        if thread is threading.current_thread():  # garbage collection found the owner here: it ends by itself
            return
        if thread is not None:
            thread.join()
        with self._changed:
            if self._thread is thread:
                self._thread, self._stops = None, False

    def _run(self) -> None:
        while True:
            try:
                with self._changed:
                    while not self._stops and self._has_enough():
                        self._changed.wait()
                    if self._stops:
                        return
                value = next(self._values)
            except StopIteration:
                return self._end(None)
            except BaseException as error:
                return self._end(error)
            with self._changed:
                self._ready.append(value)
                self._changed.notify_all()

    def _end(self, error: BaseException | None) -> None:
        with self._changed:
            self._is_over, self._error = True, error
            self._changed.notify_all()


_LIVE: weakref.WeakSet[_Work] = weakref.WeakSet()
_HELD: list[_Work] = []


def _hold_all() -> None:
    for work in list(_LIVE):
        if work.is_own_thread():  # it forks itself, and can't wait for its own end
            continue
        work.hold()
        _HELD.append(work)


def _release_all() -> None:
    while _HELD:
        _HELD.pop().release()


if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
    os.register_at_fork(before=_hold_all, after_in_parent=_release_all, after_in_child=_release_all)
