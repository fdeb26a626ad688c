#!/usr/bin/env bash
# Makes an environment with a prebuilt llama.cpp and compares what it generates with Transformers.
#
#   bash scripts/test_serving.sh
#
# SmolLM2-135M is fetched into $SLIMGPT_CACHE (default: ~/.cache/slimgpt) the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_venv requirements-dev.txt
if [ ! -e .venv-llamacpp/.installed ]; then
    "${PYTHON:-python3}" -m venv .venv-llamacpp
    .venv-llamacpp/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-llamacpp.txt
    touch .venv-llamacpp/.installed
fi
fetch_smollm2
exec .venv/bin/python -m pytest -m llama_cpp "$@"
