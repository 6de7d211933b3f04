#!/usr/bin/env bash
# Run everything on the bundled demo world: install, train with two processes on the CPU, draw before and after.
#
#   bash demo/run.sh                          minutes on two cores; results in result/demo/
#   bash demo/run.sh --max_train_steps 50     any option of refl_lora.py except --output_dir
#   GUIDANCES=5,7.5 bash demo/run.sh          draw with fewer guidances
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./environment.sh requirements.txt
started=$SECONDS

# Tiny models need other settings than SD-1.4; the code is the same.
export CUDA_VISIBLE_DEVICES= NUM_PROCESSES=${NUM_PROCESSES:-2}
model=(--pretrained_model_name_or_path demo/checkpoint/stable-diffusion-v1-4 --reward_path demo/checkpoint)
bash train_refl_lora.sh "${model[@]}" \
  --prompts demo/prompts/train.txt --validation_prompts demo/prompts/held_out.txt \
  --num_inference_steps 20 --min_stop 8 --max_stop 17 \
  --train_batch_size 8 --decode_batch_size 8 --gradient_accumulation_steps 1 --max_train_steps 200 \
  --learning_rate 2e-3 --lr_scheduler cosine --rank 8 --validation_steps 100 --num_validation_images 8 \
  "$@" --output_dir result/demo/refl_lora
trained=$SECONDS
for option in "$@"; do
  if [[ $option == --help || $option == -h || $option == --check ]]; then exit 0; fi
done

# Compare before and after on held-out prompts, each at every guidance and at its best, by the reward and by the oracle,
# which reads pixels.
export PYTHONPATH=demo OMP_NUM_THREADS=1
launch=("$PYTHON")
if ((NUM_PROCESSES > 1)); then
  launch+=(-m refl launch --multi_gpu --num_processes "$NUM_PROCESSES" --main_process_port 0)
fi
"${launch[@]}" evaluate.py "${model[@]}" \
  --prompts demo/prompts/held_out.txt --num_images_per_prompt 2 --batch_size 64 \
  --sweep_guidance "${GUIDANCES:-1,2,3,5,7.5}" \
  --sampler ddpm --num_inference_steps 20 --lora_paths result/demo/refl_lora --output_dir result/demo/evaluation \
  --held_out_reward judge:all_right,judge:clean,judge:colour,judge:shape,judge:background
"$PYTHON" demo/verdicts.py result/demo/evaluation
echo "trained for $((trained - started)) s, $((SECONDS - started)) s in all"
echo "images:      result/demo/evaluation/grid.png"
echo "model card:  result/demo/refl_lora/README.md"
echo "curves:      $PYTHON -m tensorboard.main --logdir result/demo"
