"""Validation shared out to several processes: the same images and numbers, in the same order, as by one."""

import copy
import threading
from types import SimpleNamespace

import refl_lora
from refl.model.ddpm import Ddpm
from refl.model.lora import add_lora
from refl.model.stable_diffusion import encode_prompts
from refl.reward.rewards import WeightedRewards

import pytest
import torch


class Processes:
    """Threads in the place of processes: `gather` is that of torch.distributed, in the order of the ranks."""

    def __init__(self, world: int):
        self.barrier, self.slots = threading.Barrier(world, timeout=1200), [None] * world

    def accelerator(self, rank: int) -> SimpleNamespace:
        def gather(tensor):
            self.slots[rank] = tensor
            self.barrier.wait()
            together = torch.cat(self.slots)
            self.barrier.wait()
            return together

        return SimpleNamespace(
            process_index=rank, num_processes=len(self.slots), device=torch.device("cpu"), gather=gather
        )

    def run(self, function) -> list:
        """function(accelerator) of each rank."""
        results = [None] * len(self.slots)

        def run_one(rank):
            try:
                results[rank] = function(self.accelerator(rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=run_one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture
def models(parts, reward) -> refl_lora.Models:
    """A model with one reward that it is trained on and one that it is not."""
    lora = add_lora(parts.unet, 2, 2, 0)
    red = {"red": lambda images, prompts: images[:, 0].mean((1, 2))}
    return refl_lora.Models(
        parts.unet, lora, parts.vae, WeightedRewards({"imagereward": reward}, {"imagereward": 1.0}),
        Ddpm(parts.scheduler_config, 2), held_out=WeightedRewards(red, {"red": 1.0}),
    )  # fmt: skip


# Processes, prompts, images of each, batch: more or fewer images than processes, none a multiple.
@pytest.mark.parametrize(
    ("world", "num_prompts", "images_per_prompt", "batch"),
    [(3, 4, 1, 1), (3, 4, 2, 2), (4, 3, 1, 2), (5, 2, 3, 1)],
)
def test_any_number_of_processes_finds_what_one_finds(
    models, parts, world, num_prompts, images_per_prompt, batch
):
    distinct = [f"{number} red cats" for number in range(num_prompts)]
    prompts = [prompt for prompt in distinct for _ in range(images_per_prompt)]
    embeds = dict(zip(distinct, encode_prompts(parts, distinct), strict=True))

    def validate(accelerator):
        return refl_lora.validate(
            copy.deepcopy(models), prompts, images_per_prompt,
            lambda chosen: torch.stack([embeds[prompt] for prompt in chosen]), (4, 8, 8), 0, batch,
            accelerator,
        )  # fmt: skip

    [one] = Processes(1).run(validate)
    assert one.scores.shape == (1, len(prompts)) and one.held_out.shape == (1, len(prompts))
    assert one.images.flatten(1).unique(dim=0).shape[0] == len(prompts)  # no two images alike
    for found in Processes(world).run(validate):  # each process has the whole
        assert found.images.shape == one.images.shape
        assert (found.images.int() - one.images.int()).abs().max() <= 1
        for ours, theirs in (
            (found.scores, one.scores), (found.held_out, one.held_out), (found.saturated, one.saturated)
        ):  # fmt: skip
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        if images_per_prompt > 1:
            assert found.diversity.shape == (num_prompts,)
            torch.testing.assert_close(found.diversity, one.diversity, rtol=1e-3, atol=1e-4)
        else:
            assert found.diversity is one.diversity is None
