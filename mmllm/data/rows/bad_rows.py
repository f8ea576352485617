"""Rows that can't be used: named, counted and bounded; and what is the machine's fault instead."""

from __future__ import annotations

import errno
import logging
import math
from collections import Counter
from dataclasses import dataclass, field

_logger = logging.getLogger(__name__)
_SHOWN = 5


class ManifestError(ValueError):
    """A manifest, or too many of its rows, can't be used. The message names the file and the rows."""


@dataclass
class BadRows:
    """Rows that were skipped: counted, named and bounded."""

    max_fraction: float
    reasons: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """What else isn't used, counted by what it is: files that aren't rows, columns that have no place."""

    def add(self, where: str, reason: object) -> None:
        """Note a skipped row.

        Args:
            where: Its `file:line`.
            reason: What is wrong with it.
        """
        message = f"{where}: {reason}"
        _logger.warning("skipped %s", message)
        self.reasons.append(message)

    def check(self, num_rows: int, name: str, since: int = 0, is_end: bool = True) -> None:
        """Refuse a manifest of which too many rows were skipped.

        Args:
            num_rows: How many rows were looked at, bad ones included.
            name: The manifest.
            since: Only the bad rows from this one on are the manifest's.
            is_end: Whether all rows were looked at. If not, those to come are taken for good.

        Raises:
            ManifestError: More than `max_fraction` of the rows (rounded up), or all of them, are bad.
        """
        reasons = self.reasons[since:]
        num_bad = len(reasons)
        allowed = math.ceil(self.max_fraction * num_rows)
        if num_bad and (num_bad > allowed or num_bad >= num_rows):
            shown = "; ".join(reasons[:_SHOWN]) + ("; …" if num_bad > _SHOWN else "")
            raise ManifestError(
                f"{name}: {num_bad} of {num_rows} rows can't be used, at most {min(allowed, num_rows - 1)} may be: "
                f"{shown}. {'' if is_end else 'The build ended there. '}Mend them, or raise --max_bad_fraction (now "
                f"{self.max_fraction})"
            )


_OF_FILES = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}

_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "malloc failed")
"""What torch and libsndfile say, whose errors are RuntimeErrors."""


def is_of_machine(error: BaseException) -> bool:
    """Whether an error is the machine's and not a row's: too many open files, no memory, a mount that is gone, ….

    What decoders and this package raise has no number; a file that was there when its row was checked is not the row's
    fault if it is gone.
    """
    if isinstance(error, OSError):
        return error.errno is not None and error.errno not in _OF_FILES
    return is_exhausted(error)


def is_exhausted(error: BaseException) -> bool:
    """Whether the machine has no more of something: open files, memory, room on a disk. Whatever was read is whole."""
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
    )
