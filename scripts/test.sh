#!/usr/bin/env bash
# Makes .venv with the pinned packages where it is missing, then checks style and types and runs the tests.
#
#   bash scripts/test.sh                      everything that needs neither a GPU nor minutes
#   bash scripts/test.sh -m slow              the slow tests: the quick start on the real small model
#   bash scripts/test.sh -m gpu               the tests that need a CUDA device
#   bash scripts/test.sh -m lowest            unit tests with the oldest versions that pyproject.toml allows
#   bash scripts/test.sh tests/unit -k plan   any arguments of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
make_venv requirements-dev.txt
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy --no-error-summary
# The default tier is many small processes, one core each; anything else runs alone.
if [ $# -eq 0 ]; then
    export OMP_NUM_THREADS=1
    set -- -n 2 --dist worksteal
fi
exec .venv/bin/python -m pytest "$@"
