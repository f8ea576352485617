"""What inference reaches, with peers in the same run: `python benchmarks/inference.py --model DIR [--json F]`.

`greedy decode`: tokens/s at batch 1, 8 and 32 against transformers' `generate` on the exported model, the same ids.
Prompts of 32 tokens and 128 new ones; and captions, where the peer's prompts are embeddings that our tower made.
`decode 100M`: a random Llama of 100 million parameters, imported, at batch 1; int8 beside it.
`first token`: milliseconds from a prompt of 512 tokens, pictures among them, to the first id.
`continuous`: 64 requests of mixed lengths at once, against the same engine in static batches, whose rows stay until
the last of them ends; and in batches that rows leave when they end, but none enters.
`speculative`: ids guessed by look-up, and with --draft by that model, against none; the same ids.
`shared prefix`: the first token of a second request with 512 tokens in common, against the first request's.
`transcribe`: 10 minutes of speech, real-time factor. `speak`: that, and seconds to the first sound.
`streamed equals`: the share of 200 answers, text and sound, that are the same to the byte when they are streamed.

Rounds take turns with their peers; values are medians, with a 95% interval. transformers runs in the way that is the
fastest here (experts, cache), which is said. A peer that writes other ids is not timed. Prompts are held-out rows of
the model's own run where there are (RUN/model, or --data RUN), or made on the spot. --clock cpu reads the process's own
time: a first look on a machine that others use. --quick takes small sizes, to see that all of it works: its numbers
mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mmllm  # before torch: it bounds how long idle threads spin

# isort: split
import torch
from inference_material import Material, material
from inference_peers import Transformers, twin
from inference_rounds import CLOCKS, Clock, Report, alternate, machine, versions

from mmllm.inference.api import Model

MODEL_ERRORS = (RuntimeError, ImportError, ValueError)
"""What goes wrong in one measure and doesn't stop the next."""


@dataclass
class Bench:
    """What a run was asked for.

    Attributes:
        model: that is measured.
        material: what it reads, sees, hears and says.
        work: folder for checkpoints.
        report: where rows go.
        quick: small sizes.
        rounds: None: of each measure its own.
        clock: what is read.
        draft: folder of a smaller model with the same ids.
    """

    model: Model
    material: Material
    work: Path
    report: Report
    quick: bool = False
    rounds: int | None = None
    clock: Clock = "wall"
    draft: Path | None = None
    missing: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.missing = self.report.missing

    def num_rounds(self, usual: int) -> int:
        """Of a measure."""
        return 2 if self.quick else self.rounds or usual

    def alternate(self, functions: dict[str, Callable[[], object]], usual: int) -> dict[str, list[float]]:
        """Seconds of each, in turns."""
        return alternate(functions, self.num_rounds(usual), self.clock)

    @contextlib.contextmanager
    def seconds(self) -> Iterator[list[float]]:
        """Appends how long its block takes."""
        found: list[float] = []
        now = CLOCKS[self.clock]
        began = now()
        yield found
        found.append(now() - began)

    @functools.cached_property
    def twins(self) -> tuple[Model, Transformers]:
        """The model without what transformers can't compute, on both sides."""
        ours, exported = twin(self.model, self.work)
        return ours, Transformers(exported, ours)


def main(argv: Sequence[str] | None = None) -> None:
    """See --help."""
    import inference_sound
    import inference_text

    measures: dict[str, Callable[[Bench], None]] = {**inference_text.MEASURES, **inference_sound.MEASURES}
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows; those already in it are kept")
    parser.add_argument("--only", nargs="+", action="extend", choices=list(measures), metavar="MEASURE",
                        help=", ".join(measures))  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="RUN", help="a quickstart's folder, whose held-out rows are taken")
    parser.add_argument("--draft", type=Path, metavar="DIR", help="a smaller model with the same ids, to guess with")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--rounds", type=int, help="in turns, after one to warm up; by default of each its own")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: the process's own time")
    args = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        with tempfile.TemporaryDirectory() as work:
            model = mmllm.load(args.model, "cpu")
            found = material(args.data, args.model, 8 if args.quick else 512)
            report = Report(args.json, machine(args.threads))
            print(f"{args.model}, {found.source}; {report.machine}; {versions('torch', 'transformers')}", flush=True)
            bench = Bench(model, found, Path(work), report, args.quick, args.rounds, args.clock, args.draft)
            for name in args.only or measures:
                print(f"{name} …", file=sys.stderr, flush=True)
                try:
                    measures[name](bench)
                except MODEL_ERRORS as error:
                    bench.missing[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            report.finish()
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
