"""One model that sees, hears, reads and speaks.

`mmllm.load(folder)` gives a model that captions, transcribes, speaks and chats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.inference.api import Model as Model
    from mmllm.inference.api import Waveform as Waveform
    from mmllm.inference.api import load as load
    from mmllm.inference.inputs import Audio as Audio

__all__ = ["Audio", "Model", "Waveform", "load"]
_HOMES = {
    "Audio": "mmllm.inference.inputs",
    "Model": "mmllm.inference.api",
    "Waveform": "mmllm.inference.api",
    "load": "mmllm.inference.api",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: `import mmllm` alone loads no torch."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("mmllm")
    if name not in _HOMES:
        raise AttributeError(f"module 'mmllm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
