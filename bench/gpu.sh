#!/usr/bin/env bash
# On a GPU machine, in one command of under nine minutes: first the tests that need a GPU, then the ops checked against
# float64 and timed beside their dense peers. Results go to ${OUT:-bench/results}. Nothing is installed: PYTHON is one
# that has torch and the test dependencies, and finds the packages of this folder.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
status=0

"$PYTHON" - <<'PY' | tee "$OUT/machine.txt"
import torch, triton
if not torch.cuda.is_available():
    raise SystemExit("no CUDA device: this script is for GPU machines")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
PY
[ "${PIPESTATUS[0]}" = 0 ] || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv >> "$OUT/machine.txt" || true

echo "== tests on the GPU"
timeout 240 "$PYTHON" -m pytest -q -k cuda tests 2>&1 | tee "$OUT/tests.log" | tail -n 5
[ "${PIPESTATUS[0]}" = 0 ] || status=1

echo "== ops beside their dense peers"
timeout 240 "$PYTHON" -m pytest -q bench -k cuda --benchmark-only --benchmark-json "$OUT/ops.json" 2>&1 |
  tee "$OUT/ops.txt" | tail -n 40
[ "${PIPESTATUS[0]}" = 0 ] || status=1
exit $status
