#!/usr/bin/env bash
# Everything that needs a GPU, within 25 minutes: tests, pruning time, memory, streaming, recovery, serving.
#
#   bash scripts/gpu_checks.sh OUT                results and logs in the folder OUT; run again, it continues
#   MODEL=SmolLM2-135M-Instruct CALIB=valid.txt TEXT="train.txt" EVAL=wiki=test.txt bash scripts/gpu_checks.sh OUT
#   bash scripts/gpu_checks.sh OUT --rehearse     the same parts with tiny sizes, also without a GPU
set -euo pipefail
MODEL=${MODEL:-}                       # checkpoint folder for the recovery, which is left out without it
CALIB=${CALIB:-}                       # calibration text file of the recovery
TEXT=${TEXT:-}                         # training text files of the recovery, several with spaces
EVAL=${EVAL:-}                         # NAME=FILE of the recovery's evaluation texts, several with spaces
MINUTES=${MINUTES:-25}                 # time limit of all parts

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
source "$root/scripts/env.sh"
case "$#:${1:-}:${2:-}" in
    1:[!-]*: | 2:[!-]*:--rehearse) ;;
    *) echo "gpu_checks.sh: error: give the folder of the results, and at most --rehearse; set the variables at the top" >&2
       exit 2 ;;
esac
flags=(--minutes "$MINUTES" "${@:2}") texts=() evals=()
for text in $TEXT; do texts+=("$(local_or_name "$text")"); done
for text in $EVAL; do evals+=("$(local_or_name "$text")"); done
[ -z "$MODEL" ] || flags+=(--model "$(local_or_name "$MODEL")")
[ -z "$CALIB" ] || flags+=(--calib_file "$(local_or_name "$CALIB")")
[ ${#texts[@]} -eq 0 ] || flags+=(--train_text "${texts[@]}")
[ ${#evals[@]} -eq 0 ] || flags+=(--eval_files "${evals[@]}")
out=$(absolute_path "$1")
cd "$root"
make_venv requirements-dev.txt
exec .venv/bin/python -m benchmarks.gpu_checks "$out" "${flags[@]}"
