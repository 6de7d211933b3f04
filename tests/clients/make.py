"""Write LoRAs of the demo's model as training leaves them, and the images that this program draws with them.

python make.py FOLDER; draw.py, next to it, reads the folder in an environment with other versions.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from refl.model.lean import make_lean
from refl.model.lora import KOHYA_FILE, LORA_FILE, add_lora, export_lora, pack_lora, to_kohya
from refl.model.pipeline import load_pipeline

import torch
from safetensors.torch import save_file

MODEL = ROOT / "demo/checkpoint/stable-diffusion-v1-4"
RANK, RATIOS = 4, (1.0, 0.5, 1.5)  # alpha / rank


def main() -> None:
    """Write inputs.safetensors, base.safetensors and a folder for each alpha."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(MODEL, "ddim", torch.float32, "cpu")
    with torch.no_grad():
        embeds, empty = pipeline.encode_prompt("a red circle", "cpu", 1, True)
    unet, random = pipeline.unet, torch.Generator().manual_seed(1)
    side = unet.config.sample_size
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=random)
    inputs = {"prompt_embeds": embeds, "negative_prompt_embeds": empty, "latents": latents}
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder / "inputs.safetensors")

    def draw() -> dict[str, torch.Tensor]:
        images = pipeline(**inputs, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
        return {"image": images.contiguous()}

    save_file(draw(), folder / "base.safetensors")
    for ratio in RATIOS:
        matrices = add_lora(unet, RANK, ratio * RANK, seed=0)
        with torch.no_grad():
            for matrix in matrices:
                matrix.copy_(0.3 * torch.randn(matrix.shape, generator=random))
        make_lean(unet)
        trained = pack_lora(unet, {"rank": RANK})
        result = export_lora(trained)
        files = {LORA_FILE: result, KOHYA_FILE: to_kohya(result, "demo"), "checkpoint.safetensors": trained}
        own = folder / f"alpha_{ratio:g}_rank"
        own.mkdir(exist_ok=True)
        for name, content in files.items():
            (own / name).write_bytes(content)
        save_file(draw(), own / "image.safetensors")
        unet.delete_adapters("default")


if __name__ == "__main__":
    main()
