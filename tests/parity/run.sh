#!/usr/bin/env bash
# Is ours the same function as the published ImageReward? Both score the same images from the same full-size file
# (random weights), each in its own environment; fails unless scores, rankings, pixels and gradients agree.
#
#   bash tests/parity/run.sh        about 15 minutes on two cores; needs 8 GB of memory and 6 GB of disk
#
# Exit code 77: skipped, with the reason in the last line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

skip() {
  echo "parity: SKIPPED: $1"
  exit 77
}
free_gib=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
((free_gib >= 6)) || skip "$free_gib GiB of disk are free here, 6 are needed"
memory_gib=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || echo 8)
((memory_gib >= 7)) || skip "$memory_gib GiB of memory are free, 7 are needed"
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
  skip "the published package needs Python 3.11 to 3.13; this is $(python3 --version)"

source ./environment.sh requirements.txt
original=$PWD/.venv-parity
stamp=$original/installed-$(cksum <tests/parity/requirements.txt | tr ' ' '-')
if [[ ! -f $stamp ]]; then
  echo "installing the published package into .venv-parity (a few minutes the first time)"
  rm -rf "$original"
  python3 -m venv "$original"
  pip() { "$original/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
  "$original/bin/python" -m pip download --quiet --no-deps --dest "$original" image-reward==1.5 ||
    skip "the package index cannot be reached (pip's message is above)"
  pip -r tests/parity/requirements.txt
  # The older setuptools last: openai-clip imports a part of it that newer ones lack, and torch asks for a newer one.
  pip setuptools==69.5.1 2>/dev/null
  touch "$stamp"
fi

work=$(mktemp -d "$original/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
run() { # run SIDE COMMAND: in that side's environment
  local python=$PYTHON
  [[ $1 == original ]] && python=$original/bin/python
  "$python" tests/parity/parity.py "$2" "$work" "$1"
}
echo "writing a full-size ImageReward.pt with random weights"
"$PYTHON" tests/parity/parity.py prepare "$work"
for side in original ours; do run $side answers; done
for side in original ours original ours; do
  echo "timing $side"
  run $side costs
done
"$PYTHON" tests/parity/parity.py compare "$work"
