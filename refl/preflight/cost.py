"""Count the FLOPs that training needs, without a GPU and before training.

The parts of a step run once on tensors that have a shape but no content, under torch's FlopCounterMode: it
counts convolutions, matrix products and attention, two operations for a multiplication with an addition.
Everything else is small beside them and is not counted. Predictions with the LoRA off are counted with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

from refl.model.folder import read_config
from refl.model.noise_schedule import NoiseSchedule
from refl.preflight import memory
from refl.reward import rewards
from refl.train.plan import Plan, draw_plan, possible_plans

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# TFLOP/s of GPUs in float16 or bfloat16 with sums in float32, dense, as in NVIDIA's data sheets and white
# papers, by a pattern in the name that torch reports.
RATES = {
    "B200": 2250,
    "H200$|GH200|H100.*HBM3": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "L40S": 362,
    "A100": 312,
    "A30": 165,
    "A6000": 155,
    "A40": 150,
    "A10": 125,
    "L4": 121,
    r"V100-SXM\d": 125,
    "V100-PCIE": 112,
    "T4": 65,
    "RTX 4090(?! D| Laptop)": 165,
    "RTX 3090(?! Ti)": 71,
}
MAX_PLANS = 1000  # of those that may be drawn, to take the mean of their costs
ASSUMED_UTILISATION = 0.4  # share of the published rate that training reaches: an assumption


@dataclass
class Parts:
    """TFLOP of the parts of a step for one image; the UNet's without guidance."""

    unet: float  # forward
    gradient: float  # UNet forward, and backward to the LoRA
    chain: float  # UNet forward, and backward to the LoRA and the latents
    decode: float  # exact, forward
    decode_gradient: float  # forward and backward, as the gradient decodes
    reward: float  # forward of all rewards that can be counted, held-out ones as well
    reward_gradient: float  # forward and backward of those that are trained on


def count_parts(options: Any, dtype: torch.dtype, resolution: int) -> Parts:
    """Count the parts of a step with `options`, which are those of refl_lora.py. Raises `UserError`."""
    with memory.empty_models(options, dtype) as (base, judges):
        trained_on = [judges[name] for name in rewards.parse(options.reward) if name in judges]
        lora = [matrix for matrix in base.unet.parameters() if matrix.requires_grad]
        embeds = base.empty_embeds(1, dtype)
        latents, leaf = (torch.empty(1, *base.latent_shape(resolution)) for _ in range(2))
        images = torch.empty(1, 3, resolution, resolution)

        def unet(latents: Tensor) -> Tensor:
            return base.denoise(latents.clone(), torch.tensor([1]), embeds)

        def score(images: Tensor, judges: Sequence[torch.nn.Module]) -> Tensor:
            images = images.clone()
            with rewards.embedding_once():
                return sum((judge(images, [""]) for judge in judges), images.mean()[None])

        # Clones, because FlopCounterMode cannot see a leaf enter a module under autograd.grad.
        with torch.no_grad():
            forward = {
                "unet": _tflop(lambda: unet(latents)),
                "decode": _tflop(lambda: base.decode(latents)),
                "reward": _tflop(lambda: score(images, judges.values())),
            }
        leaf.requires_grad_()
        images.requires_grad_()
        return Parts(
            **forward,
            gradient=_tflop(lambda: _backward(unet(latents), lora)),
            chain=_tflop(lambda: _backward(unet(leaf), [*lora, leaf])),
            decode_gradient=_tflop(lambda: _backward(base.decode_for_gradient(leaf), [leaf])),
            reward_gradient=_tflop(lambda: _backward(score(images, trained_on), [images])),
        )


def _backward(output: Tensor, inputs: Sequence[Tensor]) -> None:
    torch.autograd.grad(output, inputs, torch.empty_like(output))


def _tflop(run: Callable[[], object]) -> float:
    with flop_counter() as counter:
        run()
    return counter.get_total_flops() / 1e12


def flop_counter() -> FlopCounterMode:
    """torch's, with the CPU's attention, which it does not know."""

    def forward(query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient, query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def per_image(options: Any, parts: Parts) -> dict[str, float]:
    """TFLOP of an image of a training step by part, the mean over the plans that may be drawn, or over
    `MAX_PLANS` of them."""
    schedule = _schedule(options)
    plans = list(islice(possible_plans(options, schedule), MAX_PLANS + 1))
    if len(plans) > MAX_PLANS:
        plans = [draw_plan(options, schedule, step, 0) for step in range(MAX_PLANS)]
    costs = [_of_plan(options, parts, plan) for plan in plans]
    return {part: fmean(cost[part] for cost in costs) for part in costs[0]}


def _of_plan(options: Any, parts: Parts, plan: Plan) -> dict[str, float]:
    terms, with_gradient = len(plan.terms), len(plan.gradient_steps)
    in_rollout, in_gradient = (
        2 if options.guidance_scale != 1 and options.guidance_in in ("both", place) else 1
        for place in ("rollout", "gradient")
    )
    rolled_out = in_gradient * with_gradient + in_rollout * (len(plan.timesteps) - with_gradient)
    guided = in_gradient - 1  # predictions for the empty prompt of a step with gradient
    single = parts.gradient + guided * (parts.gradient if options.lora_in_uncond else parts.unet)
    chained = in_gradient * parts.chain
    regularisers = in_gradient * parts.unet if options.noise_distance_weight else 0.0
    regularisers += parts.gradient if options.pretrain_data else 0.0
    return {
        "rollout": rolled_out * parts.unet,
        "decoder": terms * parts.decode_gradient,
        "reward": terms * parts.reward_gradient,
        "gradient": terms * regularisers
        + sum(single if term.depth == 1 else term.depth * chained for term in plan.terms),
    }


def validation_image(options: Any, parts: Parts) -> float:
    """TFLOP of an image of a validation."""
    evaluations = options.num_inference_steps * (2 if options.drawn_with != 1 else 1)
    return evaluations * parts.unet + parts.decode + parts.reward


def of_run(options: Any, parts: Parts) -> tuple[float, float]:
    """TFLOP of a run for each process: of all training steps, and of all validations in one process."""
    images = options.max_train_steps * options.train_batch_size * options.gradient_accumulation_steps
    every, last = options.validation_steps, options.max_train_steps
    validations = 1 + last // every + (last % every > 0) if every else 0
    validated = validations * options.num_validation_images * options.validation_images_per_prompt
    return images * sum(per_image(options, parts).values()), validated * validation_image(options, parts)


def _schedule(options: Any) -> NoiseSchedule:
    config = read_config(options.pretrained_model_name_or_path, "scheduler")
    return NoiseSchedule(config, options.num_inference_steps)


def published_rate(gpu: str) -> float | None:
    """TFLOP/s in half precision of a whole GPU by its name; None if it is not known."""
    rates = (rate for name, rate in RATES.items() if re.search(rf"\b(?:{name})(?![0-9A-Z])", gpu))
    return None if "MIG" in gpu else next(rates, None)
