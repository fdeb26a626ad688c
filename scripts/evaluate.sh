#!/usr/bin/env bash
# Stage 3: zero-shot accuracy on the seven tasks of the paper.
#
#   MODEL=out/sft/lora_fused_model OUT=out/sft.json bash scripts/evaluate.sh
#   bash scripts/evaluate.sh --smoke   trial run with a few rows (default MODEL: SmolLM2-135M)
set -euo pipefail
MODEL=${MODEL:-}                       # checkpoint folder or hub name
DATA=${DATA:-}                         # folder of local task files (default: from the hub)
TASKS=${TASKS:-}                       # default: openbookqa,arc_easy,winogrande,hellaswag,arc_challenge,piqa,boolq
OUT=${OUT:-out/zero_shot.json}         # written: OUT, and the log OUT.log
BATCH_SIZE=${BATCH_SIZE:-auto}

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
source "$root/scripts/env.sh"
MODEL=$(local_or_name "$MODEL") DATA=$(local_or_name "$DATA") OUT=$(absolute_path "$OUT")
cd "$root"
smoke_mode "$@" || require MODEL "a checkpoint folder or hub name"
make_venv requirements.txt
flags=()
if smoke_mode "$@"; then
    flags=(--limit 8) TASKS=${TASKS:-piqa}
    if [ -z "$MODEL" ] || [ -z "$DATA" ]; then
        smoke_inputs
        MODEL=${MODEL:-$smoke_model} DATA=${DATA:-$smoke_data/tasks}
    fi
fi

flags+=(--model "$MODEL")
[ -n "$DATA" ] && flags+=(--data_dir "$DATA")
[ -n "$TASKS" ] && flags+=(--tasks "$TASKS")
mkdir -p "$(dirname "$OUT")"
.venv/bin/python model_evaluate.py "${flags[@]}" \
    --batch_size "$BATCH_SIZE" --output_path "$OUT" --no_cache 2>&1 | tee -i "$OUT.log"
