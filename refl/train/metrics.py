"""The numbers logged for each optimizer step."""

import math

from refl.reward.rewards import WeightedRewards
from refl.system import devices
from refl.train.options import Options
from refl.train.update import Accumulated, Update

import torch
from accelerate import Accelerator
from torch import Tensor


class Metrics:
    """Measures an optimizer step over all processes with one reduction and one gather."""

    def __init__(self, options: Options, rewards: WeightedRewards, accelerator: Accelerator):
        self.options, self.rewards, self.accelerator = options, rewards, accelerator

    def __call__(
        self,
        accumulated: Accumulated,
        update: Update,
        seconds: dict[str, float],
    ) -> tuple[dict[str, float], Tensor]:
        """Values by tag, and the reward of every image of the step, (N,) float32 on the CPU."""
        values = self._averaged(accumulated, seconds)
        scores = torch.cat([result.scores for result in accumulated.results], dim=1)
        scores = self.accelerator.gather(scores.T.contiguous()).T.float().cpu()  # (K, N)
        total, target = self.rewards.total(scores), self.options.reward_target
        values |= {
            "loss": update.loss,
            "gradient_norm": update.grad_norm / self.options.grad_scale,
            "learning_rate": update.learning_rate,
            "reward/mean": total.mean().item(),
            "reward/std": total.std(correction=0).item(),
            "reward/min": total.min().item(),
            "reward/max": total.max().item(),
        }
        values |= {f"reward/{name}": mean for name, mean in self.rewards.means(scores).items()}
        if target is not None:
            values["reward/above_target"] = (total > target).float().mean().item()
        values |= {f"images_per_second/{name}": len(total) / values[f"seconds/{name}"] for name in seconds}
        return values, total

    def _averaged(self, accumulated: Accumulated, seconds: dict[str, float]) -> dict[str, float]:
        """Averages over processes of each process's numbers."""
        results, device = accumulated.results, self.accelerator.device
        norms = [norm / accumulated.scale / self.options.grad_scale for norm in accumulated.norms]
        numbers = {
            f"gradient_norm_by_stop/{k}": torch.stack(
                [norm for norm, result in zip(norms, results, strict=True) if result.stop == k]
            ).mean()
            for k in sorted({result.stop for result in results})
        }
        for name in results[0].regularisers:
            values = [result.regularisers[name] for result in results]
            numbers[f"regularisers/{name}"] = torch.stack(values).mean()
        numbers["images/saturated"] = torch.stack([result.saturated for result in results]).mean()
        on_host = {f"seconds/{name}": value for name, value in seconds.items()}
        on_host["memory/peak_gib"] = devices.peak_memory(device)
        vector = torch.stack([number.float() for number in numbers.values()])
        vector = torch.cat([vector, torch.tensor(list(on_host.values())).to(device, non_blocking=True)])
        means = self.accelerator.reduce(vector, reduction="mean").tolist()
        return dict(zip([*numbers, *on_host], means, strict=True))


def nonfinite(values: dict[str, float]) -> str:
    """The loss, the gradient norm and the rewards that are not finite, as text."""
    broken = [tag for tag, value in values.items() if tag.startswith("reward/") and not math.isfinite(value)]
    names = {tag.removeprefix("reward/") for tag in broken} - {"mean", "std", "min", "max", "above_target"}
    text = f"loss {values['loss']:.2e}, gradient norm {values['gradient_norm']:.2e}"
    return ", ".join([text, *sorted(names)])
