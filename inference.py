"""Pictures of Stable Diffusion as it is: the "before" of inference_lora.py, with the same options and seeds.

python inference.py                                  -> result/sd14/0.png, 1.png, ...
python inference.py --prompt "a red fox" --seed 7 --num_images_per_prompt 1
"""

from dataclasses import dataclass

import tyro

from refl import doctor, drawing
from refl.errors import run_as_command


@dataclass
class Options(drawing.DrawingOptions):
    """Draw pictures with Stable Diffusion as it is; inference_lora.py draws the same ones with a LoRA."""

    output_dir: str = "result/sd14"
    """Where the pictures go: 0.png, 1.png, ..."""


def main() -> None:
    """Options, pipeline, pictures."""
    options = tyro.cli(Options, use_underscores=True)
    doctor.check_weights(options.pretrained_model_name_or_path, None)
    prompts = drawing.check(options)
    pipeline = drawing.pipeline(options)
    paths = drawing.draw_to_files(pipeline, prompts, options, options.output_dir, "drawing")
    print(f"{len(paths)} pictures in {options.output_dir}")


if __name__ == "__main__":
    run_as_command(main)
