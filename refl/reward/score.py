"""Scores of image files from the shell: python -m refl score "a red fox" *.png"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from refl.preflight import doctor
from refl.reward import imagereward
from refl.system import devices
from refl.system.errors import UserError

import torch
import tyro
from tqdm import tqdm

MEMORY_ADVICE = "Try a lower --batch_size, another GPU, or --device cpu."


@dataclass
class Options:
    """Score images for a prompt, best first."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What the images should show."""
    images: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="")
    ]
    """Image files."""
    reward_path: str = "checkpoint"
    """Folder of ImageReward.pt (or .safetensors), med_config.json and bert-base-uncased/."""
    device: str | None = None
    """"cuda", "cuda:1", "cpu", ...; None: a GPU if there is one."""
    batch_size: int = 8
    """Images scored at once."""


@torch.no_grad()
def main() -> None:
    """A table of the images named on the command line."""
    options = tyro.cli(Options, prog="python -m refl score", use_underscores=True)
    if not options.images:
        raise UserError("name one image or more, after the prompt.")
    if options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size}: must be 1 or more.")
    if missing := [path for path in options.images if not Path(path).is_file()]:
        raise UserError(f"no such image: {', '.join(missing)}.")
    doctor.check_reward(options.reward_path)
    scorer = imagereward.load(options.reward_path, devices.find(options.device))

    scored, unreadable = [], []
    with tqdm(total=len(options.images), desc="scoring", unit="image", leave=False, delay=2) as bar:
        for start in range(0, len(options.images), options.batch_size):
            readable, pixels = [], []
            for path in options.images[start : start + options.batch_size]:
                try:
                    pixels.append(imagereward.preprocess_pil(path, scorer.image_size))
                    readable.append(path)
                except UserError as error:
                    unreadable.append(str(error))
                bar.update()
            if readable:
                scores = scorer.score_pixels(
                    torch.cat(pixels).to(scorer.device), [options.prompt] * len(pixels)
                )
                scored += zip(scores.tolist(), readable, strict=True)
    print("rank   score  image")
    for place, (score, path) in enumerate(sorted(scored, key=lambda pair: -pair[0]), 1):
        print(f"{place:4}  {score:+.3f}  {path}")
    if unreadable:
        raise UserError(" ".join(unreadable))
