"""What training reaches: `python benchmarks/train.py [--json F] [--against REV] [--quick] [--only MEASURE]`.

`training tokens/s`: a decoder alone on ragged documents (lengths log-normal, see train_documents.py): forward, loss,
backward, clipping, fused AdamW; float32 on a CPU, bfloat16 autocast on a GPU. Ours runs in Lightning's loop with all
that it logs; transformers' Mixtral in a bare loop, from the same weights, on the same documents. Tokens are real ones.
`demo step`: the quickstart's decoder at its own sizes on its own data (8 sequences, 64 px, clips, units, text) with
Muon, EMA and clipping, in Lightning's loop, without what writes to disk.
`head and loss memory`: peak bytes of head, loss and backward at 4,096 targets x 40,968 ids, width 1,024.
`graph breaks`: of `torch.compile` in a block; `host syncs`: calls for which a step would wait for a GPU.
`attention work`: score elements computed of one head, whole squares, against the sum of squared lengths.
`decode`: one token after a prompt of 32, the whole decoder with its cache ("kernel": one layer's experts alone), with
weights in float32 and bfloat16.
`MFU`: on a GPU, of configs/one_gpu/decoder_1b.yaml's decoder on text, on active FLOPs.

Ours is this checkout; with --against, another revision of it is a peer in everything but MFU. Each is a process of its
own that does a round when it is told to, so that rounds take turns. A peer that computes something else is not timed.
--quick takes small sizes, to see that all of it works: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from train_documents import DECODING, TINY, TINY_DECODING, TRAINING, Shape, ragged
from train_names import EARLIER_NAMES
from train_side import NEW_TOKENS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels" / "benchmarks"))

import measure  # noqa: E402

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest relative difference of losses, or of logits by their norm, with which something is timed."""
HEAD = Shape("head and loss", 1024, 1, 1, 1, 2, 1, 1, 1, vocab_size=40968, num_sequences=4)
TINY_HEAD = dataclasses.replace(HEAD, hidden_size=64, vocab_size=4000)
NUM_TARGETS, TINY_TARGETS = 4096, 512
H200_FLOPS = 989e12
"""bfloat16, dense, a second: of NVIDIA's data sheet."""


class Side:
    """A process of one checkout that does rounds; see train_side.py."""

    def __init__(self, root: Path, task: str, settings: dict[str, Any], log: Path) -> None:
        self.log = log
        paths = [root, root / "tokenizers", root / "kernels"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "train_side.py"), task]
        self.process = subprocess.Popen(
            [*command, json.dumps({**settings, "root": str(root)})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True, env=environment,
            cwd=log.parent,
        )  # fmt: skip

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            RuntimeError: the process has ended; with the end of what it printed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            lines = self.log.read_text().strip().splitlines()
            raise RuntimeError(f"{lines[-1] if lines else 'it ended'} (exit code {self.process.returncode})")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


@dataclasses.dataclass
class Bench:
    """What a run was asked for, and where its rows go."""

    roots: dict[str, Path]
    """Of "ours" and, with --against, of the other revision under its short hash."""
    work: Path
    report: measure.Report
    device: str
    quick: bool
    rounds: int | None
    threads: int
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    """What was not measured, and why."""
    closing: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    _number: int = 0
    _demo: Path | None = None
    _small: dict[str, Side] | None = None

    @property
    def dtype(self) -> str:
        """In which matrices are multiplied."""
        return "bfloat16" if self.device == "cuda" else "float32"

    @contextlib.contextmanager
    def sides(self, task: str, only_ours: bool = False, **settings: Any) -> Iterator[dict[str, Side]]:
        """A process of each checkout, all started at once."""
        settings |= {"device": self.device, "threads": self.threads}
        sides = {}
        try:
            for name, root in list(self.roots.items())[: 1 if only_ours else None]:
                self._number += 1
                sides[name] = Side(root, task, settings, self.work / f"{self._number}.log")
            yield sides
        finally:
            for side in sides.values():
                side.close()

    def ask_all(self, sides: dict[str, Side], do: str, **more: Any) -> dict[str, dict[str, Any]]:
        """Each side's answer; an earlier revision that cannot answer is left out, and taken from `sides`."""
        answers = {}
        for name in list(sides):
            try:
                answers[name] = sides[name].ask(do, **more)
            except RuntimeError as error:
                if name == "ours":
                    raise
                self.missing[f"{name} ({do})"] = str(error)
                sides.pop(name).close()
        return answers

    def times(self, functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        """Milliseconds, in turns. The clock is the host's on a GPU too: every function waits for its device."""
        rounds = 2 if self.quick else self.rounds or rounds
        with without_garbage_collection():
            return measure.interleaved_ms(functions, rounds, "cpu")

    def refuse(self, what: str, values: dict[str, float], dtype: str) -> dict[str, float]:
        """Those that differ from ours by more than the tolerance, which is said."""
        tolerance = TOLERANCE[dtype]
        wrong = {name: value for name, value in values.items() if not value <= tolerance}
        for name, value in wrong.items():
            self.missing[f"{name} ({what})"] = f"NOT TIMED: differs from ours by {value:.1e}, more than {tolerance:g}"
        return wrong

    def small_settings(self) -> dict[str, Any]:
        """A layer without and a layer with experts, and normalized queries and keys; for counts."""
        shape = dataclasses.replace(TINY if self.quick else TRAINING[self.device][0], num_hidden_layers=2)
        decoder = {"moe_layers": [1], "intermediate_size": 2 * shape.moe_intermediate_size, "qk_norm": True}
        return {"kind": "text", "shape": shape.to_dict(), "decoder": decoder}

    def small(self) -> dict[str, Side]:
        """Processes of it that have done a step; made once."""
        if self._small is None:
            self._small = self.closing.enter_context(self.sides("fit", **self.small_settings()))
            self.ask_all(self._small, "step")
        return self._small

    def demo(self) -> Path:
        """The folder of a quickstart of one step, made once, by the older side: what it writes both can read."""
        if self._demo is None:
            self._demo = self.work / "demo"
            root = list(self.roots.values())[-1]
            paths = os.pathsep.join(map(str, (root, root / "tokenizers", root / "kernels")))
            command = [sys.executable, "-W", "ignore", "-m", "mmllm.cli", "quickstart", "--max_steps", "1"]
            done = subprocess.run(
                [*command, "--out", str(self._demo)], env={**os.environ, "PYTHONPATH": paths}, cwd=self.work,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"mmllm quickstart: {done.stderr.strip().splitlines()[-1]}")
        return self._demo


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collects before, so that its turn does not fall on one of the peers in this process."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- measures -----------------------------------------------------------------------------------------------------


def training(bench: Bench) -> None:
    """Whole-model training against transformers' Mixtral, padded and packed."""
    import train_peers

    device = bench.device
    for shape in (TINY,) if bench.quick else TRAINING[device]:
        case, documents = shape.case(device, bench.dtype), ragged(shape)
        folder = bench.work / f"mixtral {shape.name}"
        train_peers.save_weights(shape, folder)
        with bench.sides("fit", kind="text", shape=shape.to_dict(), weights=str(folder)) as sides:
            peers = {}
            for kind, inputs in (
                ("padded", train_peers.padded_inputs(documents, device)),
                ("packed", train_peers.packed_inputs(documents, device)),
            ):
                name = f"transformers Mixtral {kind}"
                peers[name], experts = train_peers.fastest_training(folder, documents, inputs, device)
                print(f"{name}, {shape.name}: experts_implementation={experts} is the faster")
            losses = {name: values["loss"] for name, values in bench.ask_all(sides, "step").items()}
            losses |= {name: peer.step() for name, peer in peers.items()}
            print(f"{case}: {documents.num_tokens} tokens, lengths {documents.lengths}; loss of step 1: {losses}")
            ours = losses.pop("ours")
            wrong = bench.refuse(case, {name: abs(loss / ours - 1) for name, loss in losses.items()}, bench.dtype)
            functions: dict[str, Callable[[], Any]] = {
                name: (lambda side=side: side.ask("step")) for name, side in sides.items() if name not in wrong
            }
            functions |= {name: peer.step for name, peer in peers.items() if name not in wrong}
            elapsed = bench.times(functions, 12)
        tokens = documents.num_tokens
        bench.report.add_times("training tokens/s", case, elapsed, "tokens/s", lambda ms, n=tokens: n / (ms / 1e3))


def demo_step(bench: Bench) -> None:
    """A step of the quickstart's decoder."""
    with bench.sides("fit", kind="demo", folder=str(bench.demo())) as sides:
        answers = bench.ask_all(sides, "step")
        tokens = {name: values["num_tokens"] for name, values in answers.items()}
        if len(set(tokens.values())) > 1:
            bench.missing["demo step"] = f"NOT TIMED: the sides' batches differ: {tokens} tokens"
            return
        elapsed = bench.times({name: (lambda side=side: side.ask("step")) for name, side in sides.items()}, 16)
    case = f"{bench.device} {bench.dtype} configs/quickstart/decoder.yaml"
    bench.report.add_times("demo step", case, elapsed, "ms", lambda ms: ms)


def head_memory(bench: Bench) -> None:
    """Peak bytes of head and loss; of the first step, which finds no gradients that it would free on the way."""
    import train_peers

    shape, num_targets = (TINY_HEAD, TINY_TARGETS) if bench.quick else (HEAD, NUM_TARGETS)
    decoder = {"moe": None, "intermediate_size": 1}
    settings = {"kind": "text", "shape": shape.to_dict(), "decoder": decoder, "num_targets": num_targets}
    with bench.sides("fit", **settings, without_layers=True) as sides:
        found = {name: values["bytes"] / 2**20 for name, values in bench.ask_all(sides, "memory").items()}
    peers = {name: value for name, value in found.items() if name != "ours"}
    peers["all logits at once"] = train_peers.all_logits_memory(shape, num_targets, bench.device) / 2**20
    case = f"{bench.device} {bench.dtype} {num_targets} targets x {shape.vocab_size} ids, d {shape.hidden_size}"
    bench.report.add("head and loss memory", case, "MiB", found["ours"], peers)


def graph_breaks(bench: Bench) -> None:
    """Of a block in training, forward; backward is traced with it."""
    answers = bench.ask_all(bench.small(), "graph breaks")
    for number, case in enumerate(("dense block", "block with experts")):
        counts = {name: float(values["breaks"][number]["count"]) for name, values in answers.items()}
        bench.report.add("graph breaks", f"{bench.device} {case}", "breaks", counts.pop("ours"), counts)
        for reason in dict.fromkeys(answers["ours"]["breaks"][number]["reasons"]):
            print(f"graph break, {case}: {reason}")


def host_syncs(bench: Bench) -> None:
    """Of a step but the first, from the learning rate to the optimizer: text alone, and the demo's mixed batch."""
    found = {"text": bench.ask_all(bench.small(), "host syncs")}
    if not bench.quick:
        with bench.sides("fit", kind="demo", folder=str(bench.demo())) as sides:
            bench.ask_all(sides, "step")
            found["demo"] = bench.ask_all(sides, "host syncs")
    for name, answers in found.items():
        print(f"\nhost syncs, {name}:\n{answers['ours']['where']}")
        print(f"not counted: {answers['ours']['apart'] or 'nothing'}, whose path for CPUs asks, and only that")
        counts = {side: float(values["count"]) for side, values in answers.items()}
        bench.report.add("host syncs", f"{bench.device} {name}", "syncs", counts.pop("ours"), counts)


def attention_work(bench: Bench) -> None:
    """Of what a step on this device chooses, and of each backend that can be asked for by name."""
    answers = bench.ask_all(bench.small(), "attention work")
    ours = answers.pop("ours")
    others = {name: float(values["computed"]) for name, values in answers.items()}
    _report_work(bench, "auto", ours, others)
    settings = bench.small_settings()
    for name in ours["backends"]:
        decoder = {**settings["decoder"], "attention_backend": name}
        # Its kernel takes nothing else, and Lightning refuses to clip with a fused optimizer then.
        trainer = {"precision": "bf16-mixed", "gradient_clip_val": 0.0} if name == "varlen" else {}
        with bench.sides("fit", only_ours=True, **{**settings, "decoder": decoder, "trainer": trainer}) as sides:
            try:
                _report_work(bench, name, sides["ours"].ask("attention work"), {})
            except RuntimeError as error:
                bench.missing[f"attention work, {name}"] = str(error)


def _report_work(bench: Bench, backend: str, seen: dict[str, Any], others: dict[str, float]) -> None:
    if seen["computed"]:
        peers = {"sum of squares": float(seen["ideal"]), **others}
        bench.report.add("attention work", f"{bench.device} {backend}", "elements", float(seen["computed"]), peers)
    else:
        bench.missing[f"attention work, {backend}"] = "no call of attention was seen"


def decode(bench: Bench) -> None:
    """One token, with weights of two dtypes."""
    import train_peers

    shape = TINY_DECODING if bench.quick else DECODING
    folder = bench.work / f"mixtral {shape.name}"
    train_peers.save_weights(shape, folder)
    makers = {"decoder": train_peers.decoding, "kernel": train_peers.kernel_decoding}
    with bench.sides("decode", shape=shape.to_dict(), weights=str(folder)) as sides:
        for what, maker in makers.items():
            functions: dict[str, Callable[[], Any]] = {}
            for dtype in ("float32", "bfloat16"):
                peers = {
                    f"transformers {experts}": maker(folder, shape, bench.device, getattr(torch, dtype), experts)
                    for experts in train_peers.EXPERTS
                }
                found = _agreeing(bench, sides, what, dtype, peers)
                functions |= {f"{name}|{dtype}": function for name, function in found.items()}
            _report_decoding(bench, what, shape, bench.times(functions, 30))


def _agreeing(
    bench: Bench, sides: dict[str, Side], what: str, dtype: str, peers: dict[str, Callable[[], torch.Tensor]]
) -> dict[str, Callable[[], Any]]:
    """A round of each side and peer whose last output is ours."""
    outs = {name: torch.tensor(values["out"]) for name, values in bench.ask_all(sides, what, dtype=dtype).items()}
    outs |= {name: run().float().flatten()[:64].cpu() for name, run in peers.items()}
    errors = {name: measure.relative_error(out, outs["ours"]) for name, out in outs.items()}
    wrong = bench.refuse(f"decode, {what} {dtype}", errors, dtype)
    rounds: dict[str, Callable[[], Any]] = {
        name: (lambda side=side: side.ask(what, dtype=dtype)) for name, side in sides.items()
    }
    return {name: run for name, run in {**rounds, **peers}.items() if name not in wrong}


def _report_decoding(bench: Bench, what: str, shape: Shape, elapsed: dict[str, list[float]]) -> None:
    """A row for each dtype; with bfloat16 those of float32 are peers, too."""
    per_token = {name: [ms / NEW_TOKENS for ms in each] for name, each in elapsed.items()}
    for dtype in ("float32", "bfloat16"):
        times = {}
        for name, each in per_token.items():
            who, _, of = name.partition("|")
            if of == dtype:
                times[who] = each
            elif dtype != "float32":
                times[f"{who}, float32"] = each
        label = dataclasses.replace(shape, name=what).case(bench.device, dtype)
        bench.report.add_times("decode", label, times, "ms", lambda ms: ms)


def mfu(bench: Bench) -> None:
    """Model FLOPs of text a second, by the GPU's bfloat16 peak."""
    if bench.device != "cuda":
        bench.missing["MFU"] = "needs a GPU"
        return
    shape = one_gpu_shape()
    documents = ragged(shape)
    settings = {"kind": "text", "shape": shape.to_dict(), "decoder": {"tie_word_embeddings": True}}
    with bench.sides("fit", only_ours=True, **settings) as sides:
        elapsed = bench.times({"ours": lambda: sides["ours"].ask("step")}, 12)
    flops = model_flops(shape, documents.lengths)
    seconds = statistics.median(elapsed["ours"]) / 1e3
    case = f"cuda bfloat16 {shape.name}, {documents.num_tokens} tokens"
    bench.report.add("MFU", case, "% of 989 TF/s", 100 * flops / seconds / H200_FLOPS, {})
    bench.report.add("training tokens/s", case, "tokens/s", documents.num_tokens / seconds, {})


def one_gpu_shape() -> Shape:
    """The decoder of configs/one_gpu/decoder_1b.yaml, by its keys of today or earlier ones."""
    path = ROOT / "configs" / "one_gpu" / "decoder_1b.yaml"
    decoder = yaml.safe_load(path.read_text())["model"]["init_args"]["decoder"]

    def value(of: dict[str, Any], key: str, default: Any = None) -> Any:
        return of.get(key, of.get(EARLIER_NAMES[key], default))

    width, heads, moe = value(decoder, "hidden_size"), value(decoder, "num_attention_heads"), decoder["moe"]
    return Shape(
        "1B-A0.3B", width, value(decoder, "num_hidden_layers"), heads, value(decoder, "num_key_value_heads", heads),
        value(decoder, "head_dim", width // heads), value(moe, "moe_intermediate_size"), moe["num_experts"],
        value(moe, "num_experts_per_tok"), decoder["vocab_size"], num_sequences=8, sequence_length=4096,
        median_length=400,
    )  # fmt: skip


def model_flops(shape: Shape, lengths: tuple[tuple[int, ...], ...]) -> float:
    """Forward and backward of documents: 6 a token and active weight (head included, embeddings not), and attention.

    Causal attention: of its two products half the square of a document's length.
    """
    heads = shape.num_attention_heads * shape.head_dim
    attention = 2 * shape.hidden_size * (heads + shape.num_key_value_heads * shape.head_dim)
    experts = 3 * shape.num_experts_per_tok * shape.hidden_size * shape.moe_intermediate_size
    router = shape.num_experts * shape.hidden_size
    active = shape.num_hidden_layers * (attention + experts + router) + shape.vocab_size * shape.hidden_size
    num_tokens = sum(map(sum, lengths))
    squares = sum(length**2 for row in lengths for length in row)
    return 6.0 * active * num_tokens + 6.0 * shape.num_hidden_layers * heads * squares


MEASURES: dict[str, Callable[[Bench], None]] = {
    "training tokens/s": training,
    "demo step": demo_step,
    "head and loss memory": head_memory,
    "graph breaks": graph_breaks,
    "host syncs": host_syncs,
    "attention work": attention_work,
    "decode": decode,
    "MFU": mfu,
}


# --- the command --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkouts(against: str | None, work: Path) -> Iterator[dict[str, Path]]:
    """This checkout and, in a temporary worktree, the other revision."""
    if against is None:
        yield {"ours": ROOT}
        return
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", "--verify", f"{against}^{{commit}}"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise SystemExit(f"--against {against}: git knows no such commit here; give a hash, a branch or a tag")
    short, path = found.stdout.strip(), work / "against"
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(path), short], check=True)
    try:
        yield {"ours": ROOT, short: path}
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(path)], check=True)


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows; those already in it are kept")
    parser.add_argument("--against", metavar="REV", help="a commit of this repository that is a peer, too")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="may be repeated")
    parser.add_argument("--rounds", type=int, help="interleaved, after two to warm up; by default of each its own")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure.describe(args.device, ("transformers", "lightning"))
    report = measure.Report(args.json)
    with tempfile.TemporaryDirectory() as work, checkouts(args.against, Path(work)) as roots:
        bench = Bench(roots, Path(work), report, args.device, args.quick, args.rounds, args.threads)
        with bench.closing:
            _measure(bench, args.only or list(MEASURES))
    report.finish()
    for name, reason in bench.missing.items():
        print(f"not run: {name}: {reason}")


def _measure(bench: Bench, names: list[str]) -> None:
    """Each measure; what goes wrong in one does not stop the next."""
    for name in names:
        print(f"{name} …", file=sys.stderr)
        try:
            MEASURES[name](bench)
        except (RuntimeError, ImportError, ValueError) as error:
            bench.missing[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        bench.report.write()


if __name__ == "__main__":
    main()
