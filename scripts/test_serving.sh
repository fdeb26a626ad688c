#!/usr/bin/env bash
# Creates environments with a prebuilt vLLM, a prebuilt llama.cpp, and torchao, bitsandbytes and llm-compressor,
# and compares what they generate, and the perplexity of quantised weights, with Transformers.
#
#   bash scripts/test_serving.sh                 all of them
#   bash scripts/test_serving.sh -m vllm         one: vllm, llama_cpp or quantisation; any arguments of pytest
#
# SmolLM2-135M is cached in $SLIMGPT_CACHE (default: ~/.cache/slimgpt).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_venv requirements-dev.txt
make_engine_venv .venv-llamacpp requirements-llamacpp.txt
make_engine_venv .venv-vllm requirements-vllm.txt torchvision torchaudio torchcodec
make_engine_venv .venv-quantisation requirements-quantisation.txt
fetch_smollm2
exec .venv/bin/python -m pytest -m "llama_cpp or vllm or quantisation" "$@"
