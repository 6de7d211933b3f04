"""Rewards: what images are taught to please, one or a weighted sum of several.

A reward is a callable (images, prompts) -> scores: images (B, 3, H, W) float32 in [0, 1], a list of B
prompts, scores (B,), higher is better, differentiable in the images. `--reward` names them:

    imagereward                                   one of REWARDS
    my_rewards:redness                            the function `redness` of the module `my_rewards`
    imagereward:1.0,my_rewards:redness:0.5        1.0 x the first + 0.5 x the second

A class in place of a function is made once, without arguments, on every process, and its instance called; an
nn.Module is frozen and moved to the device. Weights belong there: what a module makes when it is imported is
made before each process knows its GPU.
"""

import importlib
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refl.reward import imagereward
from refl.system.errors import UserError, is_first_process

import torch
from torch import Tensor, nn

Reward = Callable[[Tensor, list[str]], Tensor]
RewardLoader = Callable[[str | Path, torch.device, torch.dtype], Reward]  # (folder of weights, device, dtype)

REWARDS: dict[str, RewardLoader] = {"imagereward": imagereward.load}


class WeightedRewards:
    """Several rewards at once. `rewards` and `weights` by name."""

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]):
        self.rewards, self.weights = rewards, weights
        self.proven = set()  # names of those that have given scores and gradients as they should

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Each reward's own scores, (K, B) float32 at least, not weighted.

        Raises `UserError` for scores of the wrong shape and, until a reward has given its first gradient, for
        scores or gradients that are not finite and a gradient that is not there.
        """
        return torch.stack([self._scores(name, images, prompts) for name in self.rewards])

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum, (B,), of scores (K, B)."""
        return sum(weight * own for weight, own in zip(self.weights.values(), scores, strict=True))

    def modules(self) -> list[nn.Module]:
        """Those that are models: what there is to move to a device."""
        return [reward for reward in self.rewards.values() if isinstance(reward, nn.Module)]

    def features(self, images: Tensor) -> Tensor | None:
        """Features (B, width) of length 1 by the first reward that has such a function, None if none has."""
        for reward in self.rewards.values():
            if hasattr(reward, "features"):
                return reward.features(images)
        return None

    def means(self, scores: Tensor) -> dict[str, float]:
        """Each reward's mean of scores (K, N), by name."""
        return dict(zip(self.rewards, scores.mean(dim=1).tolist(), strict=True))

    def _scores(self, name: str, images: Tensor, prompts: list[str]) -> Tensor:  # (B,)
        version = images._version
        scores = self.rewards[name](images, prompts)
        if images._version != version:
            raise UserError(
                f"the reward {name} changes the images in place, and others are to see them too; let it "
                "work on a copy (x = x - mean instead of x -= mean)."
            )
        if not torch.is_tensor(scores) or scores.shape != (len(prompts),):
            got = (
                f"a tensor {tuple(scores.shape)}" if torch.is_tensor(scores) else f"a {type(scores).__name__}"
            )
            raise UserError(
                f"the reward {name} returned {got} for {len(prompts)} images; it must return a tensor "
                f"({len(prompts)},), one score for each."
            )
        if name not in self.proven:
            self._prove(name, images, scores)
        return scores.to(images.device, torch.promote_types(scores.dtype, torch.float32))

    def _prove(self, name: str, images: Tensor, scores: Tensor) -> None:
        """What needs to be looked at only until it was seen to be right."""
        if not scores.isfinite().all():
            raise UserError(f"the reward {name} returned {scores.tolist()}; scores must be finite numbers.")
        if not images.requires_grad:
            return
        gradient = None
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores.sum(), images, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UserError(
                f"the reward {name} gives no gradient: its scores must follow from the images by torch's "
                "differentiable functions alone, without detach(), item(), numpy or torch.no_grad()."
            )
        if not gradient.isfinite().all():
            raise UserError(
                f"the reward {name} has a gradient that is not finite, for scores {scores.tolist()}."
            )
        if not gradient.any() and is_first_process():
            logging.getLogger(__name__).warning(
                f"the reward {name} has a gradient of zero for the first images; if that goes on, it "
                "teaches nothing (round() and argmax() have no gradient)"
            )
        self.proven.add(name)


def diversity(features: Tensor) -> Tensor:
    """How different the images of each prompt are: mean of 1 - cosine over all pairs, (P,), of features
    (P, n, width) of length 1."""
    n = features.shape[1]
    return (1 - (features.sum(1).square().sum(1) - n) / (n * (n - 1))).clamp(min=0)


def parse(specification: str, option: str = "--reward") -> dict[str, tuple[float, RewardLoader]]:
    """Weight and loader of each reward that `option` names, by its name in logs. Raises `UserError`.

    Modules are imported, also from the folder where the command was given; nothing is loaded.
    """
    parsed = {}
    for term in specification.split(","):
        source, weight = term.strip(), 1.0
        before, _, last = source.rpartition(":")
        if before in REWARDS or ":" in before:  # then what follows is a weight, or a mistake
            try:
                source, weight = before, float(last)
            except ValueError as error:
                raise UserError(f"{option} {specification}: the weight of {before} is {last!r}.") from error
        if not math.isfinite(weight) or weight == 0:
            raise UserError(
                f"{option} {specification}: the weight of {source} must be a number other than 0."
            )
        is_function = ":" in source and all(
            part.isidentifier() for part in source.replace(":", ".").split(".")
        )
        if source not in REWARDS and not is_function:
            raise UserError(
                f"{option} {specification}: {source or 'nothing'} is not a reward; name {', '.join(REWARDS)} "
                "or a function, as module:function (my_rewards:redness), with a weight after it if you like "
                "(my_rewards:redness:0.5)."
            )
        name = source.replace(":", ".")
        if name in parsed:
            raise UserError(f"{option} {specification}: {source} is named twice.")
        parsed[name] = weight, REWARDS[source] if source in REWARDS else _loader(source, option)
    return parsed


def parse_held_out(specification: str | None) -> dict[str, tuple[float, RewardLoader]]:
    """The same of `--held_out_reward`, which may be None: {}."""
    return parse(specification, "--held_out_reward") if specification else {}


def load(
    specification: str,
    folder: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    option: str = "--reward",
) -> WeightedRewards:
    """The rewards that `option` names; `folder` and `dtype` are for those with published weights."""
    parsed = parse(specification, option)
    return WeightedRewards(
        {name: loader(folder, device, dtype) for name, (_, loader) in parsed.items()},
        {name: weight for name, (weight, _) in parsed.items()},
    )


def _loader(source: str, option: str) -> RewardLoader:
    """Loader of a person's own reward, `module:function`."""
    module, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = f"looked for in {os.getcwd()} and among what is installed"
        reason = where if f"{module}.".startswith(f"{error.name}.") else f"{module} imports it"
        raise UserError(f"{option} {source}: there is no module {error.name} ({reason}).") from error
    file = getattr(found, "__file__", None) or module
    try:
        for part in function.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UserError(f"{option} {source}: there is no {function} in {file}.") from error
    if not callable(found):
        raise UserError(
            f"{option} {source}: a {type(found).__name__} is not a function of (images, prompts)."
        )
    if isinstance(found, type):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise UserError(f"{option} {source}: the class is made without arguments ({error}).") from error
        if not any("__call__" in vars(base) for base in found.__mro__):
            raise UserError(f"{option} {source}: the class has no __call__(images, prompts).")

    def load_own(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Reward:
        reward = found() if isinstance(found, type) else found
        return reward.to(device).requires_grad_(False).eval() if isinstance(reward, nn.Module) else reward

    return load_own
