"""How well cheaper decoders keep the direction of d reward / d x0; and a tiny decoder for any model.

python benchmarks/decoders.py                                           # the demo world: a table of cosines
python benchmarks/decoders.py --tiny_decoder_path result/tiny_decoder   # first distils one, if none is there

x0 are those of training: the base model's, by rollouts of 8 steps to every stop that training may draw. A
cosine is that of one image's gradient with the exact decoder's; the table has means over images.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import refl_lora
from refl.model.conditioning import Conditioning
from refl.model.stable_diffusion import decode, vae_factor
from refl.model.tiny_decoder import load_tiny_decoder
from refl.system import randomness
from refl.system.files import write_whole
from refl.system.prompts import read_prompts
from refl.train.batches import MicroBatch
from refl.train.models import Models, load_models
from refl.train.options import Options as TrainingOptions
from refl.train.plan import Plan, possible_plans

import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderTiny
from torch import Tensor
from tqdm import trange

BATCH = 16
DISTILLATION, COSINES = 0, 1  # seeds of the noise


@dataclass
class Options:
    """Compare decoders by the gradients that they give; distil a tiny one."""

    pretrained_model_name_or_path: str = "demo/checkpoint/stable-diffusion-v1-4"
    """Folder of the text-to-image model."""
    reward_path: str = "demo/checkpoint"
    """Folder of the reward."""
    prompts: str = "demo/prompts/train.txt"
    """Prompts of the images."""
    num_inference_steps: int = 20
    """As in training."""
    min_stop: int = 8
    """As in training."""
    max_stop: int = 17
    """As in training."""
    guidance_scale: float = 5.0
    """As in training."""
    num_images: int = 64
    """Images for the cosines."""
    tiny_decoder_path: str | None = None
    """Folder of a tiny decoder; if there is none, one is distilled there."""
    width: int = 32
    """Channels of the distilled decoder; TAESD has 64."""
    blocks: int = 1
    """Residual blocks before each upsampling of the distilled decoder; TAESD has 3."""
    distillation_images: int = 1024
    """x0 to distil from."""
    distillation_steps: int = 1500
    """Batches of 16 of them."""
    output: str = "result/benchmarks/decoders.md"
    """Markdown file of the table."""


def batches(
    options: Options, models: Models, number: int, seed: int
) -> Iterator[tuple[int, MicroBatch, Tensor]]:
    """Yield (stop, micro-batch, x0) for about `number` images, in equal parts at each stop."""
    prompts = read_prompts(options.prompts)
    empty, *embeds = models.base.encode_prompts(["", *prompts])
    empty = empty if options.guidance_scale != 1 else None
    plans = list(possible_plans(_training(options), models.schedule))
    shape = models.base.latent_shape(models.base.unet.config.sample_size * vae_factor(models.base.vae))
    size = min(BATCH, -(-number // len(plans)))
    for index in trange(-(-number // size), desc="x0", mininterval=5):
        plan: Plan = plans[index % len(plans)]
        chosen = [(index * size + i) * 7919 % len(prompts) for i in range(size)]  # a prime: prompts vary
        noise = randomness.noise((seed, index), range(size), (len(plan.timesteps), *shape))
        conditioning = Conditioning.stack([embeds[i] for i in chosen], empty)
        batch = MicroBatch([prompts[i] for i in chosen], conditioning, noise, plan)
        [trajectory] = refl_lora.rollout(models, [batch])
        yield plan.terms[0].stop, batch, trajectory.state.x0


def _training(options: Options) -> TrainingOptions:
    names = "pretrained_model_name_or_path reward_path num_inference_steps min_stop max_stop guidance_scale"
    return TrainingOptions(**{name: getattr(options, name) for name in names.split()}, rollout_steps=8)


def distil(options: Options, models: Models) -> None:
    """Train a tiny decoder to decode x0 as the VAE does, by the mean absolute and squared error of pixels."""
    found = [x0 for *_, x0 in batches(options, models, options.distillation_images, DISTILLATION)]
    latents = torch.cat(found)
    with torch.no_grad():
        images = torch.cat([models.base.decode(part) for part in latents.split(BATCH)])
    upsamplings = len(models.base.vae.config.block_out_channels) - 1
    blocks = (*[options.blocks] * upsamplings, 1)
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        decoder_block_out_channels=(options.width,) * len(blocks),
        encoder_block_out_channels=(8,) * len(blocks),
        num_decoder_blocks=blocks,
        num_encoder_blocks=(1,) * len(blocks),
        latent_channels=latents.shape[1],
    )
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, options.distillation_steps)
    for _ in (bar := trange(options.distillation_steps, desc="distillation", mininterval=5)):
        chosen = torch.randint(len(latents), (BATCH,))
        error = decode(tiny, latents[chosen]) - images[chosen]
        loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    tiny.save_pretrained(options.tiny_decoder_path)


def cosines(options: Options, models: Models) -> dict[str, dict[int, list[float]]]:
    """Cosines of each image's gradient with the exact one, by decoder and stop."""
    exact, factor = models.base, vae_factor(models.base.vae)
    side = exact.unet.config.sample_size
    decoders = {
        f"{share * side // 8 * factor} pixels": replace(exact, decode_side=share * side // 8)
        for share in (7, 6, 4)
    }
    if options.tiny_decoder_path:
        tiny = load_tiny_decoder(options.tiny_decoder_path, torch.float32, "cpu")
        decoders["tiny decoder"] = replace(exact, tiny_decoder=tiny)
    found = {name: {} for name in decoders}
    for stop, batch, x0 in batches(options, models, options.num_images, COSINES):
        _, expected = refl_lora.x0_gradient(models, batch, x0, 1.0, None, len(x0))
        for name, base in decoders.items():
            _, gradient = refl_lora.x0_gradient(replace(models, base=base), batch, x0, 1.0, None, len(x0))
            own = F.cosine_similarity(gradient.flatten(1), expected.flatten(1)).tolist()
            found[name].setdefault(stop, []).extend(own)
    return found


def main() -> None:
    """Distil if need be, then write the table."""
    options = tyro.cli(Options, use_underscores=True)
    models = load_models(_training(options), torch.device("cpu"), torch.float32)
    folder = options.tiny_decoder_path
    if folder and not Path(folder, "config.json").exists():
        distil(options, models)
    found = cosines(options, models)
    stops = sorted(next(iter(found.values())))
    lines = ["| decoder | " + " | ".join(f"stop {stop}" for stop in stops) + " | all |"]
    lines.append("|---|" + "---|" * (len(stops) + 1))
    for name, by_stop in found.items():
        columns = [*(by_stop[stop] for stop in stops), [cosine for own in by_stop.values() for cosine in own]]
        lines.append(f"| {name} | " + " | ".join(f"{sum(own) / len(own):.2f}" for own in columns) + " |")
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
