"""Generate images with a LoRA, and from the same noise without it, side by side with their rewards.

python inference_lora.py     -> result/refl_lora/0.png, 1.png, ..., grid.png (before and after), rewards.json
python inference_lora.py --lora_path other.safetensors --lora_scale 0.8 --prompt "a red fox"

The guidance is the one that the LoRA's file names. "Before" is the base model at this guidance, and also at
that of inference.py if that is another.
"""

from refl.system.streams import protect_streams

if __name__ == "__main__":
    protect_streams()  # before the imports, which take seconds

import json
from dataclasses import dataclass, replace

from refl.model import drawing
from refl.model.folder import required_files
from refl.model.lora import read_metadata
from refl.model.pipeline import load_lora
from refl.report import outputs
from refl.report.sheets import pairs
from refl.reward import rewards
from refl.system.errors import UserError, run_as_command
from refl.system.files import require, writing
from refl.system.images import ImageWriter, to_png, to_tensor
from refl.system.options import read as read_options
from refl.system.ownership import OutputFolder, locks_released, take
from refl.system.text import printable

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

PAIRS_PER_ROW, MAX_PAIRS = 5, 40  # in grid.png


@dataclass
class Options(drawing.LoraOptions, drawing.DrawingOptions):
    """Generate images with and without a LoRA; show them side by side with their rewards."""

    lora_path: str = "checkpoint/refl_lora"
    """LoRA for this model, a file or a folder, in diffusers' or kohya's format."""
    compare: bool = True
    """Also generate the images without the LoRA, for grid.png: at its guidance and --base_guidance_scale."""
    reward: str = "imagereward"
    """Reward shown with the images if its weights are available: one or a weighted sum, as in training."""
    reward_path: str = "checkpoint"
    """Folder of the rewards' files, placed as in checkpoint/README.md."""
    output_dir: str = "result/refl_lora"
    """Folder of the images, 0.png, 1.png, ..., and of grid.png and rewards.json."""


@locks_released()
def main() -> None:
    """Read the options, load the models, generate images with and without the LoRA, score and show them."""
    # ---- options
    options = read_options(Options)
    require(required_files(options.pretrained_model_name_or_path))
    rewards.parse(options.reward)  # raises for a wrong name
    metadata = read_metadata(options.lora_path)
    [guidance] = drawing.find_guidance(options, [options.lora_path])
    options = drawing.apply_trained_settings(options, [options.lora_path])
    trained_for = metadata.get("reward", options.reward)
    if trained_for != options.reward:  # not used instead: a file must not name code to run
        print(f"note: this LoRA was trained for --reward {printable(trained_for)}")
    prompts = drawing.check(options)
    prompt_of_image = [prompt for prompt in prompts for _ in range(options.num_images_per_prompt)]
    output = take(options.output_dir, outputs.DRAWN)
    output.check([f"{index}.png" for index in range(len(prompt_of_image))] + ["grid.png", "rewards.json"])

    # ---- models
    pipeline = drawing.pipeline(options)
    load_lora(pipeline, options.lora_path, options.lora_scale, options.lora_in_uncond)
    scorers = None
    try:
        scorers = rewards.load(options.reward, options.reward_path, pipeline.device, torch.float32)
    except UserError as error:
        print(f"no rewards shown: {printable(error)}")

    # ---- images: after, then before, without the LoRA
    sides = find_sides(guidance, options)
    images, scores = {side: [] for side in sides}, dict.fromkeys(sides)
    for side, scale in reversed(sides.items()):
        if side != "after":
            pipeline.disable_lora()
        guided = replace(options, guidance_scale=scale)
        images[side], scores[side] = generate(side, pipeline, prompts, guided, scorers, output)
        if scores[side] is None:
            scorers = None
    print(f"{len(prompt_of_image)} images in {output.path}")

    # ---- rewards
    totals = {}
    if scorers:
        totals = {side: scorers.total(each).tolist() for side, each in scores.items()}
        report = summarise(scorers, scores, totals, prompt_of_image, options)
        means = "; ".join(f"{side}: {mean:+.3f}" for side, mean in report["mean"].items())
        print(f"{options.reward}: {means}")
        with writing(output.path):
            output.write("rewards.json", json.dumps(report, indent=2) + "\n")

    # ---- grid: before above after, the prompt below both
    if options.compare:
        captions = {}
        for side, scale in sides.items():
            label = f"{side.partition(',')[0]}, guidance {scale:g}"
            captions[side] = [
                label
                + (f": {totals[side][index]:+.2f}" if totals else "")
                + (f"\n{prompt_of_image[index]}" if side == "after" else "")
                for index in range(len(images[side]))
            ]
        with writing(output.path):
            grid = output.write("grid.png", to_png(pairs(images, captions, PAIRS_PER_ROW)))
        print(f"before and after: {grid}")


def find_sides(guidance: float, options: Options) -> dict[str, float]:
    """What to draw, from top to bottom of the grid, and the guidance of each."""
    sides, base = {}, options.base_guidance_scale
    if options.compare and base not in (None, guidance):
        sides[f"before, guidance {base:g}"] = base
    if options.compare:
        sides["before"] = guidance
    return sides | {"after": guidance}


def generate(
    side: str, pipeline: StableDiffusionPipeline, prompts: list[str], options: Options,
    scorers: rewards.WeightedRewards | None, output: OutputFolder,
) -> tuple[list[Image.Image], Tensor | None]:  # fmt: skip
    """Generate all images of one side; save those of "after".

    Returns the first `MAX_PAIRS` images, and the scores of all (K, N); None without a working reward.
    """
    images, scores = [], []
    prompt_of_image = [prompt for prompt in prompts for _ in range(options.num_images_per_prompt)]
    drawn = drawing.draw(pipeline, prompts, options, f"drawing {side}")
    with ImageWriter(output) as writer:
        for index, (image, prompt) in enumerate(zip(drawn, prompt_of_image, strict=True)):
            if side == "after":
                writer.write(image, f"{index}.png")
            if index < MAX_PAIRS:
                images.append(image)
            if scorers:
                scores.append(score(scorers, image, prompt, pipeline.device))
                scorers = None if scores[-1] is None else scorers
    return images, torch.stack(scores, dim=1) if scorers else None


@torch.no_grad()
def score(
    scorers: rewards.WeightedRewards, image: Image.Image, prompt: str, device: torch.device
) -> Tensor | None:
    """Each reward's score of one image for its prompt, (K,); None, with a message, if a reward fails."""
    try:
        scores = scorers(to_tensor(image)[None].to(device), [prompt])  # (K, 1)
        scorers.finite_total(scores)
        return scores[:, 0].cpu()
    except UserError as error:
        print(f"no rewards shown: {printable(error)}")
        return None


def summarise(
    scorers: rewards.WeightedRewards, scores: dict[str, Tensor], totals: dict[str, list[float]],
    prompt_of_image: list[str], options: Options,
) -> dict:  # fmt: skip
    """Content of rewards.json: mean rewards by side, and the rewards of each image."""
    return {
        "reward": options.reward,
        "mean": {side: sum(total) / len(total) for side, total in totals.items()},
        "mean_of_each": {side: scorers.means(each) for side, each in scores.items()},
        "images": [
            {"file": f"{index}.png", "prompt": prompt, "seed": options.seed + index}
            | {side: total[index] for side, total in totals.items()}
            for index, prompt in enumerate(prompt_of_image)
        ],
    }


if __name__ == "__main__":
    run_as_command(main, drawing.memory_advice)
