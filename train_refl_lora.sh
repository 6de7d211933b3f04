#!/usr/bin/env bash
# Train with the weights under checkpoint/, on two GPUs (one if there is one, the CPU if there is none).
#
#   bash train_refl_lora.sh                                   as below
#   bash train_refl_lora.sh --learning_rate=3e-05 --rank 8    any option of refl_lora.py; the last one given wins
#   bash train_refl_lora.sh --preset published                options from presets/published.json; --help lists more
#   CUDA_VISIBLE_DEVICES=6,7 bash train_refl_lora.sh          choose the GPUs
#   NUM_PROCESSES=1 bash train_refl_lora.sh                   choose how many processes
#   bash train_refl_lora.sh --main_process_port 29501         choose the port (a free one is found otherwise)
#   bash train_refl_lora.sh --num_machines 2 --machine_rank 0 --main_process_ip HOST --main_process_port 29501
#                                                             on each of two machines, 0 and 1; HOST is machine 0
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# $PYTHON if it is set; otherwise the active environment or the .venv of demo/run.sh, the first with the requirements.
find='from importlib.util import find_spec as f; import sys; sys.exit(not all(map(f, ("accelerate", "peft", "tyro"))))'
for python in ${PYTHON:-python "$here/.venv/bin/python"}; do
  if "$python" -c "$find" 2>/dev/null; then ready=yes && break; fi
done
if [[ -z ${ready:-} ]]; then
  echo "error: the requirements are not installed. Run: pip install -r $here/requirements.txt" >&2
  exit 2
fi

# Options of the launcher are taken out; all others go to refl_lora.py.
main_process_port=0 main_process_ip='' num_machines=1 machine_rank=0
options=(--learning_rate=1e-04 --grad_scale 0.01)
# A file of options may have its own values of these; where it has none, refl_lora.py has the same defaults.
if [[ " $* " == *" --options"[_-]"file"* || " $* " == *" --preset"* ]]; then options=(); fi
while (($#)); do
  name=${1%%=*}
  name=${name#--} name=${name//-/_}
  case $name in
    main_process_port | main_process_ip | num_machines | machine_rank)
      if [[ $1 == *=* ]]; then value=${1#*=}; elif (($# > 1)); then value=$2 && shift; else value=''; fi
      if [[ -z $value ]]; then
        echo "error: --$name needs a value" >&2
        exit 2
      fi
      printf -v "$name" %s "$value"
      ;;
    *) options+=("$1") ;;
  esac
  shift
done
for name in main_process_port num_machines machine_rank; do
  if ! [[ ${!name} =~ ^[0-9]{1,5}$ ]]; then
    echo "error: --$name ${!name}: must be a whole number of at most five digits" >&2
    exit 2
  fi
  printf -v "$name" %d "$((10#${!name}))" # 08 is not octal
done
if ((main_process_port > 65535)); then
  echo "error: --main_process_port $main_process_port: must be below 65536" >&2
  exit 2
fi
if ((num_machines < 1 || machine_rank >= num_machines)); then
  echo "error: --machine_rank $machine_rank of --num_machines $num_machines: ranks are counted from 0" >&2
  exit 2
fi
if ((num_machines > 1)) && { ((main_process_port == 0)) || [[ -z $main_process_ip ]]; }; then
  echo "error: --num_machines $num_machines needs --main_process_ip and --main_process_port, the same on all machines" >&2
  exit 2
fi

# Variables of a launcher that are left over from another program would make the processes wait for others.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT

# Errors in the options are reported here, once, before anything is launched.
for option in "${options[@]}"; do
  if [[ $option == --help || $option == -h ]]; then exec "$python" "$here/refl_lora.py" --help; fi
done
"$python" "$here/refl_lora.py" --check "${options[@]}"

# The visible GPUs and the precision that suits them, as torch sees them: only CUDA knows the order and the names in
# CUDA_VISIBLE_DEVICES. Asked in a process of its own, so that none of those that train has started CUDA before.
gpus=0 precision=no
if nvidia-smi -L >/dev/null 2>&1; then
  ask='import torch; from refl.system.devices import best_precision; print(torch.cuda.device_count(), best_precision())'
  read -r gpus precision < <(PYTHONPATH=$here "$python" -c "$ask")
fi
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
processes=${NUM_PROCESSES:-$((gpus < 2 ? (gpus > 0 ? gpus : 1) : 2))}
if ((gpus > 0)); then most=$gpus what="the number of visible GPUs"; else most=$((4 * cores)) what="4 per processor"; fi
if ! [[ $processes =~ ^[1-9][0-9]{0,4}$ ]] || ((processes > most)); then
  echo "error: NUM_PROCESSES=$processes: must be a number from 1 to $most, $what" >&2
  exit 2
fi
if ((gpus == 0)); then
  precision=no
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
fi

# One process needs no launcher. Without a GPU, --multi_gpu starts several processes over gloo; --cpu would start one.
# Every setting is given, so that none comes from the user's `accelerate config`.
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
if ((processes * num_machines == 1)); then
  ACCELERATE_MIXED_PRECISION=$precision exec "$python" "$here/refl_lora.py" "${options[@]}"
fi
exec "$python" -m refl launch --multi_gpu --gpu_ids all --num_processes $((processes * num_machines)) \
  --num_machines "$num_machines" --machine_rank "$machine_rank" --main_process_ip "${main_process_ip:-127.0.0.1}" \
  --main_process_port "$main_process_port" --mixed_precision "$precision" --dynamo_backend no \
  "$here/refl_lora.py" "${options[@]}"
