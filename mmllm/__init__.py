"""One model that sees, hears, reads and speaks.

`mmllm.load(folder)` gives a model that captions, transcribes, speaks and chats.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.inference.api import Model as Model
    from mmllm.inference.api import load as load
    from mmllm.inference.completion import Completion as Completion
    from mmllm.inference.engine.requests import EngineConfig as EngineConfig
    from mmllm.inference.inputs import Audio as Audio
    from mmllm.inference.speaking import Waveform as Waveform
    from mmllm.inference.transcripts import Transcript as Transcript

__all__ = ["Audio", "Completion", "EngineConfig", "Model", "Transcript", "Waveform", "load"]
_HOMES = {
    "Audio": "mmllm.inference.inputs",
    "Completion": "mmllm.inference.completion",
    "EngineConfig": "mmllm.inference.engine.requests",
    "Model": "mmllm.inference.api",
    "Transcript": "mmllm.inference.transcripts",
    "Waveform": "mmllm.inference.speaking",
    "load": "mmllm.inference.api",
}
# Idle OpenMP threads spin briefly, then sleep. Unbounded, beside other busy processes, a small model that writes on two
# threads made 5 tokens a second in place of 320, and a training step took four times as long as without spinning
# (docs/RESULTS.md). OpenMP reads this when torch is first imported, and never again.
SPINS = "30000"
# oneDNN keeps what it compiled for 1,024 shapes, some 150 KB each, and prompts come in any number of tokens: a server
# grew by 150 MB for it. It reads this when it compiles first.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
if "torch" not in sys.modules:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
elif "GOMP_SPINCOUNT" not in os.environ:
    logging.getLogger(__name__).debug(
        "torch was imported before mmllm, so that GOMP_SPINCOUNT=%s came too late: beside other busy processes it may "
        "be slow; import mmllm first, or set it yourself",
        SPINS,
    )


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
