#!/usr/bin/env bash
# Stage 2: recover a pruned model with LoRA on instructions.
#
#   MODEL=out/pruned/pruned_weights OUT=out/sft NPROC=2 bash scripts/finetune.sh
#   bash scripts/finetune.sh --smoke   trial run with three short steps (default MODEL: SmolLM2-135M)
set -euo pipefail
MODEL=${MODEL:-}                       # checkpoint folder, usually the pruned_weights of a run
DATA=${DATA:-}                         # json or jsonl file, or hub name (default: alpaca)
EVAL=${EVAL:-}                         # wikitext2 (default), ptb, a file, or NAME=FILE
OUT=${OUT:-out/sft}                    # written: OUT/ (adapters), OUT/lora_fused_model/, OUT.log
NPROC=${NPROC:-1}                      # processes, one per GPU; DeepSpeed if more than one
FLAGS=${FLAGS:-}                       # more flags, e.g. "--resume_from_checkpoint true"

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
source "$root/scripts/env.sh"
check_count NPROC "$NPROC"
MODEL=$(local_or_name "$MODEL") DATA=$(local_or_name "$DATA") EVAL=$(local_or_name "$EVAL") OUT=$(absolute_path "$OUT")
cd "$root"
smoke_mode "$@" || require MODEL "a checkpoint folder or hub name"
make_venv requirements.txt
sizes=(--per_device_train_batch_size 16 --gradient_accumulation_steps $((4 / NPROC > 0 ? 4 / NPROC : 1)) --warmup_steps 10
    --num_train_epochs 1 --logging_steps 50 --eval_steps 100 --max_length 256)
if smoke_mode "$@"; then
    sizes=(--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --warmup_steps 1 --max_steps 3
        --logging_steps 1 --eval_steps 2 --max_length 64 --val_dataset_size 4 --extra_val_seqlen 32 --eval_seqlens 32)
    if [ -z "$MODEL" ] || [ -z "$DATA" ] || [ -z "$EVAL" ]; then
        smoke_inputs
        MODEL=${MODEL:-$smoke_model} DATA=${DATA:-$smoke_data/alpaca.jsonl} EVAL=${EVAL:-wiki=$smoke_data/evaluation.txt}
    fi
fi

launcher=(.venv/bin/python)
if [ "$NPROC" -gt 1 ]; then
    launcher=(.venv/bin/torchrun "--nproc_per_node=$NPROC" --nnodes=1)
    sizes+=(--deepspeed configs/deepspeed.json)
fi
mkdir -p "$(dirname "$OUT")"
"${launcher[@]}" model_finetune.py --model_name_or_path "$MODEL" \
    --data_path "${DATA:-alpaca}" --bf16 true "${sizes[@]}" --lr_scheduler_type cosine \
    --learning_rate 1e-4 --logging_first_step true --evaluation_strategy steps --cache_dataset false --optim adamw_hf \
    --extra_val_set "${EVAL:-wikitext2}" --use_lora true --is_mask_training false --output_dir "$OUT" $FLAGS \
    2>&1 | tee -i "$OUT.log"
