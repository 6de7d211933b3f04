"""Generate images with Stable Diffusion, without a LoRA: the "before" of inference_lora.py.

python inference.py                                  -> result/sd14/0.png, 1.png, ...
python inference.py --prompt "a red fox" --seed 7 --num_images_per_prompt 1

Both scripts take the same options, and the same seed gives the same noise.
"""

from refl.system.streams import protect_streams

if __name__ == "__main__":
    protect_streams()  # before the imports, which take seconds

from dataclasses import dataclass

from refl.model import drawing
from refl.model.folder import required_files
from refl.report import outputs
from refl.system.errors import run_as_command
from refl.system.files import require
from refl.system.images import ImageWriter
from refl.system.options import read as read_options
from refl.system.ownership import locks_released, take


@dataclass
class Options(drawing.DrawingOptions):
    """Generate images with Stable Diffusion; inference_lora.py generates the same ones with a LoRA."""

    output_dir: str = "result/sd14"
    """Folder of the images: 0.png, 1.png, ..."""


@locks_released()
def main() -> None:
    """Read the options, load the pipeline, generate the images."""
    options = read_options(Options)
    require(required_files(options.pretrained_model_name_or_path))
    prompts = drawing.check(options)
    number = len(prompts) * options.num_images_per_prompt
    output = take(options.output_dir, outputs.DRAWN)
    output.check([f"{index}.png" for index in range(number)])
    pipeline = drawing.pipeline(options)
    with ImageWriter(output) as writer:
        for index, image in enumerate(drawing.draw(pipeline, prompts, options, "drawing")):
            writer.write(image, f"{index}.png")
    print(f"{number} images in {output.path}")


if __name__ == "__main__":
    run_as_command(main, drawing.memory_advice)
