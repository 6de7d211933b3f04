# Sourced by demo/run.sh and tests/run.sh: $PYTHON becomes a Python with the given requirements files installed.
# Makes .venv on the first run; later runs find it as it should be. Set PYTHON to use an environment of your own.
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
