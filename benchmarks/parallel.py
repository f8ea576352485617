"""Whether many processes train as one does: `python benchmarks/parallel.py [--json F] [--quick] [--only LAYOUT]`.

`loss difference`: the largest absolute difference of the losses of 20 steps between one process and several (gloo, on
the CPU), of the same model on the same global batches: pictures, sounds, units and text, with accumulation, clipping,
Muon and EMA. In float64 all steps; in float32 the first and the last step (a router's near ties may fall differently).
`weight difference`: of the averaged weights at the end, in float64.

Layouts: DDP; FSDP2 (4 processes: two copies of two shards); FSDP2+EP (experts over two ranks, tokens by all-to-all);
FSDP2+TP (heads, inner widths, experts and vocabulary over two ranks). --quick takes 4 steps and 2 processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from parallel_side import LAYOUTS, Training, run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels" / "benchmarks"))

import measure  # noqa: E402

UNIT = "largest absolute difference"


def main() -> None:
    """See --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows; those already in it are kept")
    parser.add_argument("--quick", action="store_true", help="4 steps and 2 processes, to see that it works")
    parser.add_argument("--only", action="append", choices=list(LAYOUTS), help="may be repeated")
    args = parser.parse_args()
    measure.describe("cpu", ("lightning",))
    report = measure.Report(args.json)
    with tempfile.TemporaryDirectory() as work:
        for precision in ("float64", "float32"):
            base = Training(precision=precision, num_steps=4 if args.quick else 20)
            ((alone,),) = run([base], Path(work, precision))
            for number in (2,) if args.quick else (2, 4):
                print(f"{precision}, {number} processes …", file=sys.stderr)
                layouts = args.only or list(LAYOUTS)
                trainings = [dataclasses.replace(base, num_processes=number, layout=layout) for layout in layouts]
                for training, ranks in zip(trainings, run(trainings, Path(work, f"{precision}{number}")), strict=True):
                    _add(report, training, alone, ranks)
                report.write()
    report.finish()


def _add(report: measure.Report, training: Training, alone: dict, ranks: list[dict]) -> None:
    """The rows of one training."""
    wanted = torch.tensor(alone["losses"], dtype=torch.float64)
    found_RS = torch.tensor([rank["losses"] for rank in ranks], dtype=torch.float64)
    differences_S = (found_RS - wanted).abs().amax(dim=0)
    case = f"{training.precision} {training.layout} {training.num_processes} processes"
    if training.precision == "float64":
        report.add("loss difference", case, UNIT, float(differences_S.max()), {})
        pairs = [(rank["weights"][name], weight) for rank in ranks for name, weight in alone["weights"].items()]
        largest = max(float((found - weight).abs().max()) for found, weight in pairs)
        report.add("weight difference", case, UNIT, largest, {})
        return
    for name, value in (("step 1", differences_S[0]), (f"step {training.num_steps}", differences_S[-1])):
        report.add("loss difference", f"{case} {name}", UNIT, float(value), {})


if __name__ == "__main__":
    main()
