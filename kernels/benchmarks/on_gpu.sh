#!/usr/bin/env bash
# Tests and benchmarks the Triton path on a machine with one GPU, torch >= 2.11 and triton >= 3.6, without network.
#   bash kernels/benchmarks/on_gpu.sh OUT                   about ten minutes on an H200
#   FLAGS="--tiny --rounds 2" bash kernels/benchmarks/on_gpu.sh OUT      a dry run, on a CPU too
# Writes to OUT: tests.txt, moe.txt, moe.json, nearest.txt, nearest.json, blocks.json (the table with the shapes timed).
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)"
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

echo "== tests"
if "$PYTHON" -c "import pytest, hypothesis" 2>/dev/null; then
  timeout "${TEST_SECONDS:-240}" "$PYTHON" -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider \
    --import-mode=importlib tests/triton_cases.py 2>&1 | tee "$OUT/tests.txt" | tail -n 15
else
  echo "not run: pytest or hypothesis is not installed" | tee "$OUT/tests.txt"
fi

# Compiling takes most of the time and needs cores, not the GPU: one process a shape fills Triton's cache with every
# candidate. What they time beside one another is thrown away.
echo "== compiling"
for shape in ${SHAPES:-olmoe qwen3 deepseek mixtral small}; do
  timeout 240 "$PYTHON" kernels/benchmarks/moe.py --shapes "$shape" --peers "" --rounds 1 ${FLAGS:-} \
    >"$OUT/compile_$shape.txt" 2>&1 &
done
wait

echo "== benchmarks"
cp kernels/mmllm_kernels/gpu/blocks.json "$OUT/blocks.json"
"$PYTHON" kernels/benchmarks/moe.py --rounds 10 ${SHAPES:+--shapes "${SHAPES// /,}"} ${FLAGS:-} \
  --json "$OUT/moe.json" --table "$OUT/blocks.json" 2>&1 | tee "$OUT/moe.txt"
"$PYTHON" kernels/benchmarks/nearest_code.py ${FLAGS:-} --json "$OUT/nearest.json" 2>&1 | tee "$OUT/nearest.txt"
