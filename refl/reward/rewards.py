"""Rewards by name: one, or a weighted sum of several.

`contract.Reward` says what a reward is. `--reward` names them:

    imagereward, pickscore, hpsv2, clip, ...      one of REWARDS
    my_rewards:redness                            the function `redness` of the module `my_rewards`
    imagereward:1.0,my_rewards:redness:0.5        1.0 x the first + 0.5 x the second

To add one to REWARDS, write a file with its `RewardSpec` and add a line here.

Rewards have scales of their own, which the weights of a sum have to even out: `scales` tells them.

In place of a function there may be a class. Every process instantiates it once, without arguments, and calls
the instance; an nn.Module is frozen and moved to the device. Load weights there: a module is imported before
its process knows which GPU it has.
"""

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refl.reward import aesthetic, clip, hpsv2, imagereward, pickscore
from refl.reward.clip_tower import embedding_once
from refl.reward.contract import Reward, RewardSpec
from refl.reward.plugins import users_code
from refl.system.errors import UserError, is_first_process
from refl.system.files import require
from refl.system.images import to_tensor
from refl.system.options import MAX_FLOAT

import torch
from PIL import Image
from torch import Tensor, nn

REWARDS: dict[str, RewardSpec] = {
    "imagereward": imagereward.SPEC,
    "pickscore": pickscore.SPEC,
    "hpsv2": hpsv2.SPEC,
    "hpsv2.1": hpsv2.SPEC_2_1,
    "clip": clip.SPEC,
    "aesthetic_v1": aesthetic.SPEC_V1,
    "aesthetic_v2": aesthetic.SPEC_V2,
}


class WeightedRewards:
    """Several rewards at once: by name the rewards, their weights and, for messages, the options."""

    def __init__(
        self, rewards: dict[str, Reward], weights: dict[str, float], options: dict[str, str] | None = None
    ):
        self.rewards, self.weights, self.options = rewards, weights, options or {}
        self.validated = set()  # names of the rewards whose first gradient was valid
        self.finite = set()  # names of those whose first scores without gradient were finite
        self.unit_length = set()  # names of those whose first features had length 1

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """The scores of each reward, (K, B) float32 at least, not weighted.

        Raises `UserError` for scores of the wrong shape or type, and for any error of a reward of the user's.
        Values are checked until the first valid gradient, and once for scores without gradient: scores and
        gradients must be finite, and a gradient must exist.
        """
        with embedding_once():
            return torch.stack([self._scores(name, images, prompts) for name in self.rewards])

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompt: str, device: torch.device) -> Tensor:
        """The weighted sums, (B,) on the CPU, for PIL images of any size and one prompt."""
        scores = []
        for name, reward in self.rewards.items():
            if hasattr(reward, "score"):
                with users_code(self._label(name)):
                    own = torch.as_tensor(reward.score(prompt, images, len(images)))
                self._check_scores(name, own, len(images))
                scores.append(own.cpu().float())
                continue
            tensors = (to_tensor(image.convert("RGB"))[None].to(device) for image in images)
            scores.append(torch.cat([self._scores(name, tensor, [prompt]) for tensor in tensors]).cpu())
        return self.finite_total(torch.stack(scores))

    def finite_total(self, scores: Tensor) -> Tensor:
        """As `total`; raises `UserError` for scores that are not finite numbers. Waits for the device."""
        for name, own in zip(self.rewards, scores, strict=True):
            self._check_finite(name, own)
        return self.total(scores)

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum, (B,), of scores (K, B)."""
        return sum(weight * score for weight, score in zip(self.weights.values(), scores, strict=True))

    def modules(self) -> list[nn.Module]:
        """The rewards that are models, which can be moved to a device."""
        return [reward for reward in self.rewards.values() if isinstance(reward, nn.Module)]

    def features(self, images: Tensor) -> Tensor | None:
        """Features (B, width) of length 1 from the first reward that computes them; None if none does."""
        for name, reward in self.rewards.items():
            if callable(getattr(type(reward), "features", None)):  # a method, not a layer of that name
                with users_code(self._label(name)):
                    features = reward.features(images)
                self._check_features(name, features, len(images))
                return features
        return None

    def _label(self, name: str) -> str:
        """A reward in messages, with the option that names it."""
        return f"the reward {name} of {self.options[name]}" if name in self.options else f"the reward {name}"

    def and_held_out(self, others: "WeightedRewards") -> "WeightedRewards":
        """These and others, which have weight 0."""
        return WeightedRewards(
            self.rewards | others.rewards,
            self.weights | dict.fromkeys(others.rewards, 0.0),
            self.options | others.options,
        )

    def means(self, scores: Tensor) -> dict[str, float]:
        """The mean score of each reward by name, from scores (K, N)."""
        return dict(zip(self.rewards, scores.mean(dim=1).tolist(), strict=True))

    def _scores(self, name: str, images: Tensor, prompts: list[str]) -> Tensor:  # (B,)
        version = images._version
        with users_code(self._label(name)):
            scores = self.rewards[name](images, prompts)
        if images._version != version:
            raise UserError(
                f"{self._label(name)} changes the images in place, but other rewards read them too; let it "
                "work on a copy (x = x - mean instead of x -= mean)."
            )
        self._check_scores(name, scores, len(prompts))
        if images.requires_grad and name not in self.validated:
            self._check_finite(name, scores)
            self._check_gradient(name, images, scores)
            self.validated.add(name)
        elif not images.requires_grad and name not in self.finite:
            self._check_finite(name, scores)
            self.finite.add(name)
        return scores.to(images.device, torch.promote_types(images.dtype, torch.float32))

    def _check_scores(self, name: str, scores: Any, count: int) -> None:
        """Raise `UserError` for scores that are not a tensor (count,) of real numbers."""
        if not torch.is_tensor(scores) or scores.shape != (count,):
            got = (
                f"a tensor {tuple(scores.shape)}" if torch.is_tensor(scores) else f"a {type(scores).__name__}"
            )
            raise UserError(
                f"{self._label(name)} returned {got} for {count} images; it must return a tensor ({count},), "
                "one score for each."
            )
        if scores.is_complex():
            raise UserError(f"{self._label(name)} returned {scores.dtype}; scores must be real numbers.")

    def _check_features(self, name: str, features: Any, count: int) -> None:
        """Raise `UserError` for features that are not (count, width) of length 1. Waits once for the
        device."""
        if not (torch.is_tensor(features) and features.ndim == 2 and len(features) == count):
            got = getattr(features, "shape", type(features).__name__)
            raise UserError(f"{self._label(name)}: features() returned {got}; expected ({count}, width).")
        if name not in self.unit_length:
            lengths = features.float().norm(dim=1)
            if not ((lengths - 1).abs() <= 0.02).all():
                raise UserError(
                    f"{self._label(name)}: features() returned vectors of length {lengths.tolist()}; divide "
                    "them by it."
                )
            self.unit_length.add(name)

    def _check_finite(self, name: str, scores: Tensor) -> None:
        """Raise `UserError` for scores that are not finite. Waits for the device."""
        if not scores.isfinite().all():
            raise UserError(
                f"{self._label(name)} returned {scores.tolist()[:8]}; scores must be finite numbers."
            )

    def _check_gradient(self, name: str, images: Tensor, scores: Tensor) -> None:
        """Raise `UserError` for a gradient that is missing or not finite. Waits for the device."""
        gradient = None
        if scores.requires_grad:
            (gradient,) = torch.autograd.grad(scores.sum(), images, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise UserError(
                f"{self._label(name)} gives no gradient: compute its scores from the images by torch's "
                "differentiable functions only, without detach(), item(), numpy or torch.no_grad()."
            )
        if not gradient.isfinite().all():
            raise UserError(
                f"{self._label(name)} has a gradient that is not finite, for scores {scores.tolist()}."
            )
        if not gradient.any() and is_first_process():
            logging.getLogger(__name__).warning(
                f"{self._label(name)} has a gradient of zero for the first images; if that continues, it "
                "teaches nothing (round() and argmax() have no gradient)"
            )


def diversity(features: Tensor) -> Tensor:
    """Diversity of the images of each prompt, (P,): the mean of 1 - cosine over all pairs of features
    (P, n, width) of length 1."""
    n = features.shape[1]
    return (1 - (features.sum(1).square().sum(1) - n) / (n * (n - 1))).clamp(min=0)


def parse(specification: str, option: str = "--reward") -> dict[str, tuple[float, RewardSpec]]:
    """Weight and specification of each reward that `option` names, by its name in logs. Raises `UserError`.

    Imports modules, also from the current folder; loads nothing.
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
        if not 0 < abs(weight) <= MAX_FLOAT:
            raise UserError(
                f"{option} {specification}: the weight of {source} must be a number other than 0, at most "
                f"{MAX_FLOAT:g}."
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
        parsed[name] = weight, REWARDS[source] if source in REWARDS else _own_spec(source, option)
    return parsed


def parse_held_out(specification: str | None) -> dict[str, tuple[float, RewardSpec]]:
    """As `parse`, for `--held_out_reward`; {} for None."""
    return parse(specification, "--held_out_reward") if specification else {}


def load_with_held_out(
    specification: str, held_out: str | None, folder: str | Path, device: torch.device, dtype: torch.dtype
) -> WeightedRewards:
    """As `load`, with the held-out rewards at weight 0."""
    scorers = load(specification, folder, device, dtype)
    if not held_out:
        return scorers
    return scorers.and_held_out(load(held_out, folder, device, dtype, "--held_out_reward"))


def default_target(specification: str) -> float | None:
    """--reward_target if none is given: the weighted sum of the rewards' own, None with a negative weight.

    2.0 for a sum with a function, whose scale is unknown.
    """
    parsed = parse(specification)
    if len(parsed) > 1 and not parsed.keys() <= REWARDS.keys():
        return 2.0
    targets = [(weight, spec.default_target) for weight, spec in parsed.values()]
    if any(weight < 0 or target is None for weight, target in targets):
        return None
    return sum(weight * target for weight, target in targets)


def scales(specification: str) -> str:
    """The scores to expect from each reward that says so, for people."""
    return "; ".join(
        f"{name}: {spec.scale}" for name, (_, spec) in parse(specification).items() if spec.scale
    )


def suite(trained: str, held_out: str | None, folder: str | Path) -> str | None:
    """`held_out` and every reward of REWARDS whose files are in `folder` and that is not named yet."""
    named = parse(trained) | parse_held_out(held_out)
    there = (name for name, spec in REWARDS.items() if all(map(Path.exists, spec.files(Path(folder)))))
    return (
        ",".join([*([held_out] if held_out else []), *(name for name in there if name not in named)]) or None
    )


def tie_margins(names: Iterable[str], trained: str, margin: float) -> dict[str, float]:
    """--tie_margin in the unit of each reward; "reward" is the trained one. That of functions and sums is
    1."""
    units = {name: spec.unit for name, spec in REWARDS.items()}
    if len(parsed := parse(trained)) == 1:
        [(weight, spec)] = parsed.values()
        units["reward"] = abs(weight) * spec.unit
    return {name: margin * units.get(name, 1.0) for name in names}


def required_files(specification: str, folder: str | Path, held_out: str | None = None) -> dict[Path, str]:
    """Each file that the rewards need in `folder`, and where it is published."""
    specs = [spec for _, spec in (parse(specification) | parse_held_out(held_out)).values()]
    return {file: source for spec in specs for file, source in spec.files(Path(folder)).items()}


def load(
    specification: str,
    folder: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    option: str = "--reward",
) -> WeightedRewards:
    """Load the rewards that `option` names; those with published weights read them from `folder`, in `dtype`.

    Raises `UserError`, also for files that are missing.
    """
    parsed = parse(specification, option)
    for _, spec in parsed.values():
        require(spec.files(Path(folder)))
    return WeightedRewards(
        {name: spec.load(Path(folder), device, dtype) for name, (_, spec) in parsed.items()},
        {name: weight for name, (weight, _) in parsed.items()},
        dict.fromkeys(parsed, option),
    )


def _own_spec(source: str, option: str) -> RewardSpec:
    """Specification of a user's own reward, `module:function`."""
    module, _, function = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    label = f"{option} {source}"
    try:
        with users_code(label, passed=ModuleNotFoundError):
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = f"looked for in {os.getcwd()} and among what is installed"
        reason = where if f"{module}.".startswith(f"{error.name}.") else f"{module} imports it"
        raise UserError(f"{label}: there is no module {error.name} ({reason}).") from error
    file = getattr(found, "__file__", None) or module
    try:
        for part in function.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UserError(f"{label}: there is no {function} in {file}.") from error
    _check_signature(label, found)

    def load_own(folder: Path, device: torch.device, dtype: torch.dtype) -> Reward:
        with users_code(label):
            reward = found() if isinstance(found, type) else found
            return reward.to(device).requires_grad_(False).eval() if isinstance(reward, nn.Module) else reward

    return RewardSpec(load_own)


def _check_signature(label: str, found: Any) -> None:
    """Raise `UserError` unless `found` can be called with images and prompts, or is a class of such."""
    if not callable(found):
        raise UserError(f"{label}: a {type(found).__name__} is not a function of (images, prompts).")
    arguments = [None, None]
    if isinstance(found, type):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise UserError(f"{label}: the class must take no arguments ({error}).") from error
        if not any("__call__" in vars(base) for base in found.__mro__):
            raise UserError(f"{label}: the class has no __call__(images, prompts).")
        found = found.forward if issubclass(found, nn.Module) else found.__call__
        arguments = [None, *arguments]
    try:
        inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise UserError(f"{label}: it must take (images, prompts): {error}.") from error
    except ValueError:  # written in C
        return
