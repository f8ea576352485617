"""PEFT and bitsandbytes as optional libraries, kept from running code from elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


def peft_library() -> Any:
    """The module.

    Raises:
        ModuleNotFoundError: it isn't installed.
    """
    with contextlib.suppress(ImportError):  # PEFT imports it by itself, where it is installed
        bitsandbytes_library()
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("adapters need PEFT, which is not installed; pip install 'mmllm[adapt]'") from error
    return peft


def bitsandbytes_library() -> Any:
    """The module.

    Raises:
        ModuleNotFoundError: it isn't installed.
    """
    with _without_hub_kernels():
        try:
            import bitsandbytes
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "adapter.quantization needs bitsandbytes, which is not installed; pip install 'mmllm[qlora]'"
            ) from error
    return bitsandbytes


@contextlib.contextmanager
def _without_hub_kernels() -> Iterator[None]:
    """Without the library `kernels`, with which bitsandbytes, as it is imported, loads compiled code from a hub.

    On processors with bfloat16 it does so unasked (`bitsandbytes.backends.cpu.ops`), and otherwise warns.
    """
    absent = object()
    had = sys.modules.get("kernels", absent)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    was_disabled, logger.disabled = logger.disabled, True
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]  # so that importing it fails
    try:
        yield
    finally:
        logger.disabled = was_disabled
        if had is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = had  # pyright: ignore[reportArgumentType]
