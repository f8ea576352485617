"""Runs of a study or a sweep on this machine, so many at once; what one costs is not lost where another fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from mmllm.quickstart.processes import terminated_as_interrupt
from mmllm.studies.commands import RunFailed

FAILURES_AT_FIRST = 3
"""So many runs that failed before one ended well: others would fail likewise, and none begins."""
log = logging.getLogger(__name__)
Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)


class OneRun(Protocol[Item_contra]):
    """What runs one item, in processes of its own."""

    def run(self, item: Item_contra, /) -> dict[str, Any]:
        """Gives its result."""
        ...

    def stop(self) -> None:
        """Ends its processes, from another thread; none begins after that."""
        ...


def run_at_once(
    items: Sequence[Item],
    make: Callable[[], OneRun[Item]],
    num_at_once: int,
    may_begin: Callable[[float], bool] = lambda _longest: True,
    would_wait: Callable[[Item, Sequence[Item]], bool] = lambda _item, _running: False,
) -> Iterator[tuple[Item, dict[str, Any] | None]]:
    """Runs items in their order, but for those that would wait; gives each with its result as it ends.

    Args:
        items: to run.
        make: gives what runs one of them.
        num_at_once: processes at once.
        may_begin: whether one more may begin, by the minutes of the longest so far; one that may not comes with None.
        would_wait: whether an item would wait for what those that run are at: the next that would not begins before it.

    A run that fails is told at once, and the others go on.

    Raises:
        RunFailed: runs failed; all others were run first, unless the first three failed.
        Exception: a fault of ours in a run; those beside it end first, and none begins after it.
        KeyboardInterrupt: then all processes are ended.
    """
    waiting, longest, num_done = list(items), 0.0, 0
    failed: list[RunFailed] = []
    fault: Exception | None = None
    running: dict[Future[dict[str, Any]], tuple[Item, OneRun[Item], float]] = {}
    with terminated_as_interrupt(), ThreadPoolExecutor(num_at_once) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < num_at_once:
                    now = [each for each, _, _ in running.values()]
                    item = waiting.pop(next((n for n, each in enumerate(waiting) if not would_wait(each, now)), 0))
                    if not may_begin(longest):
                        yield item, None
                        continue
                    one = make()
                    running[pool.submit(one.run, item)] = (item, one, time.monotonic())
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item, _, begun = running.pop(future)
                    error = future.exception()
                    if isinstance(error, RunFailed):
                        log.warning("%s", error)
                        failed.append(error)
                        if not num_done and len(failed) >= FAILURES_AT_FIRST:
                            waiting = []
                        continue
                    if isinstance(error, Exception):
                        fault, waiting = fault or error, []
                        continue
                    num_done += 1
                    longest = max(longest, (time.monotonic() - begun) / 60)
                    yield item, future.result()
        except BaseException:
            for _, one, _ in running.values():
                one.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if fault is not None:
        raise fault
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise RunFailed(f"{len(failed)} runs failed, the first: {failed[0]}")
