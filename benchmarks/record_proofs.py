"""Writes what `make proofs` showed into docs/RESULTS.md: `python benchmarks/record_proofs.py XML … [--into FILE]`.

Reads pytest's JUnit files. What lies between the two marks is replaced; a proof that failed is written down as one.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

BEGIN, END = "<!-- proofs: written by `make proofs` -->", "<!-- end of proofs -->"


@dataclass
class Proof:
    """Cases of one test, or of one file."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    measured: list[str] = field(default_factory=list)


def read_proofs(path: str | Path, by_file: bool) -> list[Proof]:
    """What a JUnit file says, in its order.

    Args:
        path: The file.
        by_file: One proof a file of tests; else one a test function.
    """
    proofs: dict[str, Proof] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        name = case.get("classname", "").removeprefix("tests.")
        if not by_file:
            name += f": {case.get('name', '').partition('[')[0].removeprefix('test_').replace('_', ' ')}"
        proof = proofs.setdefault(name, Proof(name))
        proof.seconds += float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            proof.failed += 1
        elif case.find("skipped") is not None:
            proof.skipped += 1
        else:
            proof.passed += 1
        proof.measured += [f"{item.get('name')} {item.get('value')}" for item in case.iter("property")]
    return list(proofs.values())


def table(proofs: Iterable[Proof], where: str) -> str:
    """Markdown."""
    lines = [where, "", "| proof | cases | time | measured |", "|---|---|---|---|"]
    for proof in proofs:
        counts = [(proof.passed, "passed"), (proof.failed, "**failed**"), (proof.skipped, "skipped")]
        told = ", ".join(f"{count} {what}" for count, what in counts if count)
        minutes, seconds = divmod(round(proof.seconds), 60)
        lines.append(f"| {proof.name} | {told} | {minutes}:{seconds:02d} | {'; '.join(proof.measured)} |")
    return "\n".join(lines)


def replaced(text: str, block: str) -> str:
    """The text with the block between the marks.

    Raises:
        ValueError: It lacks them.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def conditions() -> str:
    """Date, commit and machine, in a sentence."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"`make proofs`, {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip() or 'unknown'}; {os.cpu_count()} "
        f"cores, {device}, Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}."
    )


def main() -> int:
    """The command. 1 where a proof failed, or none ran."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("xml", nargs="+", help="pytest's JUnit files; of all but the last, one row a file of tests")
    parser.add_argument("--into", default="docs/RESULTS.md")
    args = parser.parse_args()
    proofs = [proof for path in args.xml[:-1] for proof in read_proofs(path, True)] + read_proofs(args.xml[-1], False)
    path = Path(args.into)
    path.write_text(replaced(path.read_text(encoding="utf-8"), table(proofs, conditions())), encoding="utf-8")
    num_failed = sum(proof.failed for proof in proofs)
    print(f"{args.into}: {sum(proof.passed for proof in proofs)} cases passed, {num_failed} failed")
    return 1 if num_failed or not any(proof.passed for proof in proofs) else 0


if __name__ == "__main__":
    sys.exit(main())
