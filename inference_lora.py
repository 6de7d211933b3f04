"""Pictures of Stable Diffusion with a LoRA, and beside them those without it, from the same noise.

python inference_lora.py     -> result/refl_lora/0.png, 1.png, ..., grid.png (before and after), rewards.json
python inference_lora.py --lora_path other.safetensors --lora_scale 0.8 --prompt "a red fox"
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from refl import board, diffusion, doctor, drawing
from refl.errors import UserError, run_as_command
from refl.rewards import REWARDS

PAIRS_A_ROW, MAX_PAIRS = 5, 40  # of grid.png


@dataclass
class Options(drawing.DrawingOptions):
    """Draw pictures with a LoRA, and the same ones without it; show them side by side with their rewards."""

    lora_path: str = "checkpoint/refl_lora"
    """A LoRA for this model, file or folder: ours, diffusers' or kohya's format."""
    lora_scale: float = 1.0
    """How much of the LoRA to apply; 0 is the model as it is."""
    compare: bool = True
    """Draw the pictures without the LoRA as well, for grid.png."""
    reward: str = "imagereward"
    """The reward shown with the pictures, if its weights are there."""
    reward_path: str = "checkpoint"
    """Folder of ImageReward.pt, med_config.json and bert-base-uncased/."""
    output_dir: str = "result/refl_lora"
    """Where the pictures go: 0.png, 1.png, ..., grid.png, rewards.json."""


def main() -> None:
    """Options, pipeline, pictures with and without the LoRA, rewards, grid."""
    # ---- options
    options = tyro.cli(Options, use_underscores=True)
    doctor.check_weights(options.pretrained_model_name_or_path, None)
    prompts = drawing.check(options)
    if options.reward not in REWARDS:
        raise UserError(f"--reward {options.reward}: known rewards are {', '.join(REWARDS)}.")
    metadata = diffusion.read_metadata(options.lora_path)
    for name in ("guidance_scale", "sampler", "resolution"):
        asked = getattr(options, name)
        if name in metadata and asked is not None and asked != metadata[name]:
            print(f"note: this LoRA was trained with --{name} {metadata[name]}, drawing with {asked}")

    # ---- pictures
    pipeline = drawing.pipeline(options)
    diffusion.load_lora(pipeline, options.lora_path, options.lora_scale)
    after = drawing.draw_to_files(pipeline, prompts, options, options.output_dir, "drawing with the LoRA")
    print(f"{len(after)} pictures in {options.output_dir}")
    if not options.compare:
        return
    pipeline.disable_lora()
    before = list(drawing.draw(pipeline, prompts, options, "drawing without it"))
    prompts = [prompt for prompt in prompts for _ in range(options.num_images_per_prompt)]

    # ---- rewards
    pictures = {"before": before, "after": [board.read_picture(path) for path in after]}
    rewards = {}
    try:
        doctor.check_weights(options.pretrained_model_name_or_path, options.reward_path)
        reward = REWARDS[options.reward](options.reward_path, pipeline.device, torch.float32)
    except UserError as error:
        print(f"no rewards shown: {error}")
    else:
        rewards = {side: score(reward, side_pictures, prompts) for side, side_pictures in pictures.items()}
        means = {side: sum(values) / len(values) for side, values in rewards.items()}
        print(f"{options.reward}: before {means['before']:+.3f}, after {means['after']:+.3f}, ", end="")
        print(f"difference {means['after'] - means['before']:+.3f}")
        rows = [
            {"file": path.name, "prompt": prompt, "seed": options.seed + index}
            | {side: values[index] for side, values in rewards.items()}
            for index, (path, prompt) in enumerate(zip(after, prompts, strict=True))
        ]
        partial = Path(options.output_dir, "rewards.json.partial")
        partial.write_text(json.dumps({"mean": means, "pictures": rows}, indent=2) + "\n")
        partial.replace(partial.with_suffix(""))

    # ---- grid: before above after
    sheet, captions = [], []
    for start in range(0, min(len(prompts), MAX_PAIRS), PAIRS_A_ROW):
        for side, side_pictures in pictures.items():
            chunk = range(start, min(start + PAIRS_A_ROW, len(prompts), MAX_PAIRS))
            sheet.append([board.to_pil(side_pictures[index]) for index in chunk])
            captions.append(
                [
                    f"{side} {rewards[side][index]:+.2f}  {prompts[index]}"
                    if rewards
                    else f"{side}  {prompts[index]}"
                    for index in chunk
                ]
            )
    path = Path(options.output_dir, "grid.png")
    board.save_picture(board.grid(sheet, captions), path)
    print(f"before and after: {path}")


@torch.no_grad()
def score(reward, pictures: list[Tensor], prompts: list[str]) -> list[float]:
    """The reward of each picture (3, H, W) in [0, 1] for its prompt."""
    device = next(reward.parameters()).device
    return [
        reward(picture[None].to(device), [prompt]).item()
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]


if __name__ == "__main__":
    run_as_command(main)
