#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes on one card:
#   benchmarks/gpu.sh [OUT]                    tests, then every suite at full size, under OUT, default benchmarks/results/gpu-<card>
#   benchmarks/gpu.sh --dry-run [OUT]          the same stages on the CPU at the smallest sizes: checks this script
#   PYTHON=python3 benchmarks/gpu.sh           another interpreter; needs torch with CUDA, triton, pytest, hypothesis, rich
# Peers' wheels (liger-kernel, trl, cut-cross-entropy, quack-kernels) are used where they are importable.
# On a lent machine: PYTHON=python3 benchmarks/gpu.sh "$OUT"; the stages print their ends, the logs lie in OUT.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
dry=0
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
if [ "$dry" = 1 ]; then
  out=${1:-runs/gpu-dry-run}
  device=cpu head=(--tiny --case forward) exact=(--tiny) rest=(--tiny --minutes 1.5) suite=(-k "reference and pitfall") kind=float32
else
  card=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0).lower().replace(" ", "-"))') || exit 2
  out=${1:-benchmarks/results/gpu-$card}
  # no case starts after a stage's minutes; head has 150 cases, the models that matter most first
  device=cuda head=(--full --minutes 1.8) exact=(--full --minutes 0.4) rest=(--full --minutes 2.4) suite=(-k cuda) kind=bfloat16
fi
parallel=() # a GPU's machine has cores to compile on
if [ "$dry" = 0 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 8); fi
mkdir -p "$out" || exit 2
: >"$out/log.txt" # few files: a lent machine returns eight
bad=0

stage() { # name, seconds, command...: its own limit, the end of its log on the screen
  local name=$1 limit=$2 code=0 started=$SECONDS
  shift 2
  echo "== $name" >>"$out/log.txt"
  timeout --kill-after=10 "$limit" "$@" >>"$out/log.txt" 2>&1 || code=$?
  echo "== $name: exit code $code after $((SECONDS - started)) s (limit $limit s)"
  tail -n 12 "$out/log.txt"
  [ "$code" = 0 ] || bad=1
}

if [ "$device" = cuda ]; then
  nvidia-smi --query-gpu=timestamp,name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv -l 5 >"$out/clocks.csv" 2>&1 &
  clocks=$!
  trap 'kill "$clocks" 2>/dev/null' EXIT
fi

run=("$PYTHON" benchmarks/run.py --device "$device")
stage suite 180 env HYPOTHESIS_PROFILE=few "$PYTHON" -m pytest -q -p no:cacheprovider tests/head/test_head.py tests/backends/triton/test_cuda.py "${suite[@]}" "${parallel[@]}"
stage accuracy 40 "${run[@]}" --suite accuracy "${exact[@]}" --out "$out/accuracy.json"
stage head 150 "${run[@]}" --suite head --dtype "$kind" "${head[@]}" --out "$out/head.json"
stage bench 160 "${run[@]}" --suite step --suite elbo --suite rollout --suite bgpo --suite entropy "${rest[@]}" --out "$out/bench.json"
if [ "$device" = cuda ]; then
  # the candidates of the fused kernel and of chunks, by time: what DLLM_KERNELS_AUTOTUNE=1 would choose on this card
  stage tuning 50 env DLLM_KERNELS_AUTOTUNE=1 DLLM_KERNELS_CACHE="$out/tuning.json" "$PYTHON" -c '
from benchmarks.suites.head import HEADS
from dllm_kernels.backends.triton.head import warmup
for head in HEADS.values():
    warmup(head["H"], head["V"])'
  (cd "$out" && tar czf plots.tar.gz ./*.png && rm -f ./*.png)
fi
exit "$bad"
