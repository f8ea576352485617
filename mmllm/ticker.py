"""A line on stderr, now and then, that says how far a command is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

TERMINAL_SECONDS = 0.5
FILE_SECONDS = 20.0


def ticker(what: str) -> Callable[[int], None]:
    """A function to call with the number done so far: one line that is redrawn on a terminal, lines elsewhere.

    Args:
        what: is counted: "rows".
    """
    is_terminal = sys.stderr.isatty()
    period = TERMINAL_SECONDS if is_terminal else FILE_SECONDS
    began = drawn_at = time.monotonic()

    def tick(num_done: int) -> None:
        nonlocal drawn_at
        now = time.monotonic()
        if now - drawn_at < period:
            return
        drawn_at = now
        minutes, seconds = divmod(round(now - began), 60)
        line = f"{num_done:,} {what}  {minutes}:{seconds:02d} gone"
        sys.stderr.write(f"\r\033[K{line}\r" if is_terminal else f"{line}\n")
        sys.stderr.flush()

    return tick
