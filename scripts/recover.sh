#!/usr/bin/env bash
# Stage 2: recover a pruned model on plain text with the dense model as teacher.
#
#   MODEL=out/pruned/pruned_weights DENSE=meta-llama/Llama-3.2-1B TEXT=c4 bash scripts/recover.sh
#   bash scripts/recover.sh --smoke    trial run with a few short steps (default MODEL and DENSE: SmolLM2-135M)
set -euo pipefail
MODEL=${MODEL:-}                       # checkpoint folder, usually the pruned_weights of a run
DENSE=${DENSE:-}                       # the model that it was pruned from: the teacher
TEXT=${TEXT:-}                         # c4, wikitext2, a hub name or a file; several with spaces: "c4:0.7 wikitext2:0.3"
TOKENS=${TOKENS:-1e6}                  # tokens to train on
TRAIN=${TRAIN:-block_weights}          # lora (a quarter of the memory), block_weights, scales, all
EVAL=${EVAL:-}                         # wikitext2 (default), ptb, a file, or NAME=FILE
OUT=${OUT:-out/recovered}              # written: OUT/ (with TRAIN=lora the model is OUT/lora_fused_model/), OUT.log
NPROC=${NPROC:-1}                      # processes, one per GPU; DeepSpeed if more than one
FLAGS=${FLAGS:-}                       # more flags, e.g. "--learning_rate 1e-4"

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
source "$root/scripts/env.sh"
check_count NPROC "$NPROC"
MODEL=$(local_or_name "$MODEL") DENSE=$(local_or_name "$DENSE") EVAL=$(local_or_name "$EVAL") OUT=$(absolute_path "$OUT")
texts=()
while IFS= read -r text; do texts+=("$text"); done < <(local_texts "${TEXT:-c4}")
cd "$root"
if ! smoke_mode "$@"; then
    require MODEL "a checkpoint folder or hub name"
    require DENSE "the dense model"
fi
make_venv requirements.txt
sizes=(--max_train_tokens "$TOKENS")
if smoke_mode "$@"; then
    sizes=(--max_train_tokens 384 --max_length 64 --val_dataset_size 2 --logging_steps 1 --extra_val_seqlen 32 --eval_seqlens 32)
    if [ -z "$MODEL" ] || [ -z "$DENSE" ] || [ -z "$TEXT" ] || [ -z "$EVAL" ]; then
        smoke_inputs
        MODEL=${MODEL:-$smoke_model} DENSE=${DENSE:-$smoke_model} EVAL=${EVAL:-wiki=$smoke_data/evaluation.txt}
        [ -n "$TEXT" ] || texts=("$cache/wiki.calibration.txt")
    fi
fi

command=(model_finetune.py --model_name_or_path "$MODEL" --distill_from "$DENSE" --train_text "${texts[@]}"
    --train "$TRAIN" --bf16 true "${sizes[@]}" --extra_val_set "${EVAL:-wikitext2}" --save_strategy no --output_dir "$OUT")
launcher=(.venv/bin/python)
if [ "$NPROC" -gt 1 ]; then
    launcher=(.venv/bin/torchrun "--nproc_per_node=$NPROC" --nnodes=1)
    command+=(--deepspeed configs/deepspeed.json)
fi
# Set by prune_in_rounds.sh. One process checks for all, with the flags of each.
if [ -n "${CHECK_ONLY:-}" ]; then exec .venv/bin/python "${command[@]}" $FLAGS --check_only true; fi
mkdir -p "$(dirname "$OUT")"
"${launcher[@]}" "${command[@]}" $FLAGS 2>&1 | tee -i "$OUT.log"
