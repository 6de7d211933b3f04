"""Models that are on the device only while they are used. A copy in the CPU's memory stands for what is on a
GPU, and weights that turn to NaN at home show any use of a model that is not there."""

from contextlib import contextmanager

from refl.model import offload
from refl.model.conditioning import Conditioning
from refl.train.batches import Pretraining

import pytest
import torch
from test_step import STOP, build, refl_step
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda")


class FakeGpu(TorchFunctionMode):
    """What is moved to "cuda" is a copy in the CPU's memory that says it is there."""

    def __init__(self):
        super().__init__()
        self.moved = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.to and args[1] == CUDA:
            copy = args[0].clone()
            self.moved.append(StorageWeakRef(copy.untyped_storage()))
            return copy
        if func == torch.Tensor.device.__get__ and self.holds(args[0]):
            return CUDA
        return func(*args, **(kwargs or {}))

    def holds(self, tensor: torch.Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self.live()

    def live(self) -> list[StorageWeakRef]:
        """Storages there that something still refers to."""
        return [storage for storage in self.moved if not storage.expired()]


@pytest.fixture
def gpu():
    with FakeGpu() as gpu:
        yield gpu


class Small(nn.Module):
    """A weight that two layers share, a buffer, and a trained matrix that is on the GPU for good."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4), requires_grad=False)
        self.tied = self.weight
        self.register_buffer("mean", torch.randn(5))
        self.lora = nn.Parameter(torch.randn(2, 2).to(CUDA))

    def all(self) -> list[torch.Tensor]:
        return [self.weight, self.mean, self.lora]


def state(model: Small) -> list[tuple]:
    """What must be as it was: which tensors, where in memory, with which values."""
    return [(id(t), t.data_ptr(), t.device.type, t.requires_grad, t.tolist()) for t in model.all()]


def devices(model: Small) -> list[str]:
    return [tensor.device.type for tensor in model.all()]


def test_a_visit_moves_what_is_elsewhere_and_restores_it(gpu):
    model = Small()
    before = state(model)
    assert devices(model) == ["cpu", "cpu", "cuda"]
    with offload.on_device(CUDA, model):
        assert devices(model) == ["cuda", "cuda", "cuda"] and model.tied is model.weight
        there = state(model)
        assert [one[-1] for one in there] == [one[-1] for one in before]  # the same values
        assert there[0][1] != before[0][1] and there[1][1] != before[1][1]  # in another place
        assert there[2] == before[2]  # what is there for good is not copied
        with torch.no_grad():
            model.lora.add_(1)  # and may be trained
    assert state(model)[:2] == before[:2]
    assert model.lora.tolist() == (torch.tensor(before[2][-1]) + 1).tolist()


def test_nothing_that_visited_stays_on_the_gpu(gpu):
    model = Small()
    for _ in range(3):
        with offload.on_device(CUDA, model):
            assert len(gpu.live()) == 3  # a shared weight is there once
        assert len(gpu.live()) == 1


def test_visits_may_be_nested(gpu):
    model, other = Small(), Small()
    before = state(model), state(other)
    with offload.on_device(CUDA, model):
        with offload.on_device(CUDA, model, other):
            assert devices(model) == devices(other) == ["cuda"] * 3
            assert len(gpu.live()) == 6  # `model` is not there twice
        assert devices(model) == ["cuda"] * 3 and state(other) == before[1]
    assert state(model) == before[0]


class TooLarge(Small):
    """Its weight moves; then the GPU's memory is full."""

    def buffers(self, recurse=True):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("kind", [Small, TooLarge])
def test_errors_leave_everything_at_home(gpu, kind):
    model = kind()
    before = state(model)
    with pytest.raises(torch.OutOfMemoryError), offload.on_device(CUDA, model):
        assert kind is Small
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert state(model) == before and len(gpu.live()) == 1


class Away:
    """`Models.on_device` of a device that never was: weights of frozen models are NaN outside its blocks."""

    def __init__(self, *models: nn.Module):
        self.weights = {}
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                if not tensor.requires_grad:
                    self.weights[tensor] = tensor.data
                    tensor.data = self.gone(tensor)

    @staticmethod
    def gone(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else torch.zeros_like(tensor)

    @contextmanager
    def on_device(self, *models: nn.Module):
        visitors = [t for m in models for t in (*m.parameters(), *m.buffers()) if t in self.weights]
        for tensor in visitors:
            tensor.data = self.weights[tensor]
        yield
        for tensor in visitors:
            tensor.data = self.gone(tensor)


@pytest.mark.parametrize("lora_in_uncond", [True, False])
def test_the_step_uses_models_only_on_the_device(parts, reward, lora_in_uncond):
    models, conditioning, noise = build(
        parts, reward, torch.float32, guidance=(3.0, 3.0), lora_in_uncond=lora_in_uncond
    )
    prompt = Conditioning(conditioning.prompt)
    pretraining = Pretraining(noise[:, 1], torch.tensor([1, 500, 999]), prompt, noise[:, 2])
    arguments = models, conditioning, noise, STOP, 0.01, 2.0, pretraining
    options = {"noise_distance_weight": 0.3, "pretrain_weight": 0.7}
    always = refl_step(*arguments, **options)
    away = Away(models.base.unet, models.base.vae, *models.rewards.modules())
    assert not refl_step(*arguments, **options).loss.isfinite()  # at home they are of no use
    models.on_device = away.on_device
    visiting = refl_step(*arguments, **options)
    assert torch.equal(visiting.loss, always.loss) and torch.equal(visiting.rewards, always.rewards)
    assert all(map(torch.equal, visiting.gradients, always.gradients))
