"""The models that a training step computes with."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from refl.model import families, offload
from refl.model.compile import compile_unet
from refl.model.conditioning import Conditioning
from refl.model.guidance import predict
from refl.model.lean import make_lean
from refl.model.lora import add_lora
from refl.model.noise_schedule import NoiseSchedule
from refl.model.stable_diffusion import vae_factor
from refl.model.tiny_decoder import load_tiny_decoder
from refl.reward import rewards
from refl.reward.rewards import WeightedRewards
from refl.train.options import Options

import torch
from torch import Tensor, nn


@dataclass
class Models:
    """Everything a step computes with. Only `lora`, matrices inside the UNet, is trained."""

    base: families.Family
    lora: list[nn.Parameter]
    rewards: WeightedRewards
    schedule: NoiseSchedule
    guidance: tuple[float, float] = (1.0, 1.0)  # scale in the rollout, and at the step that gets the gradient
    lora_in_uncond: bool = True
    held_out: WeightedRewards | None = None
    on_device: Callable[..., AbstractContextManager] = lambda *models: nullcontext()
    """Context manager that moves offloaded models to the GPU."""

    def predict(
        self, latents: Tensor, timestep: int, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """The network's output at a training timestep, (B, C, h, w), guided unless the scale is 1."""
        [output] = self.predict_together([(latents, timestep, conditioning, guidance_scale)])
        return output

    def predict_together(self, inputs: Sequence[tuple[Tensor, int, Conditioning, float]]) -> list[Tensor]:
        """The outputs of `predict` for several batches; those of one guidance scale share a call."""
        outputs = {}
        for scale in dict.fromkeys(scale for *_, scale in inputs):
            own = [i for i, (*_, other) in enumerate(inputs) if other == scale]
            latents, timesteps, conditioning = zip(*(inputs[i][:3] for i in own), strict=True)
            timesteps = [
                x.new_full(x.shape[:1], t, dtype=torch.int64) for x, t in zip(latents, timesteps, strict=True)
            ]
            output = predict(
                self.base,
                torch.cat(latents),
                torch.cat(timesteps),
                Conditioning.cat(conditioning),
                scale,
                self.lora_in_uncond,
            )
            outputs |= zip(own, output.split([len(x) for x in latents]), strict=True)
        return [outputs[i] for i in range(len(inputs))]

    @property
    def lora_up(self) -> list[nn.Parameter]:
        """The matrices B of the LoRA, which adds B A x."""
        return [matrix for name, matrix in self.base.unet.named_parameters() if "lora_B" in name]


def load_models(options: Options, device: torch.device, dtype: torch.dtype) -> Models:
    """Load everything frozen in `dtype`, add the LoRA, and place it all for training.

    With --low_memory the frozen models stay in pinned host memory and visit the GPU. Raises `UserError`.
    """
    home = torch.device("cpu") if options.low_memory else device
    base = families.load(options.pretrained_model_name_or_path, dtype, home)
    lora = add_lora(base.unet, options.rank, options.alpha, options.seed, base.lora_targets)
    models = Models(
        base=base,
        lora=lora,
        rewards=rewards.load(options.reward, options.reward_path, home, dtype),
        schedule=NoiseSchedule(base.scheduler_config, options.num_inference_steps),
        guidance=(
            1.0 if options.guidance_in == "gradient" else options.guidance_scale,
            1.0 if options.guidance_in == "rollout" else options.guidance_scale,
        ),
        lora_in_uncond=options.lora_in_uncond,
    )
    if options.held_out_reward:
        models.held_out = rewards.load(
            options.held_out_reward, options.reward_path, home, dtype, "--held_out_reward"
        )
    if options.tiny_decoder_path:
        base.tiny_decoder = load_tiny_decoder(options.tiny_decoder_path, dtype, home)
        make_lean(base.tiny_decoder)
    if options.decode_resolution:
        base.decode_side = options.decode_resolution // vae_factor(base.vae)
    for model in (base.unet, base.vae):
        make_lean(model)
        if options.gradient_checkpointing or options.low_memory:
            model.enable_gradient_checkpointing()
    if options.torch_compile:
        compile_unet(base.unet)
    if options.low_memory:
        _offload(models, device)
    return models


def _offload(models: Models, device: torch.device) -> None:
    """Move the LoRA alone to `device`; pin everything frozen in host memory."""
    for matrix in models.lora:
        matrix.data = matrix.data.to(device)
    models.on_device = partial(offload.on_device, device)
    if device.type == "cuda":
        others = models.held_out.modules() if models.held_out else []
        others += [models.base.tiny_decoder] if models.base.tiny_decoder else []
        for model in (models.base.unet, models.base.vae, *models.rewards.modules(), *others):
            offload.pin(model)
