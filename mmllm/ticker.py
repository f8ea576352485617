"""Lines on stderr that say how far a command is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

TERMINAL_SECONDS = 0.5
FILE_SECONDS = 20.0


def ticker(what: str) -> Callable[[int, int], None]:
    """A function to call with the numbers done so far and in all: one line redrawn on a terminal, lines elsewhere.

    Where fewer are done than before, something else has begun, and its time is counted from there.

    Args:
        what: is counted: "rows".
    """
    is_terminal = sys.stderr.isatty()
    period = TERMINAL_SECONDS if is_terminal else FILE_SECONDS
    began = drawn_at = ticked_at = time.monotonic()
    num_before = 0

    def tick(num_done: int, num_all: int) -> None:
        nonlocal began, drawn_at, ticked_at, num_before
        now = time.monotonic()
        if num_done < num_before:
            began = ticked_at
        ticked_at, num_before = now, num_done
        if now - drawn_at < period:
            return
        drawn_at = now
        line = f"{num_done:,} of {num_all:,} {what}  {clock(now - began)} gone"
        if num_done:
            line += f"  {clock((now - began) / num_done * max(num_all - num_done, 0))} left"
        draw_line(sys.stderr, line, is_terminal)

    return tick


def end_line() -> None:
    """Takes the line off a terminal, before anything else is printed."""
    if sys.stderr.isatty():
        draw_line(sys.stderr, "", True)


def clock(seconds: float) -> str:
    """Minutes and seconds: "3:07"."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def draw_line(stream: TextIO, line: str, is_terminal: bool) -> None:
    """Redraws the line on a terminal; appends it elsewhere."""
    stream.write(f"\r\033[K{line}" if is_terminal else f"{line}\n")
    stream.flush()
