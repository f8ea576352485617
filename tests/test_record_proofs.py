"""What `make proofs` writes into docs/RESULTS.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROOFS = """
import pytest

@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_number_is_small(number, record_property):
    record_property("number", number)
    assert number < {bound}

def test_what_is_left_out():
    pytest.skip("not here")
"""


@pytest.mark.parametrize("bound", [3, 4])
def test_proofs_are_written_down_also_where_they_failed(tmp_path, bound):
    (tmp_path / "test_some.py").write_text(PROOFS.format(bound=bound))
    results = tmp_path / "RESULTS.md"
    marks = [line for line in (ROOT / "docs" / "RESULTS.md").read_text().splitlines() if line.startswith("<!-- ")]
    results.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    for name in ("short", "long"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", f"{name}.xml"]
        subprocess.run([*command, "test_some.py"], cwd=tmp_path, capture_output=True, check=False)
    record = [sys.executable, str(ROOT / "benchmarks" / "record_proofs.py"), "short.xml", "long.xml"]
    for _ in range(2):
        done = subprocess.run([*record, "--into", str(results)], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == (bound == 3), done.stderr
    lines = results.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    short, number, skipped = [[cell.strip() for cell in line.split("|")] for line in lines if "test_some" in line]
    counts = "2 passed, 1 **failed**" if bound == 3 else "3 passed"
    assert short[1:3] == ["test_some", f"{counts}, 1 skipped"]
    assert number[1:3] == ["test_some: a number is small", counts]
    assert number[4] == "number 1; number 2; number 3"
    assert skipped[2] == "1 skipped"
