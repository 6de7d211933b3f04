"""Score image files for a prompt: python -m refl score "a red fox" *.png"""

import sys
from dataclasses import dataclass
from typing import Annotated

from refl.reward import rewards
from refl.system import devices, streams
from refl.system.errors import UserError
from refl.system.images import read_image
from refl.system.options import read as read_options
from refl.system.prompts import check_prompt
from refl.system.reading import exists

import torch
import tyro
from tqdm import tqdm

MEMORY_ADVICE = "Try a lower --batch_size, another GPU, or --device cpu."


@dataclass
class Options:
    """Score images for a prompt and list them, best first."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]
    """What the images should show."""
    images: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="")
    ]
    """Image files."""
    reward: str = "imagereward"
    """The reward, as in training: one or a weighted sum."""
    reward_path: str = "checkpoint"
    """Folder of the rewards' files, placed as in checkpoint/README.md."""
    device: str | None = None
    """"cuda", "cuda:1", "cpu", ...; None: a GPU if there is one."""
    batch_size: int = 8
    """Images scored at once."""


def main() -> None:
    """Print a table of the images named on the command line."""
    options = read_options(Options, prog="python -m refl score")
    if not options.images:
        raise UserError("name one image or more, after the prompt.")
    check_prompt(options.prompt, "PROMPT")
    if options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size}: must be 1 or more.")
    if missing := [path for path in options.images if not exists(path)]:
        raise UserError(f"no such image: {', '.join(missing)}.")
    device = devices.find(options.device)
    devices.set_tf32(False)
    scorers = rewards.load(options.reward, options.reward_path, device, torch.float32)

    scored, unreadable = [], []
    starts = range(0, len(options.images), options.batch_size)
    for start in tqdm(starts, "scoring", unit="batch", leave=False, delay=2):
        paths, images = [], []
        for path in options.images[start : start + options.batch_size]:
            try:
                images.append(read_image(path))
                paths.append(path)
            except UserError as error:
                unreadable.append(str(error))
        if images:
            scored += zip(scorers.score(images, options.prompt, device).tolist(), paths, strict=True)
    print("rank   score  image")
    for rank, (score, path) in enumerate(sorted(scored, key=lambda pair: -pair[0]), 1):
        print(f"{rank:4}  {score:+.3f}  {path}")
    sys.stdout.flush()
    if "stdout" in streams.lost:  # here it is the result
        raise UserError(f"standard output could not be written: {streams.lost['stdout']}.")
    if scales := rewards.scales(options.reward):
        print(scales, file=sys.stderr)
    if unreadable:
        raise UserError(" ".join(unreadable))
