#!/usr/bin/env bash
# Are our rewards the same functions as the published ones? Both score the same images from the same full-size files
# (random weights), each in its own environment; fails unless scores, rankings, pixels and gradients agree.
#
#   bash tests/parity/run.sh                all of them, one after the other
#   bash tests/parity/run.sh imagereward    about 15 minutes on two cores; needs 8 GB of memory and 6 GB of disk
#   bash tests/parity/run.sh pickscore      about 3 minutes; 12 GB of memory, 6 GB of disk; so do the next two
#   bash tests/parity/run.sh hpsv2          about 3 minutes
#   bash tests/parity/run.sh clip           with both aesthetic predictors; about 2 minutes
#
# Exit code 77: skipped, with the reason in the last line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

skip() {
  echo "parity: SKIPPED: $1"
  exit 77
}
need() { # need DISK MEMORY: GiB
  local disk memory
  disk=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  ((disk >= $1)) || skip "$disk GiB of disk are free here, $1 are needed"
  memory=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || echo "$2")
  ((memory >= $2)) || skip "$memory GiB of memory are free, $2 are needed"
}
originals() { # originals FOLDER REQUIREMENTS FINISH PIP-OPTION...: an environment of its own for published packages
  local requirements=$2 finish=$3
  original=$PWD/$1
  shift 3
  local stamp
  stamp=$original/installed-$(cksum <"$requirements" | tr ' ' '-')
  [[ ! -f $stamp ]] || return 0
  echo "installing the published packages into $original (minutes the first time)"
  rm -rf "$original"
  python3 -m venv "$original"
  pip download --no-deps --dest "$original" "$(grep -m1 == "$requirements")" ||
    skip "the package index cannot be reached (pip's message is above)"
  pip install "$@" -r "$requirements"
  "$finish"
  touch "$stamp"
}
pip() { "$original/bin/python" -m pip "$1" --quiet --disable-pip-version-check "${@:2}"; }
run() { # run SIDE SCRIPT ARGUMENT...: in that side's environment
  local python=$PYTHON
  [[ $1 == original ]] && python=$original/bin/python
  "$python" "tests/parity/$2" "${@:3}"
}

older_setuptools() { # last: openai-clip imports a part of it that newer ones lack, and torch asks for a newer one
  pip install setuptools==69.5.1 2>/dev/null
}
imagereward() {
  need 6 7
  python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
    skip "the published package needs Python 3.11 to 3.13; this is $(python3 --version)"
  originals .venv-parity tests/parity/requirements.txt older_setuptools
  work=$(mktemp -d "$original/work.XXXXXX")
  echo "writing a full-size ImageReward.pt with random weights"
  run ours parity.py prepare "$work"
  for side in original ours; do run $side parity.py answers "$work" $side; done
  for side in original ours original ours; do
    echo "timing $side"
    run $side parity.py costs "$work" $side
  done
  run ours parity.py compare "$work"
}

our_libraries() { # of which the originals use those that they do not bring
  local packages='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$PYTHON" -c "$packages" >"$("$original/bin/python" -c "$packages")/ours.pth"
}
clips() { # clips NAME
  need 6 12
  originals .venv-parity-clip tests/parity/requirements-clip.txt our_libraries --no-deps
  work=$(mktemp -d "$original/work.XXXXXX")
  echo "writing full-size files for $1 with random weights"
  run original clips.py prepare "$work" "$1"
  for side in original ours; do
    echo "scoring, $side"
    run $side clips.py $side "$work" "$1"
  done
  run ours clips.py compare "$work" "$1"
}

source ./environment.sh requirements.txt
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
work=
trap '[[ -z $work ]] || rm -rf "$work"' EXIT
for name in "${@:-imagereward pickscore hpsv2 clip}"; do
  for one in $name; do
    case $one in
      imagereward) imagereward ;;
      pickscore | hpsv2 | clip) clips "$one" ;;
      *) echo "parity: $one is not one of imagereward, pickscore, hpsv2, clip" >&2; exit 2 ;;
    esac
    rm -rf "$work"
  done
done
