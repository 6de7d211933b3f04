#!/usr/bin/env bash
# Make the environment on a fresh machine, lint, test.
#
#   bash tests/run.sh                    the default tier: about 5 minutes on two cores
#   bash tests/run.sh --all              every test: about 20 minutes on two cores
#   bash tests/run.sh -k step            any option of pytest
#   bash tests/run.sh --full-size        one training step at the real sizes: SD-1.4 and ImageReward, random weights;
#                                        needs 12 GB of memory and 4 GB of disk
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./environment.sh requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=1  # tiny models: a second thread costs more than it brings

if [[ ${1:-} == --full-size ]]; then
  shift
  exec "$PYTHON" -m pytest tests/full_size.py -s "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
