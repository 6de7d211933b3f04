#!/usr/bin/env bash
# Run everything on the bundled demo world: install, train with two processes on the CPU, draw before and after.
#
#   bash demo/run.sh                          minutes on two cores; results in result/demo/
#   bash demo/run.sh --max_train_steps 50     any option of refl_lora.py except --output_dir
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./environment.sh requirements.txt
started=$SECONDS

# Tiny models need other settings than SD-1.4; the code is the same.
export CUDA_VISIBLE_DEVICES= NUM_PROCESSES=${NUM_PROCESSES:-2}
bash train_refl_lora.sh \
  --pretrained_model_name_or_path demo/checkpoint/stable-diffusion-v1-4 --reward_path demo/checkpoint \
  --prompts demo/prompts/train.txt --validation_prompts demo/prompts/held_out.txt \
  --num_inference_steps 20 --min_stop 8 --max_stop 17 \
  --train_batch_size 8 --decode_batch_size 8 --gradient_accumulation_steps 1 --max_train_steps 300 \
  --learning_rate 2e-3 --lr_scheduler cosine --rank 8 --validation_steps 100 --num_validation_images 8 \
  "$@" --output_dir result/demo/refl_lora
trained=$SECONDS
for option in "$@"; do
  if [[ $option == --help || $option == -h || $option == --check ]]; then exit 0; fi
done

# Compare before and after on held-out prompts, by the reward and by the oracle, which training never uses.
PYTHONPATH=demo OMP_NUM_THREADS=1 "$PYTHON" evaluate.py \
  --pretrained_model_name_or_path demo/checkpoint/stable-diffusion-v1-4 --reward_path demo/checkpoint \
  --prompts demo/prompts/held_out.txt --num_images_per_prompt 2 --batch_size 48 --as_trained \
  --held_out_reward judge:all_right,judge:colour,judge:shape,judge:background \
  --lora_paths result/demo/refl_lora --output_dir result/demo/evaluation
echo "trained for $((trained - started)) s, $((SECONDS - started)) s in all"
echo "images:      result/demo/evaluation/grid.png"
echo "model card:  result/demo/refl_lora/README.md"
echo "curves:      $PYTHON -m tensorboard.main --logdir result/demo/refl_lora/logs"
