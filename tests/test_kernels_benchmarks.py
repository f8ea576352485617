"""The benchmarks run where nothing but the development environment is installed, and write the agreed rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "kernels" / "benchmarks"


@pytest.mark.proof
@pytest.mark.parametrize(
    ("script", "measures", "peer"),
    [
        ("moe.py", {"forward", "forward+backward", "given gates", "saved", "decode"}, "transformers grouped_mm"),
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


WRONG = """
import runpy, sys
import mmllm_kernels
right = mmllm_kernels.moe
def wrong(*arguments, backend="auto"):
    result = right(*arguments, backend=backend)
    return result._replace(out_TD=result.out_TD * 1.001) if backend == "auto" else result
mmllm_kernels.moe = wrong
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.proof
@pytest.mark.parametrize("peer", ["", "transformers grouped_mm"])
def test_what_computes_something_else_is_not_timed(peer, tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--tiny", "--rounds", "1", "--threads", "1", "--measures", "training", "--device", "cpu"]
    command = [sys.executable, "-c", WRONG, str(BENCHMARKS / "moe.py"), *flags, "--peers", peer, "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "NOT TIMED: coarse: out, dx, dlogits, dw_gate_up, dw_down differ by more than 0.0001" in result.stdout
    assert json.loads(path.read_text()) == []


@pytest.mark.proof
def test_stages_of_a_gpu_run_add_to_few_files(tmp_path):
    environment = {
        **os.environ, "PYTHON": sys.executable, "PEERS": "transformers grouped_mm", "CUDA_VISIBLE_DEVICES": "",
        "FLAGS": "--tiny --rounds 1 --threads 1",
    }  # fmt: skip
    for stages in (["tune"], ["bench", "nearest"], ["bench"]):
        command = ["bash", str(BENCHMARKS / "on_gpu.sh"), str(tmp_path), *stages]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert len(list(tmp_path.iterdir())) <= 8
    assert "==> " in (tmp_path / "tune.txt").read_text(), "the compile step ran nothing"
    shipped = BENCHMARKS.parent / "mmllm_kernels" / "gpu" / "blocks.json"
    assert (tmp_path / "blocks.json").read_text() == shipped.read_text()
    rows = json.loads((tmp_path / "moe.json").read_text())
    seen = [(row["measure"], row["case"], row["unit"], row["peer"]) for row in rows]
    assert len(set(seen)) == len(seen)
    assert {peer for *_, peer in seen} == {None, "transformers grouped_mm"}
    assert len(json.loads((tmp_path / "nearest.json").read_text())) > 0
