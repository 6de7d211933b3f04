"""Draw with the LoRAs of make.py and compare, in any environment with diffusers: nothing of refl is imported.

python draw.py FOLDER; exit code 1 if a LoRA does not load, or if an image differs.
"""

import sys
from pathlib import Path

import diffusers
import peft
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

MODEL = Path(__file__).resolve().parents[2] / "demo/checkpoint/stable-diffusion-v1-4"
TOLERANCE = 1e-4  # of images in [0, 1]; float rounding, other kernels
READS_ALPHA = (0, 35)  # the version of diffusers from which it reads the alpha of a checkpoint


def draw(lora=None):
    """The image (3, H, W) with a LoRA's file."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        MODEL, text_encoder=None, tokenizer=None, safety_checker=None, requires_safety_checker=False
    )  # the text is encoded already: transformers 4 and 5 name the text encoder's weights differently
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    inputs = load_file(FOLDER / "inputs.safetensors")
    return pipeline(**inputs, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images[0]


FOLDER = Path(sys.argv[1])
torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
versions = f"diffusers {diffusers.__version__}, peft {peft.__version__}"
is_old = tuple(map(int, diffusers.__version__.split(".")[:2])) < READS_ALPHA
base, failed = load_file(FOLDER / "base.safetensors")["image"][0], False
for file in sorted(FOLDER.glob("*/*.safetensors")):
    is_raw = file.name == "checkpoint.safetensors" and file.parent.name != "alpha_1_rank"
    if file.name == "image.safetensors" or (is_old and is_raw):
        continue
    ours = load_file(file.parent / "image.safetensors")["image"][0]
    try:
        difference = (draw(file) - ours).abs().max().item()
        effect = (ours - base).abs().max().item()
        is_same = difference < TOLERANCE < effect / 100
        text = f"differs by {difference:.1e} (the LoRA changes {effect:.2f})"
    except Exception as error:  # whatever a version raises
        is_same, text = False, f"{type(error).__name__}: {error}"
    failed |= not is_same
    print(f"{'ok' if is_same else 'FAIL':<5}{versions}  {file.parent.name}/{file.name}: {text}", flush=True)
sys.exit(int(failed))
