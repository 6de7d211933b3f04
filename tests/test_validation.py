"""Validation shared out to several processes: the same images and numbers, in the same order, as by one."""

import copy
import threading
from types import SimpleNamespace

import refl_lora
from refl.report.log import Log
from refl.reward.rewards import WeightedRewards
from refl.train.batches import Batches, Inputs
from refl.train.models import load_models
from refl.train.options import Options
from refl.train.validation import Validator

import pytest
import torch

CPU = torch.device("cpu")


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


# Processes, prompts, images of each, batch: more or fewer images than processes, none a multiple.
@pytest.mark.parametrize(
    ("world", "num_prompts", "images_per_prompt", "batch"),
    [(3, 4, 1, 1), (3, 4, 2, 2), (4, 3, 1, 2), (5, 2, 3, 1)],
)
def test_any_number_of_processes_measures_what_one_measures(
    tiny, world, num_prompts, images_per_prompt, batch
):
    options = Options(
        pretrained_model_name_or_path=str(tiny / "stable-diffusion-v1-4"), reward_path=str(tiny),
        num_inference_steps=2, max_stop=1, train_batch_size=batch,
        validation_images_per_prompt=images_per_prompt,
    )  # fmt: skip
    prompts = [f"{number} red cats" for number in range(num_prompts) for _ in range(images_per_prompt)]
    models = load_models(options, CPU, torch.float32)
    models.held_out = WeightedRewards(
        {"red": lambda images, prompts: images[:, 0].mean((1, 2))}, {"red": 1.0}
    )
    one_process = SimpleNamespace(process_index=0, num_processes=1, is_main_process=False)
    batches = Batches(options, Inputs(64, prompts, prompts, []), models, one_process, range(0))

    def validate(accelerator):
        own = copy.deepcopy(models)  # a rollout changes layers for a while
        return Validator(options, own, batches, accelerator, refl_lora.rollout)(0, Log(None))

    [one] = Processes(1).run(validate)
    assert one.rewards.shape == one.held_out.shape == one.saturated.shape == (len(prompts),)
    assert one.images.flatten(1).unique(dim=0).shape[0] == len(prompts)  # no two images alike
    for each in Processes(world).run(validate):  # every process has the whole
        assert each.images.shape == one.images.shape
        assert (each.images.int() - one.images.int()).abs().max() <= 1
        for name in ("rewards", "held_out", "saturated"):
            torch.testing.assert_close(getattr(each, name), getattr(one, name), rtol=1e-4, atol=1e-4)
        assert each.means == pytest.approx(one.means, rel=1e-3, abs=1e-4)
        if images_per_prompt > 1:
            assert each.diversity.shape == (num_prompts,)
            torch.testing.assert_close(each.diversity, one.diversity, rtol=1e-3, atol=1e-4)
        else:
            assert each.diversity is one.diversity is None
