#!/usr/bin/env bash
# Do other versions of diffusers and peft draw with our LoRAs what we draw? Each has an environment of its own, which
# borrows torch from ours.
#
#   bash tests/clients/run.sh        about a minute with the first installation
#
# Exit code 77: skipped, with the reason in the last line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source ./environment.sh requirements.txt
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore

install() { # install FOLDER PACKAGE...: ahead of the packages of $PYTHON once the folder is in PYTHONPATH
  local folder=$1 && shift
  if command -v uv >/dev/null; then
    uv pip install --quiet --no-deps --python "$PYTHON" --target "$folder" "$@"
  else
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$@"
  fi
}
clients=.venv-clients
mkdir -p "$clients"
while read -r name packages; do
  folder=$clients/$name stamp=$clients/$name/installed-$(cksum <<<"$packages" | tr ' ' '-')
  [[ -f $stamp && $name != latest ]] && continue
  rm -rf "$folder"
  # shellcheck disable=SC2086  # a list of words
  if ! install "$folder" $packages; then
    echo "clients: SKIPPED: $packages cannot be installed (the message is above)"
    exit 77
  fi
  touch "$stamp"
done <<'LIST'
0.32 diffusers==0.32.1 peft==0.15.2 transformers==4.49.0 tokenizers==0.21.0 huggingface_hub==0.29.3
0.35 diffusers==0.35.2 peft==0.17.1 transformers==4.56.2 tokenizers==0.22.1 huggingface_hub==0.35.3
latest diffusers peft
LIST

work=$(mktemp -d "$clients/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$PYTHON" tests/clients/make.py "$work"
for name in 0.32 0.35 latest; do
  PYTHONPATH=$PWD/$clients/$name "$PYTHON" tests/clients/draw.py "$work" || failed=yes
done
if [[ -n ${failed:-} ]]; then
  echo "clients: FAILED"
  exit 1
fi
echo "clients: passed"
