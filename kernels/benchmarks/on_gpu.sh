#!/usr/bin/env bash
# Tests and benchmarks the Triton path on a machine with one GPU, torch >= 2.11 and triton >= 3.6, without network.
#   bash kernels/benchmarks/on_gpu.sh OUT                   all stages
#   bash kernels/benchmarks/on_gpu.sh OUT tune bench        some: tests, tune, bench, nearest; each under ten minutes
#   FLAGS="--tiny --rounds 2" bash kernels/benchmarks/on_gpu.sh OUT      a dry run, on a CPU too
# tests    triton_cases.py, the proofs among them, with the first guess of every block shape   tests.txt
# tune     every candidate compiled, a process a shape, then timed                             tune.txt, blocks.json
# bench    ours alone, then a process a peer; uses and extends blocks.json                     moe.txt, moe.json
# nearest  the nearest code                                                                    nearest.txt, nearest.json
# Stages add to what OUT holds of earlier ones. SHAPES and PEERS (comma between names) choose among them.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="$(mkdir -p "${1:?give a folder for the results}" && cd "$1" && pwd)"
shift
PYTHON="${PYTHON:-python3}"
read -ra FLAGS <<<"${FLAGS:-}"
case " ${FLAGS[*]:-} " in
  *" --tiny "*) KNOWN="coarse,fine-grained" ;;
  *) KNOWN="olmoe,qwen3,deepseek,mixtral,small" ;;
esac
IFS=, read -ra SHAPES <<<"${SHAPES:-$KNOWN}"
IFS=, read -ra PEERS <<<"${PEERS:-transformers grouped_mm,transformers eager,liger,scattermoe,sonicmoe}"
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

moe() { # whatever is given, with the shapes, the table and the caller's flags (the last one of two counts)
  "$PYTHON" kernels/benchmarks/moe.py --rounds 10 --shapes "$(IFS=,; echo "${SHAPES[*]}")" \
    --table "$OUT/blocks.json" ${FLAGS[@]+"${FLAGS[@]}"} "$@"
}

tests() {
  if ! has pytest,hypothesis; then
    echo "not run: pytest or hypothesis is not installed" | tee "$OUT/tests.txt"
    return 1
  fi
  local more=()
  has xdist && more=(-n 8)
  "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || export TRITON_INTERPRET=1
  MMLLM_KERNELS_AUTOTUNE=0 timeout "${TEST_SECONDS:-540}" "$PYTHON" -m pytest -q -c /dev/null --rootdir . \
    -p no:cacheprovider --import-mode=importlib ${more[@]+"${more[@]}"} tests/triton_cases.py 2>&1 |
    tee "$OUT/tests.txt" | tail -n 15
  local status="${PIPESTATUS[0]}"
  unset TRITON_INTERPRET
  echo "tests: exit status $status" | tee -a "$OUT/tests.txt"
  return "$status"
}

compile() { # takes cores, not the GPU: one process a shape fills Triton's cache; what they time side by side is lost
  local shape logs
  logs="$(mktemp -d)"
  for shape in "${SHAPES[@]}"; do
    timeout 400 "$PYTHON" kernels/benchmarks/moe.py ${FLAGS[@]+"${FLAGS[@]}"} \
      --shapes "$shape" --peers "" --rounds 1 >"$logs/$shape" 2>&1 &
  done
  wait
  tail -n +1 "$logs"/* >"$OUT/tune.txt"
  rm -r "$logs"
}

tune() {
  compile
  moe --peers "" --rounds 1 2>&1 | tee -a "$OUT/tune.txt" | tail -n 3
  return "${PIPESTATUS[0]}"
}

bench() { # an error of a peer may leave the device unusable for its process: each has one, and ours comes first
  local peer status
  moe --peers "" --json "$OUT/moe.json" 2>&1 | tee "$OUT/moe.txt"
  status="${PIPESTATUS[0]}"
  for peer in "${PEERS[@]}"; do
    moe --peers "$peer" --measures training --json "$OUT/moe.json" 2>&1 | tee -a "$OUT/moe.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || echo "failed: $peer" | tee -a "$OUT/moe.txt"
  done
  return "$status"
}

nearest() {
  "$PYTHON" kernels/benchmarks/nearest_code.py ${FLAGS[@]+"${FLAGS[@]}"} --json "$OUT/nearest.json" 2>&1 |
    tee "$OUT/nearest.txt"
  return "${PIPESTATUS[0]}"
}

[ -e "$OUT/blocks.json" ] || cp kernels/mmllm_kernels/gpu/blocks.json "$OUT/blocks.json"
[ $# -gt 0 ] || set -- tests tune bench nearest
failed=0
for stage in "$@"; do
  case "$stage" in
    tests | tune | bench | nearest) echo "== $stage" && { "$stage" || failed=1; } ;;
    *) echo "no stage $stage; choose among tests, tune, bench, nearest" && failed=1 ;;
  esac
done
exit "$failed"
