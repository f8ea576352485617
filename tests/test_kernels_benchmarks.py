"""The benchmarks run where nothing but the development environment is installed, and write the agreed rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "kernels" / "benchmarks"


@pytest.mark.proof
@pytest.mark.parametrize(
    ("script", "measures", "peer"),
    [
        ("moe.py", {"forward", "forward+backward", "saved", "decode"}, "transformers grouped_mm"),
        ("nearest_code.py", {"forward"}, "encodec"),
    ],
)
def test_benchmark_writes_its_rows(script, measures, peer, tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, str(BENCHMARKS / script), "--tiny", "--rounds", "1", "--threads", "1"]
    result = subprocess.run([*command, "--device", "cpu", "--json", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(path.read_text())
    assert {row["measure"] for row in rows} == measures
    assert peer in {row["peer"] for row in rows}
    for row in rows:
        assert list(row) == ["measure", "case", "value", "unit", "peer", "peer_value", "ratio"]
        assert row["case"].startswith("cpu ") and row["value"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])
    assert "not run: " in result.stdout
