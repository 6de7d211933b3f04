#!/usr/bin/env bash
# Everything the project promises, checked: makes its environment on a fresh machine, lints, tests.
#
#   bash tests/run.sh                    the whole suite
#   bash tests/run.sh -k step            any option of pytest
#   bash tests/run.sh --full-size        one training step at the real sizes: SD-1.4 and ImageReward, random weights;
#                                        needs 12 GB of memory and 4 GB of disk
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./environment.sh requirements.txt tests/requirements.txt

if [[ ${1:-} == --full-size ]]; then
  shift
  exec "$PYTHON" -m pytest tests/full_size.py -s "$@"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest tests "$@"
