"""The mixture of experts against its peers: time, saved bytes, decoding; and the experts alone, gates given.

    python kernels/benchmarks/moe.py --json moe.json

On a CPU: float32 at the two shapes of the README, decoding of one token with float32 and bfloat16 weights.
On a GPU: bfloat16 at five models' shapes, decoding of 1, 8 and 64 tokens from a CUDA graph. A peer that is
not installed is listed as not run. A shape is timed only if ours computes what the peers do there.

T tokens, D width, E experts, K experts a token, N inner width.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import peers

import mmllm_kernels
from mmllm_kernels.gpu import tuning

ALL_PEERS = ("transformers eager", "transformers grouped_mm", "liger", "scattermoe", "sonicmoe")


TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Largest relative error (of norms) of an output or a gradient with which a shape is timed."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, and how many tokens it gets."""

    name: str
    D: int
    N: int
    E: int
    K: int
    T: int

    def case(self, device: str, dtype: torch.dtype, T: int | None = None) -> str:
        """Device, dtype and shape, as the JSON names them."""
        sizes = f"T {self.T if T is None else T} d {self.D} n {self.N} E {self.E} K {self.K}"
        return f"{device} {str(dtype).removeprefix('torch.')} {self.name} ({sizes})"

    def tflop(self, times: int) -> float:
        """`times` is 6 for forward and 18 with backward."""
        return times * self.T * self.K * self.N * self.D / 1e12


TRAINING = {
    "cpu": [Shape("coarse", 256, 512, 8, 2, 1024), Shape("fine-grained", 256, 128, 32, 4, 1024)],
    "cuda": [
        Shape("olmoe", 2048, 1024, 64, 8, 32768),
        Shape("qwen3", 2048, 768, 128, 8, 32768),
        Shape("deepseek", 2048, 1408, 64, 6, 32768),
        Shape("mixtral", 4096, 14336, 8, 2, 16384),
        Shape("small", 768, 384, 32, 4, 16384),
    ],
}
DECODING = {"cpu": [Shape("decoder", 512, 1024, 8, 2, 1)], "cuda": TRAINING["cuda"][:4]}
TINY = [Shape("coarse", 32, 24, 4, 2, 40), Shape("fine-grained", 32, 16, 8, 4, 40)]


def make_weights(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gate-and-up and down weights of about unit gain."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype) * size[-1] ** -0.5

    return draw(shape.E, 2 * shape.N, shape.D), draw(shape.E, shape.D, shape.N)


def make_tokens(shape: Shape, T: int, device: str, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and router logits."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(T, shape.D, generator=generator, device=device, dtype=dtype)
    return x, torch.randn(T, shape.E, generator=generator, device=device, dtype=torch.float32)


def candidates(
    shape: Shape, weights: tuple[Tensor, Tensor], names: tuple[str, ...]
) -> tuple[dict[str, tuple[peers.Forward, list[Tensor]]], dict[str, str]]:
    """Ours and the peers that can run, as name -> (forward, parameters), and why the others cannot."""
    w_gate_up, w_down = weights
    parameters = [w_gate_up.detach().requires_grad_(), w_down.detach().requires_grad_()]

    def ours(x: Tensor, logits: Tensor) -> Tensor:
        return mmllm_kernels.moe(x, logits, parameters[0], parameters[1], shape.K).out_TD

    found, missing = peers.find(w_gate_up, w_down, shape.K, names)
    return {"ours": (ours, parameters), **found}, missing


def agrees(
    shape: Shape,
    found: dict[str, tuple[peers.Forward, list[Tensor]]],
    x: Tensor,
    logits: Tensor,
    grad: Tensor,
) -> bool:
    """Whether our output and every gradient are transformers grouped_mm's, or where it cannot run, our own in fp32.

    In fp32 by the reference on a CPU; on a GPU by plain PyTorch on sorted tokens (the reference needs too much
    memory there).
    """

    def gradients(function: peers.Forward, inputs: list[Tensor]) -> list[Tensor]:
        out = function(inputs[0], inputs[1])
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    ours = gradients(found["ours"][0], [x, logits, *found["ours"][1]])
    peer, wanted = "transformers grouped_mm", None
    if peer in found:
        function, parameters = found[peer]
        try:
            wanted = gradients(function, [x, logits, *parameters])
        except Exception as error:
            print(f"not compared: {peer}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    if wanted is None:
        backend = "cpu" if x.is_cuda else "reference"
        peer = f"{backend} in float32"
        exact = [each.detach().float().requires_grad_() for each in (x, logits, *found["ours"][1])]
        wanted = gradients(
            lambda x, logits: mmllm_kernels.moe(x, logits, exact[2], exact[3], shape.K, backend=backend).out_TD, exact
        )
    names = ("out", "dx", "dlogits", "dw_gate_up", "dw_down")
    errors = {name: measure.relative_error(*pair) for name, *pair in zip(names, ours, wanted, strict=True)}
    told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"\n{shape.case(x.device.type, x.dtype)}: relative error against {peer}: {told}")
    wrong = [name for name, error in errors.items() if not error <= TOLERANCE[x.dtype]]
    if wrong:
        print(f"NOT TIMED: {shape.name}: {', '.join(wrong)} differ by more than {TOLERANCE[x.dtype]:g} from {peer}")
    return not wrong


def training(report: measure.Report, shape: Shape, device: str, rounds: int, names: tuple[str, ...]) -> dict[str, str]:
    """Forward, forward and backward (also of given gates), and saved bytes at one shape; returns what could not run."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = shape.case(device, dtype)
    found, missing = candidates(shape, make_weights(shape, device, dtype), names)
    x, logits = make_tokens(shape, shape.T, device, dtype)
    x.requires_grad_()
    logits.requires_grad_()
    grad = torch.randn_like(x)
    if not agrees(shape, found, x, logits, grad):
        return missing

    def forward(name: str):
        function, _ = found[name]
        with torch.no_grad():
            return function(x, logits)

    def both(name: str):
        function, parameters = found[name]
        # Sonic's router has its own weight, so the logits' gradient may be trivial but is never missing.
        return torch.autograd.grad(function(x, logits), [x, logits, *parameters], grad, allow_unused=True)

    for measured, run, times in (("forward", forward, 6), ("forward+backward", both, 18)):
        functions = {name: (lambda name=name, run=run: run(name)) for name in found}
        elapsed = measure.interleaved_ms(functions, rounds, device)
        if device == "cuda":
            report.add_times(measured, case, elapsed, "TF/s", lambda ms, t=times: shape.tflop(t) / (ms / 1e3))
        else:
            report.add_times(measured, case, elapsed, "ms", lambda ms: ms)
    _given_gates(report, shape, case, found["ours"][1], x, grad, rounds)
    saved = {}
    for name, (function, parameters) in found.items():
        try:
            saved[name] = measure.saved_bytes(lambda f=function: f(x, logits), [*parameters]) / 2**20
        except Exception as error:
            missing[f"{name} (saved)"] = f"{type(error).__name__}: {error}"
    if "ours" in saved:
        report.add("saved", case, "MiB", saved.pop("ours"), saved)
    return missing


def _given_gates(
    report: measure.Report,
    shape: Shape,
    case: str,
    parameters: list[Tensor],
    x: Tensor,
    grad: Tensor,
    rounds: int,
) -> None:
    """Forward and backward of our experts alone, against ours with the router's choice: what the choice costs."""
    logits = make_tokens(shape, shape.T, x.device.type, x.dtype)[1].requires_grad_()
    gates, experts = mmllm_kernels.route(logits.detach(), shape.K)
    gates.requires_grad_()

    def given() -> tuple[Tensor, ...]:
        out = mmllm_kernels.experts(x, gates, experts, parameters[0], parameters[1]).out_TD
        return torch.autograd.grad(out, [x, gates, *parameters], grad)

    def composed() -> tuple[Tensor, ...]:
        out = mmllm_kernels.moe(x, logits, parameters[0], parameters[1], shape.K).out_TD
        return torch.autograd.grad(out, [x, logits, *parameters], grad)

    elapsed = measure.interleaved_ms({"ours": given, "ours, with route": composed}, rounds, x.device.type)
    if x.is_cuda:
        report.add_times("given gates", case, elapsed, "TF/s", lambda ms: shape.tflop(18) / (ms / 1e3))
    else:
        report.add_times("given gates", case, elapsed, "ms", lambda ms: ms)


def decoding_on_cpu(report: measure.Report, shape: Shape, rounds: int, names: tuple[str, ...]) -> dict[str, str]:
    """One token, weights in float32 and in bfloat16: against transformers', bfloat16 also against both in float32."""
    functions, missing = {}, {}
    batches = 64
    for dtype in (torch.float32, torch.bfloat16):
        found, absent = candidates(shape, make_weights(shape, "cpu", dtype), names)
        missing.update(absent)
        tokens = [make_tokens(shape, 1, "cpu", dtype, seed) for seed in range(batches)]  # so that experts vary
        for name, (function, _) in found.items():
            functions[name, dtype] = lambda f=function, tokens=tokens: [f(*token) for token in tokens]
    with torch.no_grad():
        elapsed = measure.interleaved_ms({f"{n}|{d}": f for (n, d), f in functions.items()}, rounds, "cpu")
    elapsed = {name: [ms / batches for ms in each] for name, each in elapsed.items()}
    for dtype in (torch.float32, torch.bfloat16):
        times = {"ours": elapsed[f"ours|{dtype}"]}
        if dtype != torch.float32:
            times["ours, float32"] = elapsed[f"ours|{torch.float32}"]
        for name, other in functions:
            if name != "ours" and f"{name}|{other}" in elapsed and other in (dtype, torch.float32):
                times[name if other == dtype else f"{name}, float32"] = elapsed[f"{name}|{other}"]
        report.add_times("decode", shape.case("cpu", dtype), times, "ms", lambda ms: ms)
    return missing


def decoding_on_gpu(report: measure.Report, shape: Shape, rounds: int, bandwidth: float) -> None:
    """Share of the memory's bandwidth that reading the chosen experts' weights takes, from CUDA graphs."""
    weights = make_weights(shape, "cuda", torch.bfloat16)
    for T in (1, 8, 64):
        graphs = []
        for seed in range(8):  # other experts each time, so that weights come from memory
            x, logits = make_tokens(shape, T, "cuda", torch.bfloat16, seed)
            with torch.no_grad():
                mmllm_kernels.moe(x, logits, *weights, shape.K)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    mmllm_kernels.moe(x, logits, *weights, shape.K)
            graphs.append((graph, x, logits))
        elapsed = measure.interleaved_ms(
            {"ours": lambda g=graphs: [each[0].replay() for each in g]}, rounds * 4, "cuda"
        )
        times = {name: [ms / len(graphs) for ms in each] for name, each in elapsed.items()}
        num_bytes = 6 * shape.D * shape.N * shape.E * (1 - (1 - shape.K / shape.E) ** T)
        case = shape.case("cuda", torch.bfloat16, T)
        report.add_times("decode", case, times, "% bandwidth", lambda ms, b=num_bytes: 100 * b / (ms / 1e3) / bandwidth)


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=60, help="interleaved rounds, after two to warm up")
    parser.add_argument("--shapes", default="", help="names separated by commas; all if empty")
    # An error of a peer may leave a GPU unusable for the process: on_gpu.sh gives each peer one.
    parser.add_argument("--peers", default=",".join(ALL_PEERS), help="names separated by commas; none if empty")
    parser.add_argument("--tiny", action="store_true", help="shapes that only show that everything runs")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second of the GPU's memory")
    parser.add_argument("--measures", default="training,decode", help="training, decode, or both with a comma")
    parser.add_argument("--json", type=Path, help="file for the rows; those already in it are kept")
    parser.add_argument("--table", type=Path, help="blocks.json whose shapes are used and to which new ones are added")
    arguments = parser.parse_args()
    device, names = arguments.device, tuple(filter(None, arguments.peers.split(",")))
    if device == "cpu":
        torch.set_num_threads(arguments.threads)
    measure.describe(device, ("transformers", "liger-kernel", "scattermoe", "sonic-moe"))
    shapes, decoding = (TINY, TINY[:1]) if arguments.tiny else (TRAINING[device], DECODING[device])
    wanted = arguments.shapes.split(",") if arguments.shapes else [shape.name for shape in shapes + decoding]
    measures = arguments.measures.split(",")
    for word, known in ((wanted, [shape.name for shape in shapes + decoding]), (measures, ["training", "decode"])):
        if not set(word) <= set(known):
            parser.error(f"{','.join(word)} is not among {', '.join(dict.fromkeys(known))}")
    if arguments.table is not None and device == "cuda":
        tuning.add_measured(json.loads(arguments.table.read_text())["measured"])
    report, missing = measure.Report(arguments.json), {}
    for each, shape in [("training", s) for s in shapes] + [("decode", s) for s in decoding]:
        if shape.name not in wanted or each not in measures:
            continue
        if each == "training":
            missing.update(training(report, shape, device, arguments.rounds, names))
        elif device == "cuda":
            decoding_on_gpu(report, shape, arguments.rounds, arguments.bandwidth)
        else:
            missing.update(decoding_on_cpu(report, shape, arguments.rounds, names))
        report.write()
        if arguments.table is not None:
            _add_to_table(arguments.table)
    report.finish()
    for name, reason in missing.items():
        print(f"not run: {name}: {reason}")


def _add_to_table(path: Path) -> None:
    table = json.loads(path.read_text())
    table["measured"] = {**table["measured"], **tuning.tuned()}
    # A line an entry, as in the file that is shipped.
    parts = [f'"about": {json.dumps(table["about"])}']
    for name in ("measured", "guesses"):
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(each)}" for key, each in table[name].items())
        parts.append(f'"{name}": {{\n{lines}\n  }}' if lines else f'"{name}": {{}}')
    path.write_text("{\n  " + ",\n  ".join(parts) + "\n}\n")


if __name__ == "__main__":
    assert math.isclose(Shape("check", 2, 3, 4, 1, 5).tflop(6), 180 / 1e12)
    main()
