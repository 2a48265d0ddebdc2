#!/usr/bin/env bash
# On a GPU machine, in one command of under nine minutes: first the tests that need a GPU, then every kernel checked
# against its reference and timed beside its dense peers, the most important figures first, each stage bounded in time.
# Results go to ${OUT:-bench/results}. Nothing is installed: PYTHON is one that has torch and the test dependencies, and
# finds the packages of this folder.
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
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
status=0

# stage NAME SECONDS COMMAND...: its output, and a note if it fails or takes too long. The later stages run all the same.
stage() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$OUT/${name// /_}.log" | tail -n 60
  local ended=${PIPESTATUS[0]}
  if [ "$ended" != 0 ]; then
    echo "== $name: failed with status $ended (124: over $seconds s)"
    status=1
  fi
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
echo "$machine" | tee "$OUT/machine.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >> "$OUT/machine.txt" 2> /dev/null || true

if [ -n "$DRY" ]; then
  export TRITON_INTERPRET=1
  stage "tests" 240 "$PYTHON" -m pytest -q --collect-only -k "cuda or interpreted" tests
else
  stage "tests" 240 "$PYTHON" -m pytest -q -k cuda tests
fi
stage "selection" 120 "$PYTHON" -m bench.topk_gpu --seconds 60 --csv "$OUT/topk_gpu.csv" $DRY
if [ -z "$DRY" ]; then
  stage "ops" 120 "$PYTHON" -m pytest -q bench -k cuda --benchmark-only --benchmark-json "$OUT/ops.json"
fi
exit $status
