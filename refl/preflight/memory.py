"""Count the memory that training needs, without a GPU and before training.

The parts of a step run on tensors that have a shape but no content (torch's FakeTensorMode), while the bytes
of all live storages are added up. On the CPU, where the same operations can run for real, the count agrees
with the memory of the process: benchmarks/NOTES.md. What CUDA needs in addition is an allowance, not a count.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from refl.model import families
from refl.model.lean import make_lean
from refl.model.lora import add_lora
from refl.model.offload import pinned_size
from refl.model.tiny_decoder import load_empty_tiny_decoder
from refl.reward import rewards

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Allowances for a GPU: CUDA's context with the work space of its libraries, and the allocator's
# fragmentation.
CUDA_GIB, FRAGMENTATION = 0.8, 1.1


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of storages that operations allocate, until they are freed; `peak` is the maximum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        for storage in outputs:
            if storage in self.known:
                continue
            self.known.add(storage)
            if all(storage is not other for other in inputs):  # not a view of an input
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def peak_of(run: Callable[[], object]) -> int:
    """Peak of the bytes that `run` allocates."""
    with LiveBytes() as live:
        run()
    return live.peak


def count(options: Any, dtype: torch.dtype, resolution: int) -> dict[str, tuple[float, float]]:
    """GiB of weights on the GPU and of everything else, for each part of a step: "rollout", "decoder and
    reward", "gradient". The parts follow each other.

    `options` are those of refl_lora.py. Rewards without `RewardSpec.load_empty` are not counted. Raises
    `UserError`.
    """
    low_memory, trained_on = options.low_memory, rewards.parse(options.reward)
    with empty_models(options, dtype) as (base, judges):
        unet, vae = base.unet, base.vae
        lora = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        shape = base.latent_shape(resolution)
        is_guided = options.guidance_scale != 1 and options.lora_in_uncond  # else one half after the other

        def predict_noise(size: int, guidance_in: str) -> Tensor:
            guided = 2 if is_guided and options.guidance_in in ("both", guidance_in) else 1
            latents = torch.empty(guided * size, *shape, dtype=dtype)
            return base.denoise(latents, torch.tensor(1), base.empty_embeds(guided * size, dtype))

        def rollout() -> None:
            size = max(options.rollout_batch_size, options.train_batch_size)
            with torch.no_grad():
                most = options.train_batch_size * options.gradient_accumulation_steps
                predict_noise(min(size, most), "rollout")

        def decoder_and_reward() -> None:
            size = options.decode_batch_size
            x0 = torch.empty(size, *shape, requires_grad=True)
            images = base.decode_for_gradient(x0).clamp(0, 1)
            with rewards.embedding_once():
                scores = [
                    reward(images, [""] * size) for name, reward in judges.items() if name in trained_on
                ]
            torch.autograd.grad(sum(scores).sum() if scores else images.mean(), x0)

        def gradient() -> None:
            eps = predict_noise(options.train_batch_size, "gradient")
            torch.autograd.grad(eps, lora, torch.empty_like(eps))

        trained = 4 * sum(matrix.nbytes for matrix in lora)  # the LoRA, its gradient, AdamW's two means
        everything = {unet, vae, base.gradient_decoder, *judges.values()}
        parts = {
            "rollout": (rollout, [unet]),
            "decoder and reward": (decoder_and_reward, [base.gradient_decoder, *judges.values()]),
            "gradient": (gradient, [unet]),
        }
        counted = {}
        for name, (run, used) in parts.items():
            weights = _frozen_bytes(used if low_memory else everything)
            counted[name] = (trained + weights) / 2**30, peak_of(run) / 2**30
        return counted


def pinned(options: Any, dtype: torch.dtype) -> float:
    """GiB of pinned host memory that each process needs for the frozen models with --low_memory."""
    judges = empty_rewards(options, dtype).values()
    with without_content(options.pretrained_model_name_or_path, options.rank, dtype) as base:
        return pinned_size(base.unet, base.vae, *judges) / 2**30


@contextmanager
def empty_models(options: Any, dtype: torch.dtype) -> Iterator[tuple[families.Family, dict[str, nn.Module]]]:
    """The model with its LoRA, and the rewards that can be counted by name, as a step with `options` uses
    them; nothing in the block has content."""
    judges = empty_rewards(options, dtype)
    with without_content(options.pretrained_model_name_or_path, options.rank, dtype) as base:
        for model in (base.unet, base.vae):
            make_lean(model)
            if options.gradient_checkpointing or options.low_memory:
                model.enable_gradient_checkpointing()
        for reward in judges.values():
            empty(reward)
        if options.tiny_decoder_path:
            base.tiny_decoder = load_empty_tiny_decoder(options.tiny_decoder_path)
            empty(base.tiny_decoder, dtype)
            make_lean(base.tiny_decoder)
        if options.decode_resolution:
            base.decode_side = base.latent_shape(options.decode_resolution)[-1]
        yield base, judges


def empty_rewards(options: Any, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The rewards that can be counted, by name, trained on or held out, on the meta device."""
    specs = rewards.parse(options.reward) | rewards.parse_held_out(options.held_out_reward)
    folder = Path(options.reward_path)
    return {name: spec.load_empty(folder, dtype) for name, (_, spec) in specs.items() if spec.load_empty}


def _frozen_bytes(models: Iterable[nn.Module]) -> int:
    parameters = {parameter for model in models for parameter in model.parameters()}  # models may share some
    return sum(parameter.nbytes for parameter in parameters if not parameter.requires_grad)


@contextmanager
def without_content(folder: str | Path, rank: int, dtype: torch.dtype) -> Iterator[families.Family]:
    """The model with its LoRA, as training loads it but without content; no tensor that is created in the
    block has any."""
    base = families.find(folder).load_empty(folder)
    with torch.device("meta"):
        add_lora(base.unet, rank, rank, 0, base.lora_targets)
    with FakeTensorMode(allow_non_fake_inputs=True):
        empty(base.unet, dtype)
        empty(base.vae, torch.float32 if dtype == torch.float16 else dtype)
        yield base


def empty(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the tensors of `model` by ones without content, frozen ones in `dtype` if it is given."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            is_cast = dtype and tensor.is_floating_point() and not tensor.requires_grad
            new = torch.empty(tensor.shape, dtype=dtype if is_cast else tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            setattr(module, name, new)
    model.eval()


def needed(options: Any, dtype: torch.dtype, resolution: int) -> float:
    """GiB of free GPU memory that training with `options` needs, allowances included."""
    counted = count(options, dtype, resolution)
    return CUDA_GIB + max(weights + FRAGMENTATION * other for weights, other in counted.values())


def advice(options: Any, dtype: torch.dtype, resolution: int) -> str:
    """Options that need less memory, one on a line with its GiB; "" if there are none."""
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
