"""What runs are measured on, for reports and scores."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from mmllm.quickstart.machine import num_cores


def machine() -> dict[str, Any]:
    """This one: processor, cores, GPU, torch."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": _processor(), "cores": num_cores(), "gpu": gpu, "torch": torch.__version__}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
