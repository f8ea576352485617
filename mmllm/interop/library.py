"""transformers as an optional library, kept quiet: what matters in what it says is raised."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any


def transformers_library() -> Any:
    """The module.

    Raises:
        ModuleNotFoundError: it isn't installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("transformers is not installed; pip install 'mmllm[transformers]'") from error
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[list[str]]:
    """Without its bars; what it would log is given."""
    from transformers.utils import logging as bars

    logger = logging.getLogger(transformers.__name__)
    had_bars, handlers, propagate = bars.is_progress_bar_enabled(), logger.handlers, logger.propagate
    collector = _Collector()
    bars.disable_progress_bar()
    logger.handlers, logger.propagate = [collector], False
    try:
        yield collector.messages
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if had_bars:
            bars.enable_progress_bar()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
