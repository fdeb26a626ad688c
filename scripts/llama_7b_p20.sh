#!/usr/bin/env bash
# LLaMA-7B with 20 % of the block weights removed: prune, recover with LoRA, evaluate before and after, count.
#
#   bash scripts/llama_7b_p20.sh
#   bash scripts/llama_7b_p20.sh --smoke    trial run with few steps (default MODEL: SmolLM2-135M)
set -euo pipefail
MODEL=${MODEL:-}                       # default: huggyllama/llama-7b from the hub
DATA=${DATA:-}                         # calibration: a data set (default: c4) or a text file
SFT_DATA=${SFT_DATA:-}                 # instructions: a json file, or hub name (default: alpaca)
TASK_DATA=${TASK_DATA:-}               # folder of local task files (default: from the hub)
EVAL=${EVAL:-}                         # text for perplexity: wikitext2 (default), ptb, a file, or NAME=FILE
OUT=${OUT:-out/llama_7b_p20}           # written: OUT, OUT.ppl, OUT_sft, OUT_sft.log, OUT_*.json
NPROC=${NPROC:-1}                      # processes of the LoRA run, one per GPU

scripts=$(realpath "$(dirname "${BASH_SOURCE[0]}")")
source "$scripts/env.sh"
check_count NPROC "$NPROC"
[ "${1:-}" = --smoke ] || MODEL=${MODEL:-huggyllama/llama-7b}
OUT=$(absolute_path "$OUT")

MODEL=$MODEL DATA=$DATA EVAL=$EVAL OUT=$OUT bash "$scripts/prune.sh" "$@"
pruned=$OUT/pruned_weights fused=${OUT}_sft/lora_fused_model
MODEL=$pruned DATA=$TASK_DATA OUT=${OUT}_zero_shot.json bash "$scripts/evaluate.sh" "$@"
MODEL=$pruned DATA=$SFT_DATA EVAL=$EVAL OUT=${OUT}_sft NPROC=$NPROC bash "$scripts/finetune.sh" "$@"
MODEL=$fused DATA=$TASK_DATA OUT=${OUT}_sft_zero_shot.json bash "$scripts/evaluate.sh" "$@"
MODEL=$MODEL DATA=$fused OUT=${OUT}_flops.json bash "$scripts/flops.sh" "$@"
