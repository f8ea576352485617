"""The data engine's benchmarks run, and give the measures that docs/RESULTS.md tells of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURES = {
    "shards_open", "shards_open_s", "rank_memory_bytes", "rank_peak_bytes", "rank_start_s", "long_text_s",
    "jsonl_per_s", "remote_per_s", "remote_bytes_ratio", "remote_requests", "remote_first_step", "share_step_s",
    "build_row_bytes", "build_rows_per_s", "build_rows_per_cpu_s",
}  # fmt: skip


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_scale_gives_all_its_measures(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--quick", "--json", str(tmp_path / "rows.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=800)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["measure"] for row in rows} == MEASURES
    assert all(next(iter(row)) == "measure" and row["value"] > 0 and row["unit"] for row in rows)
    values = {row["measure"]: row["value"] for row in rows}
    assert values["shards_open"] == 2000 and values["remote_first_step"] < 1.5 and values["share_step_s"] < 0.1
