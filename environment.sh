# Sourced by demo/run.sh and tests/run.sh: sets $PYTHON to a Python with the given requirements files installed.
# Creates .venv on the first run and reuses it later. Set PYTHON to use an environment of your own.
if [[ -z ${PYTHON:-} ]]; then
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  PYTHON=$root/.venv/bin/python
  for requirements in "$@"; do
    stamp=$root/.venv/installed-$(cksum <"$requirements" | tr ' ' '-')
    [[ -f $stamp ]] && continue
    echo "installing $requirements into .venv (a few minutes the first time)"
    [[ -x $PYTHON ]] || python3 -m venv "$root/.venv" || return 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" || return 1
    touch "$stamp"
  done
fi
export PYTHON
