#!/usr/bin/env bash
# Stage 1: prune about 20 % of the block weights of a model, with an incremental pruning ratio.
#
#   MODEL=meta-llama/Llama-2-7b-hf OUT=out/p20 bash scripts/prune.sh
#   bash scripts/prune.sh --smoke      trial run with few short samples (default MODEL: SmolLM2-135M)
set -euo pipefail
MODEL=${MODEL:-}                       # checkpoint folder or hub name
DATA=${DATA:-}                         # wikitext2, c4, alpaca, gpt4_alpaca (default: c4), or a text file
EVAL=${EVAL:-}                         # wikitext2 (default), ptb, a file, or NAME=FILE
OUT=${OUT:-out/pruned}                 # written: OUT/, OUT/pruned_weights/, OUT.ppl
MAX_SPARSITY=${MAX_SPARSITY:-0.25}     # ratio of the last layer; that of the first is 0.0625
NUM_SAMPLES=${NUM_SAMPLES:-128} SEQLEN=${SEQLEN:-2048} EVAL_SEQLENS=${EVAL_SEQLENS:-128 2048}

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
source "$root/scripts/env.sh"
MODEL=$(local_or_name "$MODEL") DATA=$(local_or_name "$DATA") EVAL=$(local_or_name "$EVAL") OUT=$(absolute_path "$OUT")
cd "$root"
smoke_mode "$@" || require MODEL "a checkpoint folder or hub name"
make_venv requirements.txt
if smoke_mode "$@"; then
    NUM_SAMPLES=8 SEQLEN=64 EVAL_SEQLENS=32
    if [ -z "$MODEL" ] || [ -z "$DATA" ] || [ -z "$EVAL" ]; then
        smoke_inputs
        MODEL=${MODEL:-$smoke_model} DATA=${DATA:-$cache/wiki.calibration.txt} EVAL=${EVAL:-wiki=$smoke_data/evaluation.txt}
    fi
fi

data=("${DATA:-c4}")
[ -f "$DATA" ] && data=(--data_file "$DATA")
mkdir -p "$(dirname "$OUT")"
.venv/bin/python model_slimming.py "$MODEL" "${data[@]}" \
    --num_samples "$NUM_SAMPLES" --seqlen "$SEQLEN" --percdamp 0 --non_uniform --non_uniform_strategy log_increase \
    --min_sparsity 0.0625 --max_sparsity "$MAX_SPARSITY" --eval_datasets "${EVAL:-wikitext2}" --eval_seqlens $EVAL_SEQLENS \
    --save_pruned_weights --save_dir "$OUT" --resume 2>&1 | tee -i "$OUT.ppl"
