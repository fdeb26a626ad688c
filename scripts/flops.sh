#!/usr/bin/env bash
# Parameters, MACs, memory and latency of a model, compared with another.
#
#   MODEL=meta-llama/Llama-2-7b-hf DATA=out/pruned/pruned_weights bash scripts/flops.sh
#   bash scripts/flops.sh --smoke      trial run with short prompts (default MODEL: SmolLM2-135M)
set -euo pipefail
MODEL=${MODEL:-}                       # checkpoint folder or hub name
DATA=${DATA:-}                         # second model, usually the pruned one (default: none; prints a table of layers)
OUT=${OUT:-out/flops.json}             # written: OUT, and the log OUT.log
BATCH_SIZES=${BATCH_SIZES:-1 8} LENGTHS=${LENGTHS:-128 1024}

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
source "$root/scripts/env.sh"
MODEL=$(local_or_name "$MODEL") DATA=$(local_or_name "$DATA") OUT=$(absolute_path "$OUT")
cd "$root"
smoke_mode "$@" || require MODEL "a checkpoint folder or hub name"
make_venv requirements.txt
repeats=5 new_tokens=32
if smoke_mode "$@"; then
    BATCH_SIZES=1 LENGTHS=8 repeats=1 new_tokens=2
    [ -n "$MODEL" ] || { smoke_inputs && MODEL=$smoke_model; }
    DATA=${DATA:-$MODEL}
fi

flags=(--base_model "$MODEL")
[ -n "$DATA" ] && flags+=(--compare "$DATA")
mkdir -p "$(dirname "$OUT")"
.venv/bin/python test_flops.py "${flags[@]}" \
    --batch_sizes $BATCH_SIZES --lengths $LENGTHS --repeats $repeats --new_tokens $new_tokens --out "$OUT" \
    2>&1 | tee -i "$OUT.log"
