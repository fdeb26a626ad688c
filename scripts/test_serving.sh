#!/usr/bin/env bash
# Creates an environment with a prebuilt vLLM and one with a prebuilt llama.cpp, and compares their greedy generation with
# that of Transformers.
#
#   bash scripts/test_serving.sh                 both engines
#   bash scripts/test_serving.sh -m vllm         a single engine, vllm or llama_cpp; any arguments of pytest
#
# SmolLM2-135M is cached in $SLIMGPT_CACHE (default: ~/.cache/slimgpt).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_venv requirements-dev.txt
make_engine_venv .venv-llamacpp requirements-llamacpp.txt
make_engine_venv .venv-vllm requirements-vllm.txt torchvision torchaudio torchcodec
fetch_smollm2
exec .venv/bin/python -m pytest -m "llama_cpp or vllm" "$@"
