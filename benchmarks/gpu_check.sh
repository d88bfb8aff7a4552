#!/usr/bin/env bash
# All that needs a GPU, by one command, on a machine with Python, torch, CUDA's compiler and no network:
#
#     benchmarks/gpu_check.sh [--dry-run] [--seconds N] [--not STAGE]... [STAGE]...
#
# Stages run in the order of STAGES, those named or all; one that fails stops no other. The exit status is 1 if any did.
# All of it ends after N seconds, 480 if not said: a stage that no time is left for is named.
# --dry-run tries every stage as far as a machine without a GPU can: stand-ins answer for ATen's kernels, benchmarks take
# tiny sizes on the CPU, tests are collected. Nothing is changed about the GPU: its clocks and settings are as found.
#
# Results: ${OUT:-build/gpu_check}/results.json with each stage's, logs.txt with what each printed, summary.txt.
# TLM_COMMIT names the commit where the checkout has no history; PYTHON the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu_check}
WORK=build/gpu_check/stages
SKIPPED=77  # exit status of a stage that cannot run here; its last line says why
STAGES=(facts build contracts suite deterministic sanitizer ranks nccl ceilings attention one_rank several)
declare -A LIMITS=([facts]=30 [build]=200 [contracts]=40 [suite]=120 [deterministic]=60 [sanitizer]=90 [ranks]=120
  [nccl]=40 [ceilings]=30 [attention]=120 [one_rank]=60 [several]=180)  # seconds
TOTAL=480
DEVICE=cuda
declare -a CHOSEN=() LEFT_OUT=()

while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) DEVICE=cpu ;;
    --seconds) shift; TOTAL=$1 ;;
    --not) shift; LEFT_OUT+=("$1") ;;
    -*) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) CHOSEN+=("$1") ;;
  esac
  shift
done
[ ${#CHOSEN[@]} -gt 0 ] || CHOSEN=("${STAGES[@]}")
for name in "${CHOSEN[@]}" "${LEFT_OUT[@]}"; do
  [ -n "${LIMITS[$name]:-}" ] || { echo "no stage $name; there are ${STAGES[*]}"; exit 2; }
done

mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd)
rm -rf "$WORK" && mkdir -p "$WORK" && WORK=$(cd "$WORK" && pwd)
export PYTHONPATH=$PWD/src:$PWD/benchmarks:$PWD/tests PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TLM_TEST_DEVICE=$DEVICE
dry() { [ $DEVICE = cpu ]; }
program() { "$PYTHON" -m "$1" --device $DEVICE --out "$WORK" "${@:2}"; }
skip() { echo "$*"; exit $SKIPPED; }

# Tests of one process, or of ranks; collected only where there is no GPU.
tests() {
  local -a how=(-p gpu.of_ranks -p no:cacheprovider -q -m "not slow")
  if dry; then how+=(--collect-only -q); fi
  "$PYTHON" -m pytest "${how[@]}" "$@"
}
workers() { "$PYTHON" -c "import xdist" 2>/dev/null && ! dry && echo "-n $1"; }

facts() { program gpu.facts; }

build() {
  if dry; then "$PYTHON" -m two_level_mha info; return; fi
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} MAX_JOBS=${MAX_JOBS:-$(nproc)} FORCE_CUDA=1 \
    "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m two_level_mha info
}

contracts() { "$PYTHON" -m harness.contracts --device $(dry && echo stand-ins || echo cuda) --out "$WORK"; }

suite() { tests --of-ranks no $(workers 6) --junit-xml "$WORK/suite.xml" tests/ops tests/modules; }

deterministic() {
  CUBLAS_WORKSPACE_CONFIG=:4096:8 tests -p gpu.deterministic --of-ranks no $(workers 6) \
    --junit-xml "$WORK/deterministic.xml" tests/ops/$(dry && echo test_pack.py)
}

# racecheck and initcheck look at this package's own kernels; memcheck at all.
sanitizer() {
  if dry; then "$PYTHON" -m gpu.small --device cpu; return; fi
  command -v compute-sanitizer >/dev/null || skip "there is no compute-sanitizer"
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # or a block's end is not its tensor's
  local failed=0 tool
  local -a own=(--kernel-name kns=two_level_mha)
  for tool in memcheck racecheck initcheck; do
    echo "--- $tool"
    compute-sanitizer --tool $tool $([ $tool = memcheck ] || echo "${own[@]}") --error-exitcode 9 \
      "$PYTHON" -m gpu.small $([ $tool = memcheck ] || echo --only packing merging dropping turning sealing) 2>&1 |
      tee "$WORK/$tool.txt"
    local status=${PIPESTATUS[0]}
    if grep -q "Device not supported" "$WORK/$tool.txt"; then
      [ $failed -eq 0 ] && skip "compute-sanitizer refuses the device"
      continue
    fi
    [ "$status" -eq 0 ] || failed=1
  done
  return $failed
}

# 4 ranks on the one GPU, over a process group that stages through the host.
ranks() {
  tests --of-ranks only -x --junit-xml "$WORK/ranks.xml" \
    tests/grid/test_schemes.py tests/grid/test_output_bitwise.py tests/modules/test_kv_cache.py tests/models/test_generate.py
}

nccl() { program gpu.nccl; }
ceilings() { program gpu.ceilings; }
attention() { "$PYTHON" benchmarks/partial_attention.py --device $DEVICE --out "$WORK"; }
one_rank() { program gpu.one_rank; }

# Ranks over NCCL: is the node sound, do tests of ranks pass with a GPU each, and the profile of this hardware.
several() {
  local gpus=2 failed=0
  dry || gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
  [ "$gpus" -ge 2 ] || skip "needs 2 GPUs or more, there is $gpus"
  local -a run=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
  OMP_NUM_THREADS=1 "${run[@]}" -m gpu.rates --device $DEVICE --out "$WORK" || failed=1
  OMP_NUM_THREADS=1 "${run[@]}" -m two_level_mha check --device-type $DEVICE --json >"$WORK/check.json" || failed=1
  TLM_TEST_BACKEND=$(dry && echo staged || echo nccl) tests --of-ranks only --junit-xml "$WORK/several.xml" \
    tests/grid/test_collectives.py tests/grid/test_schemes.py tests/grid/test_output_bitwise.py \
    tests/modules/test_kv_cache.py || failed=1
  return $failed
}

# What a stage left, in files that are few and small.
collect() {
  "$PYTHON" - "$WORK" "$OUT/results.json" <<'END'
import json, sys
from pathlib import Path
found = {}
for path in sorted(Path(sys.argv[1]).glob("*.json")):
    try:
        found[path.stem] = json.loads(path.read_text())
    except ValueError as error:
        found[path.stem] = {"error": f"no JSON: {error}", "text": path.read_text()[-2000:]}
Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
END
  for log in "$WORK"/*.log; do echo "=== $(basename "$log" .log)"; tail -n 400 "$log"; done >"$OUT/logs.txt"
}

failed=0
: >"$OUT/summary.txt"
for name in "${STAGES[@]}"; do
  [[ " ${CHOSEN[*]} " == *" $name "* ]] && [[ " ${LEFT_OUT[*]:-} " != *" $name "* ]] || continue
  echo "=== $name"
  start=$SECONDS limit=$((TOTAL - SECONDS < LIMITS[$name] ? TOTAL - SECONDS : LIMITS[$name]))
  if [ "$limit" -le 0 ]; then
    printf '%-14s %-10s\n' "$name" "NO TIME" >>"$OUT/summary.txt"
    failed=1
    continue
  fi
  export -f $name tests workers program dry skip
  export WORK DEVICE PYTHON SKIPPED
  timeout --kill-after 10 "$limit" bash -c "set -uo pipefail; $name" 2>&1 | tee "$WORK/$name.log"
  status=${PIPESTATUS[0]} note=""
  case $status in
    0) state=ok ;;
    "$SKIPPED") state=skipped note=$(tail -n 1 "$WORK/$name.log") ;;
    124 | 137) state="TIMED OUT" note="after $limit s"; failed=1 ;;
    *) state=FAILED note="exit status $status: $(tail -n 1 "$WORK/$name.log" | cut -c1-120)"; failed=1 ;;
  esac
  printf '%-14s %-10s %4d s  %s\n' "$name" "$state" $((SECONDS - start)) "$note" >>"$OUT/summary.txt"
  collect
done
echo "=== $([ $DEVICE = cpu ] && echo "dry run, no GPU: ")results in $OUT"
cat "$OUT/summary.txt"
exit $failed
