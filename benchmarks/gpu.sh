#!/usr/bin/env bash
# Check and measure training on a GPU, in at most eight minutes, without network; see gpu.py.
#
#   bash benchmarks/gpu.sh                  results go to benchmarks/results/gpu, which is there to be committed
#   bash benchmarks/gpu.sh --size tiny      with tiny models, also without a GPU
#   bash benchmarks/gpu.sh --help           all options
#
# Uses $PYTHON, or the active python. Nothing is installed: what is missing is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
missing=$("$python" - <<'EOF'
from importlib.util import find_spec
needed = "torch diffusers transformers accelerate peft safetensors tensorboard numpy PIL tqdm tyro matplotlib jinja2"
print(*(name for name in needed.split() if not find_spec(name)))
EOF
)
if [[ -n $missing ]]; then
  echo "error: $("$python" --version) lacks $missing. Install them, or put them on PYTHONPATH." >&2
  exit 2
fi
exec "$python" benchmarks/gpu.py "$@"
