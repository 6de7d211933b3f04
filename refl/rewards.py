"""Rewards by name. A reward is a callable (images (B, 3, H, W) in [0, 1], prompts) -> (B,) float32,
differentiable."""

from collections.abc import Callable
from pathlib import Path

from refl import imagereward

import torch
from torch import Tensor

Reward = Callable[[Tensor, list[str]], Tensor]
RewardLoader = Callable[[str | Path, torch.device, torch.dtype], Reward]  # (folder of weights, device, dtype)

REWARDS: dict[str, RewardLoader] = {"imagereward": imagereward.load}
