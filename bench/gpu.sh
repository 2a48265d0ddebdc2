#!/usr/bin/env bash
# On a GPU machine, in one command of under nine minutes: first the tests that need a GPU, then every kernel checked
# against its reference and timed beside its dense peers, the most important figures first, each stage bounded in time.
# Results go to ${OUT:-bench/results}, with all that was printed in gpu.log. Nothing is installed: PYTHON is one that has
# torch, pytest and hypothesis, and finds the packages of this folder.
#
#   bench/gpu.sh          measure
#   bench/gpu.sh --dry    walk through every stage with tiny sizes, on the CPU where there is no GPU; OUT has to be set
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DRY=
case "${1:-}" in
  "") ;;
  --dry) DRY=--dry ;;
  *) echo "usage: bench/gpu.sh [--dry]" >&2; exit 2 ;;
esac
if [ -n "$DRY" ] && [ -z "${OUT:-}" ]; then
  echo "bench/gpu.sh --dry: set OUT to a folder for its results, which mean nothing" >&2
  exit 2
fi
OUT=${OUT:-bench/results}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export GRANET_TRITON=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # tests ask torch for deterministic operations
status=0

# stage NAME SECONDS COMMAND...: its output, and a note if it fails or takes too long. The later stages run all the same.
stage() {
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  echo "== $name" | tee -a "$OUT/gpu.log"
  timeout -s INT -k 10 "$seconds" "$@" 2>&1 | tee -a "$OUT/gpu.log" | tail -n 60
  local ended=${PIPESTATUS[0]}
  if [ "$ended" != 0 ]; then
    echo "== $name: failed with status $ended (124: over $seconds s)" | tee -a "$OUT/gpu.log"
    status=1
  fi
  echo "== $name: $((SECONDS - began)) s" | tee -a "$OUT/gpu.log"
}

machine=$("$PYTHON" - "$DRY" <<'PY'
import sys, torch, triton
if not torch.cuda.is_available() and sys.argv[1] != "--dry":
    raise SystemExit("no CUDA device: this script is for GPU machines (`--dry` walks through without one)")
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(name, "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
PY
) || exit 1
mkdir -p "$OUT" || exit 1
echo "$machine" | tee "$OUT/gpu.log"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv >> "$OUT/gpu.log" 2> /dev/null || true

if [ -n "$DRY" ]; then
  export TRITON_INTERPRET=1
  stage "tests" 240 "$PYTHON" -m pytest -q --collect-only -k "cuda or triton or event" tests/kernels
else
  # Most of their time goes to compiling, which several processes do side by side.
  parallel=$("$PYTHON" -c 'import xdist' 2> /dev/null && echo "-n 8")
  stage "tests" 150 "$PYTHON" -m pytest -q --tb=short $parallel -k "cuda or triton or event" tests/kernels
fi
stage "selection" 60 "$PYTHON" -m bench.topk_gpu --seconds 30 --csv "$OUT/topk_gpu.csv" $DRY
stage "linear" 120 "$PYTHON" -m bench.linear_gpu --seconds 60 --csv "$OUT/linear_gpu.csv" $DRY
stage "update" 60 "$PYTHON" -m bench.event_gpu --seconds 10 --csv "$OUT/event_gpu.csv" $DRY
stage "tilings" 120 "$PYTHON" -m bench.linear_gpu --tilings --seconds 40 --csv "$OUT/tilings_gpu.csv" $DRY
if [ -z "$DRY" ]; then
  # Those of the others whose imports need no more than the above.
  stage "other tests" 50 "$PYTHON" -m pytest -q --tb=short -k "cuda or on_the_gpu" \
    tests/test_same_run.py tests/test_granularity.py tests/data/test_memory_split.py
fi
exit $status
