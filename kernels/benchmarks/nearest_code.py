"""The nearest code against encodec's and other searches: time, and memory beyond the inputs.

    python kernels/benchmarks/nearest_code.py --json nearest.json

T vectors, D width, V codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure

import mmllm_kernels

SHAPES = {"cpu": [(16384, 128, 1024)], "cuda": [(16384, 128, 1024), (1 << 20, 128, 1024), (65536, 512, 8192)]}


def peers(x: Tensor, codebook: Tensor) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Searches that can run here, and why the others cannot."""
    found: dict[str, Callable[[], Tensor]] = {"torch.cdist": lambda: torch.cdist(x, codebook).argmin(dim=-1)}
    missing = {}
    try:
        from encodec.quantization.core_vq import EuclideanCodebook

        layer: Any = EuclideanCodebook(dim=codebook.shape[1], codebook_size=len(codebook)).to(x.device)
        layer.embed.data.copy_(codebook)
        found["encodec"] = lambda: layer.quantize(x)
    except ImportError as error:
        missing["encodec"] = str(error)
    try:
        from vector_quantize_pytorch import VectorQuantize  # pyright: ignore[reportMissingImports]

        quantiser: Any = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).to(x.device).eval()
        quantiser._codebook.embed.data.copy_(codebook[None])
        found["vector-quantize-pytorch"] = lambda: quantiser(x[None])[1][0]
    except ImportError as error:
        missing["vector-quantize-pytorch"] = str(error)
    if x.is_cuda:
        try:
            from flash_kmeans import euclid_assign  # pyright: ignore[reportMissingImports]

            squares = (x**2).sum(dim=-1)[None]
            found["flash-kmeans"] = lambda: euclid_assign(x[None], codebook[None], squares)[0]
        except ImportError as error:
            missing["flash-kmeans"] = str(error)
    else:
        missing["flash-kmeans"] = "needs a GPU"
    return found, missing


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """The largest sum of live allocations while `function` runs."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    profiler: Any = profile.profiler
    live = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds, after two to warm up")
    parser.add_argument("--tiny", action="store_true", help="a shape that only shows that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--json", type=Path, help="file for the rows; those already in it are kept")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(arguments.threads)
    measure.describe(device, ("encodec", "vector-quantize-pytorch", "flash-kmeans"))
    report, missing = measure.Report(arguments.json), {}
    for T, D, V in [(50, 8, 16)] if arguments.tiny else SHAPES[device]:
        generator = torch.Generator(device).manual_seed(0)
        x, codebook = (torch.randn(rows, D, generator=generator, device=device) for rows in (T, V))
        found, absent = peers(x, codebook)
        missing.update(absent)
        functions = {"ours": lambda x=x, codebook=codebook: mmllm_kernels.nearest_code(x, codebook), **found}
        case = f"{device} float32 (T {T} D {D} V {V})"
        with torch.no_grad():
            report.add_times("forward", case, measure.interleaved_ms(functions, arguments.rounds, device), "ms", float)
            memory = {name: peak_bytes(function, device) / 2**20 for name, function in functions.items()}
        report.add("forward", f"{case} extra memory", "MiB", memory.pop("ours"), memory)
        agreement = (functions["ours"]() == found["torch.cdist"]()).float().mean()
        print(f"same codes as torch.cdist: {agreement:.6f}")
        report.write()
    report.finish()
    for name, reason in missing.items():
        print(f"not run: {name}: {reason}")


if __name__ == "__main__":
    main()
