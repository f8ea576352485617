"""What two cores reach: `python benchmarks/small.py --json F [--only NAME] [--seeds 0,1,2]`.

`demo`         `mmllm quickstart`, as `make demo` runs it: minutes, memory, and all of its scores.
`fsdd`         spoken digits, ten minutes a fold: each of the four given speakers held out, and each of the two that the
               folder for development lacks, where $MMLLM_DATA has them.
`cifar10`, `emoji`, `shakespeare`   ten minutes each, on rows that are held out as tests/test_proofs.py does it.
`quick`        three minutes each of the four sets.

Every run is `mmllm quickstart` as a process of its own; measures are read from its report.json. F holds a row a
measure, `{"name", "measure", "seed", "score", "interval", "minutes"}`, and the folder F.rows what each held-out row
scored, and the commit that scored it. What F holds is not run again, and a run that was stopped goes on in its folder
under --work, if the code is the one that began it.

`python benchmarks/small.py --compare F1 F2` pairs two files by seed and by row; see small_compare.py.

--max_steps N tries the whole way out with N steps of each training: its scores mean nothing, and are never mixed with
others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import small_compare
from small_cases import GIVEN_SPEAKERS, MEAN, MEASURES, NAMES, Case, Measure, cases

from mmllm.checkout import commit

Row = dict[str, Any]
_ROW_VALUES = {
    "exact_match": ("test", "correct"), "answer_accuracy": ("test", "correct"), "wer": ("test", "score"),
    "heldout_voices_wer": ("heldout_voices", "score"), "round_trip_wer": ("test", "score"),
    "attribute_accuracy": ("test", "score"), "bits_per_byte": ("test", "score"),
}  # fmt: skip
"""The set of rows that a score is made of, and the value of each prediction."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is asked for, or compares two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--only", action="append", choices=NAMES, help="may be repeated; without it, all")
    parser.add_argument("--seeds", type=seeds_of, default=(0, 1, 2), metavar="0,1,2")
    parser.add_argument("--json", type=Path, metavar="F", help="rows are added to it")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the runs lie; without it, F.runs")
    parser.add_argument("--max_steps", type=int, metavar="N", help="a try-out: N steps of each training")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("F1", "F2"))
    args = parser.parse_args(argv)
    if args.compare is not None:
        print("\n".join(small_compare.table(compared(*args.compare))))
        return
    if args.json is None:
        parser.error("give --json F, where the rows go, or --compare F1 F2")
    work = args.work or args.json.with_name(f"{args.json.name}.runs")
    failed = Bench(args.json, work, args.max_steps).run(args.only or NAMES, args.seeds)
    print("\n".join(["", *summary(read(args.json))]))
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: {', '.join(failed)}; mend what they say and run this again")


def seeds_of(text: str) -> tuple[int, ...]:
    """Of "0,1,2"."""
    return tuple(int(word) for word in text.split(","))


# ----------------------------------------------------------------------------------------------------------------- runs
class Bench:
    """The runs of a file.

    Args:
        file: of rows.
        work: folder of the runs.
        max_steps: of a try-out.
    """

    def __init__(self, file: Path, work: Path, max_steps: int | None) -> None:
        self.file, self.work, self.max_steps = file, work, max_steps
        self.rows = read(file)
        held = {row.get("max_steps") for row in self.rows}
        if held - {max_steps}:
            raise SystemExit(f"{file} holds rows with --max_steps {held.pop()}, not {max_steps}; give another file")

    def run(self, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Runs what the file lacks, seed by seed; gives the names of runs that failed."""
        wanted: list[Case] = []
        for name in dict.fromkeys(names):
            found, left_out = cases(name)
            wanted += found
            for line in left_out:
                print(line, flush=True)
        failed = []
        for seed in seeds:
            for case in wanted:
                if self.has(case, seed):
                    print(f"done before: {case.slug}, seed {seed}", flush=True)
                elif not self.measured(case, seed):
                    failed.append(f"{case.slug}, seed {seed}")
            self.add_means(seed)
        return failed

    def has(self, case: Case, seed: int) -> bool:
        """Whether the file holds a run's rows."""
        labels = {case.label(measure.label) for measure in case.measures}
        return any((row["name"], row["seed"]) == (case.name, seed) and row["measure"] in labels for row in self.rows)

    def measured(self, case: Case, seed: int) -> bool:
        """Runs one case and adds its rows; whether it went well."""
        kind = "" if self.max_steps is None else f"-{self.max_steps}_steps"
        home = self.work / f"{case.slug}-seed{seed}{kind}"
        check_commit(home)
        command = ["quickstart", *case.rows(home), "--seed", str(seed), "--out", str(home / "run")]
        if self.max_steps is not None:
            command += ["--max_steps", str(self.max_steps)]
        elif case.minutes is not None:
            command += ["--minutes", f"{case.minutes:g}"]
        print(f"\n== {case.slug}, seed {seed}\n$ {shlex.join(['mmllm', *command])}", flush=True)
        done = subprocess.run([sys.executable, "-m", "mmllm.cli", *command], check=False)
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode:
            return False
        report = json.loads((home / "run" / "report.json").read_text(encoding="utf-8"))
        minutes = round(report["train"]["seconds"] / 60, 2)
        outcomes: dict[str, dict[str, float]] = {}
        for measure in case.measures:
            found = measure.read(report)
            if found is None:
                print(f"{case.slug}: the report has no {measure.key}", flush=True)
                continue
            label = case.label(measure.label)
            self._add(case.name, label, seed, *found, minutes)
            if (scored := row_scores(home / "run", measure)) is not None:
                outcomes[label] = scored
        self._write(f"{case.slug}-seed{seed}", case.name, seed, outcomes)
        return True

    def add_means(self, seed: int) -> None:
        """Adds a seed's mean over the given speakers, once all of their folds are there."""
        folds: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            speaker, _, measure = row["measure"].partition(": ")
            if row["name"] == "fsdd" and row["seed"] == seed and speaker in GIVEN_SPEAKERS:
                folds[measure].append(row)
        there = {row["measure"] for row in self.rows if row["name"] == "fsdd" and row["seed"] == seed}
        for measure, rows in folds.items():
            label = f"{MEAN}: {measure}"
            if len(rows) == len(GIVEN_SPEAKERS) and label not in there:
                score = float(np.mean([row["score"] for row in rows]))
                minutes = round(sum(row["minutes"] for row in rows), 2)
                self._add("fsdd", label, seed, score, mean_interval(rows, score), minutes)
        if folds:
            self._write(None, "fsdd", seed, {})

    def _add(
        self, name: str, measure: str, seed: int, score: float, interval: list[float] | None, minutes: float
    ) -> None:
        row: Row = {"name": name, "measure": measure, "seed": seed, "score": score, "interval": interval,
                    "minutes": minutes}  # fmt: skip
        self.rows.append(row if self.max_steps is None else {**row, "max_steps": self.max_steps})

    def _write(self, slug: str | None, name: str, seed: int, outcomes: dict[str, dict[str, float]]) -> None:
        """Writes the file anew, and what a run's held-out rows scored."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if slug is not None:
            folder = rows_folder(self.file)
            folder.mkdir(exist_ok=True)
            values = {"name": name, "seed": seed, "commit": commit(), "measures": outcomes}
            (folder / f"{slug}.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        new = self.file.with_name(f"{self.file.name}.new")
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in self.rows)
        new.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        os.replace(new, self.file)


def check_commit(home: Path) -> None:
    """Notes which code began a run, or refuses to go on with what other code began: its score would be neither's.

    Raises:
        SystemExit: another commit began it.
    """
    note, now = home / "commit", commit() or "unknown"
    if note.is_file() and (began := note.read_text(encoding="utf-8").strip()) != now:
        raise SystemExit(
            f"{home} was begun by commit {began}, and this is {now}; give another --json or --work, or remove it"
        )
    home.mkdir(parents=True, exist_ok=True)
    note.write_text(now + "\n", encoding="utf-8")


def mean_interval(rows: Sequence[Row], score: float) -> list[float] | None:
    """Of a mean of independent folds, from their own intervals: half widths add as standard errors do."""
    if any(row["interval"] is None for row in rows):
        return None
    half = math.hypot(*((row["interval"][1] - row["interval"][0]) / 2 for row in rows)) / len(rows)
    return [score - half, score + half]


def row_scores(run: Path, measure: Measure) -> dict[str, float] | None:
    """What each held-out row of a run scores, more being better; None: the measure isn't one of rows."""
    task, _, key = measure.key.partition(".")
    file = run / "eval" / f"{task}.json"
    if key not in _ROW_VALUES or not file.is_file():
        return None
    predictions = json.loads(file.read_text(encoding="utf-8"))["predictions"]
    group, value = _ROW_VALUES[key]
    return {row["id"]: float(row[value]) for row in predictions if row["group"] == group}


# ----------------------------------------------------------------------------------------------------------- the files
def read(file: Path) -> list[Row]:
    """The rows of a file; none where it isn't there.

    Raises:
        SystemExit: it holds something else.
    """
    if not file.is_file():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not all({"name", "measure", "seed", "score"} <= row.keys() for row in rows):
            raise ValueError("a row lacks name, measure, seed or score")
    except (ValueError, AttributeError, TypeError) as error:
        raise SystemExit(f"{file} holds no rows of small.py ({error}); give another file") from error
    return rows


def rows_folder(file: Path) -> Path:
    """Where what held-out rows scored lies."""
    return file.with_name(f"{file.name}.rows")


def outcomes_of(file: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """What held-out rows scored, by (name, measure, seed); of a mean over folds, the rows of all of them."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for path in sorted(rows_folder(file).glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        for label, scores in values["measures"].items():
            found[values["name"], label, values["seed"]] = scores
            speaker, _, measure = label.partition(": ")
            if speaker in GIVEN_SPEAKERS:
                found.setdefault((values["name"], f"{MEAN}: {measure}", values["seed"]), {}).update(scores)
    return found


def compared(first: Path, second: Path) -> list[small_compare.Comparison]:
    """Two files, paired.

    Raises:
        SystemExit: one of them isn't there, or they have nothing in common.
    """
    for file in (first, second):
        if not file.is_file():
            raise SystemExit(f"{file}: no such file; `small.py --json {file}` writes it")
    errors = {name for name, measure in MEASURES.items() if measure.is_error}
    found = small_compare.compare(read(first), read(second), errors, (outcomes_of(first), outcomes_of(second)))
    if not found:
        raise SystemExit(f"{first} and {second} have no measure with a seed in common")
    return found


def summary(rows: Sequence[Row]) -> list[str]:
    """A line a measure: mean and standard deviation over seeds."""
    scores: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        scores[row["name"], row["measure"]].append(row)
    lines = [f"{'name':<12} {'measure':<34} {'seeds':>5} {'mean':>9} {'SD':>8} {'minutes':>8}"]
    for (name, measure), found in scores.items():
        values = [row["score"] for row in found]
        spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else "–"
        minutes = np.mean([row["minutes"] for row in found])
        lines.append(f"{name:<12} {measure:<34} {len(values):>5} {np.mean(values):>9.4f} {spread:>8} {minutes:>8.1f}")
    return lines


if __name__ == "__main__":
    main()
