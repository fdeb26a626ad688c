#!/usr/bin/env bash
# Prune in rounds: in each, remove a part of the block weights and recover with the dense model as teacher. Every round
# removes the same share of what is left, RATIO in total.
#
#   MODEL=meta-llama/Llama-3.2-1B RATIO=0.5 ROUNDS=2 OUT=out/half bash scripts/prune_in_rounds.sh
# Run again with the same settings, it continues after the last finished part.
#   bash scripts/prune_in_rounds.sh --smoke    trial run with few short samples and steps (default MODEL: SmolLM2-135M)
set -euo pipefail
MODEL=${MODEL:-}                       # dense checkpoint folder or hub name
DATA=${DATA:-}                         # calibration: wikitext2, c4, alpaca, gpt4_alpaca (default: c4), or a text file
TEXT=${TEXT:-}                         # as in recover.sh (default: c4)
EVAL=${EVAL:-}                         # wikitext2 (default), ptb, a file, or NAME=FILE
RATIO=${RATIO:-0.5} ROUNDS=${ROUNDS:-2}
TOKENS=${TOKENS:-1e6}                  # tokens of each recovery; every round goes on in the text
TRAIN=${TRAIN:-block_weights}          # lora, block_weights, scales, all
OUT=${OUT:-out/rounds}                 # written: OUT/pruned_1, OUT/recovered_1, …; the last OUT/recovered_N is the result
                                       # (with TRAIN=lora its lora_fused_model)
NUM_SAMPLES=${NUM_SAMPLES:-128} SEQLEN=${SEQLEN:-2048} NPROC=${NPROC:-1}
FLAGS=${FLAGS:-}                       # more flags of model_slimming.py, e.g. "--preset best"

root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
source "$root/scripts/env.sh"
check_count NPROC "$NPROC"
MODEL=$(local_or_name "$MODEL") DATA=$(local_or_name "$DATA") EVAL=$(local_or_name "$EVAL") OUT=$(absolute_path "$OUT")
pushd "$root" > /dev/null
smoke_mode "$@" || require MODEL "a checkpoint folder or hub name"
make_venv requirements.txt
smoke='' window=512
if smoke_mode "$@"; then
    NUM_SAMPLES=8 SEQLEN=64 TOKENS=384 window=64 smoke=--smoke
    if [ -z "$MODEL" ] || [ -z "$DATA" ] || [ -z "$TEXT" ] || [ -z "$EVAL" ]; then
        smoke_inputs
        MODEL=${MODEL:-$smoke_model} EVAL=${EVAL:-wiki=$smoke_data/evaluation.txt}
        DATA=${DATA:-$cache/wiki.calibration.txt} TEXT=${TEXT:-$cache/wiki.calibration.txt}
    fi
fi
popd > /dev/null

data=("${DATA:-c4}")
[ -f "$DATA" ] && data=(--data_file "$DATA")
# The share of a round, and its tokens as an integer.
numbers=$("$root/.venv/bin/python" -c '
import sys
ratio, rounds, tokens = float(sys.argv[1]), int(sys.argv[2]), int(float(sys.argv[3]))
if not (0 < ratio < 1 and rounds >= 1 and tokens >= int(sys.argv[4])):
    sys.exit(1)
print(f"{1 - (1 - ratio) ** (1 / rounds):.6f} {tokens}")
' "$RATIO" "$ROUNDS" "$TOKENS" "$window" 2> /dev/null) || {
    echo "prune_in_rounds.sh: error: RATIO $RATIO, ROUNDS $ROUNDS, TOKENS $TOKENS: a ratio is between 0 and 1," \
        "rounds are at least 1, tokens at least $window" >&2
    exit 2
}
read -r share tokens <<< "$numbers"
# recover ROUND MODEL: the recovery of a round.
recover() {
    # Assignments before a command see the ones to their left.
    DENSE=$MODEL MODEL=$2 TEXT=$TEXT TOKENS=$TOKENS TRAIN=$TRAIN EVAL=$EVAL NPROC=$NPROC \
        FLAGS="--overwrite true --skip_train_tokens $((($1 - 1) * tokens))" OUT="$OUT/recovered_$1" \
        bash "$root/scripts/recover.sh" $smoke
}
texts=$(local_texts "$TEXT" | paste -sd " " -)
settings="MODEL=$MODEL DATA=$DATA TEXT=$texts RATIO=$RATIO ROUNDS=$ROUNDS TOKENS=$TOKENS TRAIN=$TRAIN FLAGS=$FLAGS"
settings+=" NUM_SAMPLES=$NUM_SAMPLES SEQLEN=$SEQLEN"
# Until a part is finished, such as after a wrong MODEL, settings may change.
begun=$(cat "$OUT/settings" 2> /dev/null || true)
if [ -f "$OUT/pruned_1/run.json" ] && [ "$begun" != "$settings" ]; then
    echo "prune_in_rounds.sh: error: OUT $OUT was begun with ${begun:-other settings}; choose another OUT" >&2
    exit 2
fi
# What a recovery would refuse is refused before the first pruning.
CHECK_ONLY=1 recover 1 "$MODEL"
mkdir -p "$OUT"
echo "$settings" > "$OUT/settings"
current=$MODEL
for round in $(seq "$ROUNDS"); do
    pruned=$OUT/pruned_$round recovered=$OUT/recovered_$round
    # Written last: the output is complete.
    if [ ! -f "$pruned/run.json" ]; then
        (cd "$root" && .venv/bin/python model_slimming.py "$current" "${data[@]}" --num_samples "$NUM_SAMPLES" \
            --seqlen "$SEQLEN" --seed "$round" --target_ratio "$share" --allocation log_increase --skip_evaluate \
            --save_pruned_weights --save_dir "$pruned" --resume $FLAGS 2>&1 | tee -i "$pruned.log")
    fi
    if ! grep -qs '"finished": true' "$recovered/run.json"; then
        recover "$round" "$pruned/pruned_weights"
    fi
    current=$recovered
    if [ -d "$recovered/lora_fused_model" ]; then current=$recovered/lora_fused_model; fi
done
