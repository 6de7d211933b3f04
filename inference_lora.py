"""Images of Stable Diffusion with a LoRA, and beside them those without it, from the same noise.

python inference_lora.py     -> result/refl_lora/0.png, 1.png, ..., grid.png (before and after), rewards.json
python inference_lora.py --lora_path other.safetensors --lora_scale 0.8 --prompt "a red fox"
"""

import json
from dataclasses import dataclass
from pathlib import Path

from refl.model import drawing
from refl.model.folder import required_files
from refl.model.lora import read_metadata
from refl.model.pipeline import load_lora
from refl.report.sheets import pairs
from refl.reward import rewards
from refl.system.errors import UserError, run_as_command
from refl.system.files import require, write_whole
from refl.system.images import save_image, to_tensor

import torch
import tyro
from PIL import Image
from torch import Tensor

PAIRS_A_ROW, MAX_PAIRS = 5, 40  # of grid.png


@dataclass
class Options(drawing.LoraOptions, drawing.DrawingOptions):
    """Draw images with a LoRA, and the same ones without it; show them side by side with their rewards."""

    lora_path: str = "checkpoint/refl_lora"
    """A LoRA for this model, file or folder: ours, diffusers' or kohya's format."""
    compare: bool = True
    """Draw the images without the LoRA as well, for grid.png."""
    reward: str = "imagereward"
    """The reward shown with the images, if its weights are there: as in training, one or a weighted sum."""
    reward_path: str = "checkpoint"
    """Folder of ImageReward.pt (or .safetensors), med_config.json and bert-base-uncased/."""
    output_dir: str = "result/refl_lora"
    """Where the images go: 0.png, 1.png, ..., grid.png, rewards.json."""


def main() -> None:
    """Options, pipeline, images with and without the LoRA, rewards, grid."""
    # ---- options
    options = tyro.cli(Options, use_underscores=True)
    require(required_files(options.pretrained_model_name_or_path))
    rewards.parse(options.reward)  # raises for a wrong name
    metadata = read_metadata(options.lora_path)
    options = drawing.settle(options, [options.lora_path])
    if (
        metadata.get("reward", options.reward) != options.reward
    ):  # shown only: a file must not name code to run
        print(f"note: this LoRA was trained for --reward {metadata['reward']}")
    prompts = drawing.check(options)

    # ---- models
    pipeline = drawing.pipeline(options)
    load_lora(pipeline, options.lora_path, options.lora_scale, options.lora_in_uncond)
    scorers = None
    try:
        scorers = rewards.load(options.reward, options.reward_path, pipeline.device, torch.float32)
    except UserError as error:
        print(f"no rewards shown: {error}")

    # ---- images: after, then before; those of the grid are kept
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    kept, scores = {"before": [], "after": []}, {"before": [], "after": []}
    wanted = [prompt for prompt in prompts for _ in range(options.num_images_per_prompt)]
    for side in ("after", "before") if options.compare else ("after",):
        if side == "before":
            pipeline.disable_lora()
        drawn = drawing.draw(pipeline, prompts, options, f"drawing {side}")
        for index, (image, prompt) in enumerate(zip(drawn, wanted, strict=True)):
            if side == "after":
                save_image(image, output / f"{index}.png")
            if scorers:
                try:
                    scores[side].append(score(scorers, image, prompt, pipeline.device))
                except UserError as error:
                    print(f"no rewards shown: {error}")
                    scorers = None
            if index < MAX_PAIRS:
                kept[side].append(image)
    print(f"{len(wanted)} images in {output}")

    # ---- rewards
    scores = {side: torch.stack(found, dim=1) for side, found in scores.items() if found and scorers}
    totals = {side: scorers.total(found).tolist() for side, found in scores.items()}
    if scores:
        means = {side: sum(total) / len(wanted) for side, total in totals.items()}
        print(f"{options.reward}: " + ", ".join(f"{side} {mean:+.3f}" for side, mean in means.items()))
        each = {side: scorers.means(found) for side, found in scores.items()}
        images = [
            {"file": f"{index}.png", "prompt": prompt, "seed": options.seed + index}
            | {side: total[index] for side, total in totals.items()}
            for index, prompt in enumerate(wanted)
        ]
        report = {"reward": options.reward, "mean": means, "mean_of_each": each, "images": images}
        write_whole(output / "rewards.json", json.dumps(report, indent=2) + "\n")

    # ---- grid: before above after
    if options.compare:
        captions = {
            side: [
                f"{side}  " + (f"{totals[side][index]:+.2f}  " if totals else "") + wanted[index]
                for index in range(len(images))
            ]
            for side, images in kept.items()
        }
        save_image(pairs(kept, captions, PAIRS_A_ROW), output / "grid.png")
        print(f"before and after: {output / 'grid.png'}")


@torch.no_grad()
def score(scorers: rewards.WeightedRewards, image: Image.Image, prompt: str, device: torch.device) -> Tensor:
    """Each reward's score of one image for its prompt, (K,)."""
    return scorers(to_tensor(image)[None].to(device), [prompt])[:, 0].cpu()


if __name__ == "__main__":
    run_as_command(main, drawing.memory_advice)
