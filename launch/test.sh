#!/usr/bin/env bash
# Everything that must hold before a change is accepted. Arguments go to pytest: `bash launch/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 # tests start processes of their own; more threads would only fight over the cores

echo "[1/4] Environment"
bash launch/setup.sh
echo "[2/4] Lint and format (ruff)"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "[3/4] Types (mypy; the first run takes a minute or two)"
.venv/bin/mypy
echo "[4/4] Tests (pytest) after ${SECONDS} s"
exec .venv/bin/python -m pytest --disable-warnings --durations=10 "$@"
