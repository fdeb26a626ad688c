#!/usr/bin/env bash
# Creates .venv with the pinned packages if missing, checks style and types, and runs the tests.
#
#   bash scripts/test.sh                      the default tier: no GPU, no slow tests
#   bash scripts/test.sh -m slow              slow tests: quick start and recipes on SmolLM2-135M, DeepSpeed
#   bash scripts/test.sh -m library -n 2      transformers' interfaces on a pruned model of every family
#   bash scripts/test.sh -m gpu               tests that need a CUDA device
#   bash scripts/test.sh -m lowest            unit tests with the oldest versions that pyproject.toml allows
#   bash scripts/test.sh tests/unit -k plan   any arguments of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_venv requirements-dev.txt
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy --no-error-summary
# The default tier runs in parallel, one core per process; other tiers run serially.
if [ $# -eq 0 ]; then
    export OMP_NUM_THREADS=1
    set -- -n 2 --dist worksteal
fi
exec .venv/bin/python -m pytest "$@"
