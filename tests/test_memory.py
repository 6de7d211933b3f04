"""Memory counted beforehand is that of the step as it really runs."""

import shutil
from types import SimpleNamespace

import refl_lora
from refl.model import offload
from refl.model.conditioning import Conditioning
from refl.model.lean import make_lean
from refl.model.lora import add_lora, lora_file
from refl.model.noise_schedule import NoiseSchedule
from refl.model.stable_diffusion import load_stable_diffusion
from refl.preflight import doctor, memory
from refl.reward import rewards
from refl.system import randomness
from refl.system.errors import UserError
from refl.train.batches import MicroBatch
from refl.train.models import Models
from refl.train.options import Options
from refl.train.plan import to_stop

import pytest
import torch
from test_scripts import run_in_process

SLOW = pytest.mark.slow


def test_live_bytes_are_those_of_storages():
    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b * 2  # with b: 8000 bytes
        return c.view(10, 100).add_(1)[0]  # no new storage

    assert memory.peak_of(run) == 8000


@pytest.fixture
def options(tiny):
    return Options(
        pretrained_model_name_or_path=str(tiny / "stable-diffusion-v1-4"),
        reward_path=str(tiny),
        train_batch_size=3,
        gradient_accumulation_steps=2,
        guidance_scale=1.0,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"decode_batch_size": 3}, marks=SLOW),
        pytest.param({"gradient_checkpointing": True}, marks=SLOW),
    ],
)
@pytest.mark.parametrize("resolution", [64, pytest.param(128, marks=SLOW)])
def test_the_count_is_what_a_step_takes(options, tiny, changes, resolution):
    for name, value in changes.items():
        setattr(options, name, value)
    device, dtype, side = torch.device("cpu"), torch.float32, resolution // 8
    parts = load_stable_diffusion(options.pretrained_model_name_or_path, dtype, device)
    models = Models(
        parts,
        add_lora(parts.unet, 4, 4, 0),
        rewards.load("imagereward", tiny, device, dtype),
        NoiseSchedule(parts.scheduler_config, 3),
    )
    for model in (parts.unet, parts.vae):
        make_lean(model)
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
    noise = randomness.noise((1,), range(3), (2, 4, side, side))
    conditioning = Conditioning({"encoder_hidden_states": torch.zeros(3, 77, 16)})
    plan = to_stop(models.schedule, 1)
    batches = [MicroBatch(["a fox"] * 3, conditioning, noise, plan) for _ in range(2)]

    def step(batches=batches):
        for _ in refl_lora.refl_step(models, batches, 1.0, 2.0, options.decode_batch_size, 8):
            pass

    step()  # the reward looks at its first gradient
    accumulated = [memory.peak_of(lambda times=times: step(times * batches)) for times in (2, 4)]
    assert accumulated[1] < 1.05 * accumulated[0]
    counted = memory.count(options, dtype, resolution)
    largest = max(size for _, size in counted.values())
    assert largest * 2**30 == pytest.approx(memory.peak_of(step), rel=0.1)
    trained = 16 * sum(matrix.numel() for matrix in models.lora)
    parts.vae.encoder = None
    frozen = sum(
        p.nbytes for m in (parts.unet, parts.vae, *models.rewards.modules()) for p in m.parameters()
        if not p.requires_grad
    )  # fmt: skip
    assert {weights for weights, _ in counted.values()} == {(trained + frozen) / 2**30}


@SLOW
def test_what_needs_less_is_counted_as_less(options, tmp_path, monkeypatch):
    def needed(dtype=torch.float32, **changes):
        return memory.needed(SimpleNamespace(**(vars(options) | changes)), dtype, 256)

    full = needed()
    assert needed(low_memory=True) < needed(gradient_checkpointing=True) < full
    assert needed(torch.bfloat16) < full < needed(guidance_scale=3.0)
    source = "def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n"
    (tmp_path / "needs_no_memory.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    own = needed(reward="needs_no_memory:red")
    assert own < needed(reward="needs_no_memory:red", held_out_reward="imagereward") <= full


@pytest.fixture
def made_up(monkeypatch):
    """Memory by a formula: the tiny model's is all the same."""

    def needed(options, dtype, resolution):
        size = 10 * dtype.itemsize + options.train_batch_size - options.gradient_checkpointing
        return size - 5 * options.low_memory

    monkeypatch.setattr(memory, "needed", needed)


def test_advice_names_what_needs_less(options, made_up):
    assert memory.advice(options, torch.float32, 64).splitlines() == [
        "  --gradient_checkpointing: 42.0 GiB",
        "  --low_memory: 38.0 GiB",
        "  --train_batch_size 1 --gradient_accumulation_steps 6: 41.0 GiB",
        "  --low_memory --train_batch_size 1 --gradient_accumulation_steps 6: 36.0 GiB",
        "  --mixed_precision bf16 (Ampere or newer): 23.0 GiB",
        "  --mixed_precision fp16: 23.0 GiB",
    ]
    options.low_memory, options.train_batch_size, options.gradient_checkpointing = True, 1, True
    options.gradient_accumulation_steps, options.mixed_precision = 6, "bf16"
    assert memory.advice(options, torch.bfloat16, 64) == ""
    assert "lower --resolution." in doctor.memory_advice(options)


def test_the_precision_is_the_one_of_the_run(options, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert doctor._dtype_and_resolution(options) == (torch.float32, 64)  # no GPU, float32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for capability, dtype in (((8, 6), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert doctor._dtype_and_resolution(options)[0] == dtype
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert doctor._dtype_and_resolution(options)[0] == torch.float32
    options.mixed_precision = "fp16"
    assert doctor._dtype_and_resolution(options)[0] == torch.float16


def test_low_memory_trains_the_same_lora(training_options, tmp_path, monkeypatch):
    shared = ["--max_train_steps=2", "--num_validation_images=2", "--validation_steps=1"]
    for name, flags in (("plain", []), ("low", ["--low_memory"])):
        output = f"--output_dir={tmp_path / name}"
        run_in_process(refl_lora, monkeypatch, *training_options, *shared, *flags, output)
    plain, low = (lora_file(tmp_path / name).read_bytes() for name in ("plain", "low"))
    assert plain == low


def test_models_are_restored_after_their_time_on_a_device():
    class Tensor:
        def __init__(self, device):
            self.device, self.data = torch.device(device), self

        def to(self, device, non_blocking):
            return ("moved", device)

    gpu, here, there = torch.device("cuda"), Tensor("cuda:0"), Tensor("cpu")
    model = SimpleNamespace(parameters=lambda: [here, there], buffers=lambda: [])
    with pytest.raises(RuntimeError, match="stop"), offload.on_device(gpu, model):
        assert there.data == ("moved", gpu) and here.data is here
        raise RuntimeError("stop")
    assert there.data is there


def test_pinned_memory_is_rounded_up_to_powers_of_two(options):
    model = torch.nn.Linear(3, 100)  # 1,200 bytes and 400
    assert offload.pinned_size(model.requires_grad_(False)) == 2048 + 512
    assert offload.pinned_size(model.requires_grad_(True)) == 0  # what is trained stays on the GPU
    with_reward = memory.pinned(options, torch.float32)
    frozen = max(weights for weights, _ in memory.count(options, torch.float32, 64).values())
    assert frozen < with_reward < 2 * frozen
    half = memory.pinned(options, torch.bfloat16)
    assert half == pytest.approx(with_reward / 2, rel=0.1)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_out_of_memory_says_what_to_change(training_options, tmp_path, monkeypatch, capsys, made_up, rank):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(refl_lora, "rollout", full)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    arguments = ["refl_lora.py", *training_options, f"--output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", arguments)
    main = refl_lora.main

    def on_that_rank():
        try:
            main()
        finally:
            monkeypatch.setenv("LOCAL_RANK", rank)

    with pytest.raises(SystemExit) as ended:
        refl_lora.run_as_command(on_that_rank, doctor.memory_advice_for_training)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in error
    assert "memory does not suffice (CUDA out of memory)" in error
    # The first process counts, in the float32 that it ran in; another has no time to.
    assert ("\n  --mixed_precision fp16: 2" in error) == (rank == "0")
    assert ("python -m refl doctor, with the same options" in error) == (rank == "1")


def test_a_model_that_cannot_be_built(options, tiny, tmp_path):
    shutil.copytree(tiny / "stable-diffusion-v1-4", tmp_path / "model")
    config = tmp_path / "model/unet/config.json"
    config.write_text(config.read_text().replace("CrossAttnDownBlock2D", "NoSuchBlock2D"))
    options.pretrained_model_name_or_path = str(tmp_path / "model")
    with pytest.raises(UserError, match="NoSuchBlock2D"):
        memory.count(options, torch.float32, 64)


def test_weights_that_are_not_there(options, tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "weights")
    (tmp_path / "weights/ImageReward.pt").write_bytes(b"")
    options.reward_path = str(tmp_path / "weights")
    with pytest.raises(UserError, match="ImageReward.pt is damaged"):
        memory.count(options, torch.float32, 64)
