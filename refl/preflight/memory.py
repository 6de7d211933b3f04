"""GPU memory that training takes, counted beforehand and without a GPU.

The parts of a step run on tensors that have a shape but no content (torch's FakeTensorMode), while every
storage that is alive is added up. On the CPU, where the same operations really run, it agrees with the
process's own memory: benchmarks/NOTES.md. What a GPU needs besides is an allowance, not a count.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from refl.model.lean import make_lean
from refl.model.lora import add_lora
from refl.model.stable_diffusion import decode, not_loadable, vae_factor
from refl.reward import imagereward, rewards

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What comes on top on a GPU: CUDA's own and its libraries' work space; what the allocator cannot hand out.
CUDA_GIB, FRAGMENTATION = 0.8, 1.1


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make until they are freed; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                given = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                if all(t.untyped_storage() is not storage for t in given):  # not a view of what there was
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_of(run: Callable[[], object]) -> int:
    """Bytes that `run` makes, at most at once, beyond what there was."""
    with LiveBytes() as live:
        run()
    return live.peak


def count(options: Any, dtype: torch.dtype, resolution: int) -> dict[str, tuple[float, float]]:
    """GiB of weights on the GPU, and of all else, in each part of a step: "rollout", "decoder and reward",
    "gradient". The parts follow each other.

    `options` are those of refl_lora.py. Of rewards only ImageReward is counted, trained on or held out.
    Raises `UserError`.
    """
    folder = options.pretrained_model_name_or_path
    is_trained_on = "imagereward" in rewards.parse(options.reward)
    is_held_out = "imagereward" in rewards.parse_held_out(options.held_out_reward)
    reward_path = options.reward_path if is_trained_on or is_held_out else None
    with without_content(folder, reward_path, options.rank, dtype) as (unet, vae, reward):
        for model in (unet, vae):
            make_lean(model)
            if options.gradient_checkpointing or options.low_memory:
                model.enable_gradient_checkpointing()
        lora = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        side = resolution // vae_factor(vae)
        is_guided = options.guidance_scale != 1 and options.lora_in_uncond  # else one half after the other

        def predict_noise(size: int, guidance_in: str) -> Tensor:
            guided = 2 if is_guided and options.guidance_in in ("both", guidance_in) else 1
            latents = torch.empty(guided * size, unet.config.in_channels, side, side, dtype=dtype)
            prompt_embeds = torch.empty(guided * size, 77, unet.config.cross_attention_dim, dtype=dtype)
            return unet(latents, torch.tensor(1), prompt_embeds).sample

        def rollout() -> None:
            size = max(options.rollout_batch_size, options.train_batch_size)
            with torch.no_grad():
                most = options.train_batch_size * options.gradient_accumulation_steps
                predict_noise(min(size, most), "rollout")

        def decoder_and_reward() -> None:
            size = options.decode_batch_size
            x0 = torch.empty(size, unet.config.in_channels, side, side, requires_grad=True)
            images = decode(vae, x0).clamp(0, 1)
            torch.autograd.grad(score(reward, images) if is_trained_on else images.mean(), x0)

        def gradient() -> None:
            eps = predict_noise(options.train_batch_size, "gradient")
            torch.autograd.grad(eps, lora, torch.empty_like(eps))

        trained = 4 * sum(matrix.nbytes for matrix in lora)  # the LoRA, its gradient, AdamW's two means
        frozen = {model: _bytes(model) for model in (unet, vae, reward) if model}
        parts = {
            "rollout": (rollout, [unet]),
            "decoder and reward": (decoder_and_reward, [vae, reward]),
            "gradient": (gradient, [unet]),
        }
        counted = {}
        for name, (run, own) in parts.items():
            here = [size for model, size in frozen.items() if not options.low_memory or model in own]
            counted[name] = (trained + sum(here)) / 2**30, peak_of(run) / 2**30
        return counted


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)


@contextmanager
def without_content(
    folder: str | Path, reward_path: str | Path | None, rank: int, dtype: torch.dtype
) -> Iterator[tuple[UNet2DConditionModel, AutoencoderKL, imagereward.ImageReward | None]]:
    """UNet with LoRA, VAE without encoder and ImageReward, as the libraries make them and as training loads
    them, but without content; for a block in which tensors have none."""
    try:
        with torch.device("meta"):
            config = UNet2DConditionModel.load_config(folder, subfolder="unet")
            unet = UNet2DConditionModel.from_config(config)
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
            for model in (unet, vae):
                model.requires_grad_(False)
            add_lora(unet, rank, rank, 0)
    except Exception as error:  # whatever configurations of another model make of it
        raise not_loadable(folder, error) from error
    vae.encoder = None
    reward = imagereward.load(reward_path) if reward_path else None
    dtypes = {unet: dtype, vae: torch.float32 if dtype == torch.float16 else dtype}
    if reward:
        dtypes |= {reward.vision: dtype, reward.text: dtype, reward.head: torch.float32}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model, own in dtypes.items():
            empty(model, own)
        yield unet, vae, reward


def score(reward: imagereward.ImageReward, images: Tensor) -> Tensor:
    """The sum of the rewards, (), of images (B, 3, H, W) for prompts of no content."""
    ids = torch.zeros(len(images), imagereward.MAX_TOKENS, dtype=torch.long)
    pixels = imagereward.preprocess(images, reward.image_size)
    return reward.score_tokens(pixels, ids, torch.ones_like(ids)).sum()


def empty(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `model` tensors without content; what is not trained in `dtype`."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            is_cast = tensor.is_floating_point() and not tensor.requires_grad
            new = torch.empty(tensor.shape, dtype=dtype if is_cast else tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            setattr(module, name, new)
    model.eval()


def needed(options: Any, dtype: torch.dtype, resolution: int) -> float:
    """GiB that a GPU must have free to train with `options`."""
    counted = count(options, dtype, resolution)
    return CUDA_GIB + max(weights + FRAGMENTATION * others for weights, others in counted.values())


def advice(options: Any, dtype: torch.dtype, resolution: int) -> str:
    """Options that need less, with what each would need, a line each; "" if there are none."""
    batch, steps = options.train_batch_size, options.gradient_accumulation_steps
    lowest = {"low_memory": True, "decode_batch_size": 1}
    smaller = {"train_batch_size": 1, "decode_batch_size": 1, "gradient_accumulation_steps": batch * steps}
    text = f"--train_batch_size 1 --gradient_accumulation_steps {batch * steps}"
    ways = {
        "--gradient_checkpointing": ({"gradient_checkpointing": True}, dtype),
        "--low_memory": (lowest, dtype),
        text: (smaller, dtype),
        f"--low_memory {text}": (lowest | smaller, dtype),
        "--mixed_precision bf16 (Ampere or newer)": ({}, torch.bfloat16),
        "--mixed_precision fp16": ({}, torch.float16),
    }
    now, lines = needed(options, dtype, resolution), []
    for name, (changes, other) in ways.items():
        changed = replace(options, **changes)
        if changed == options and other == dtype:
            continue
        if (size := needed(changed, other, resolution)) < now - 0.05:
            lines.append(f"  {name}: {size:.1f} GiB")
    return "\n".join(lines)
