"""Fixtures and helpers: a tiny checkpoint with random weights; scripts run in this process or as commands."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# The same arithmetic on every machine: no GPU, and one thread, for tiny models a second one is a loss.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)

from refl.model.lora import LORA_FILE, pack_lora
from refl.model.stable_diffusion import StableDiffusion, load_stable_diffusion
from refl.reward import imagereward
from refl.system.errors import run_as_command
from refl.system.files import write_whole
from refl.system.ownership import PRIVATE
from refl.system.signals import SIGNALS

from random_checkpoint import write_checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LORA = LORA_FILE
# The tiny model's gradients are near this epsilon: AdamW does not blow rounding noise up to whole steps.
SMOOTH = ["--grad_scale=1", "--adam_epsilon=1e-4"]
HANG = 1200  # seconds after which a process counts as hung: far more than any takes on a busy machine


# ------------------------------------------------------------------------------------------------------ tiers


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow as well")


def is_default_tier(config) -> bool:
    """Whether slow tests are left out: unless --all or -m asks for them, or a test is named by its id."""
    named = any("::" in argument for argument in config.args)
    return not (config.option.all or config.option.markexpr or named)


def pytest_collection_modifyitems(config, items):
    if is_default_tier(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_terminal_summary(terminalreporter, config):
    if is_default_tier(config):
        terminalreporter.line("Slow tests were left out; bash tests/run.sh --all runs them as well.")


# --------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """shared(name, make) -> a folder that `make` fills once, for all workers; it is only to be read."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny(shared) -> Path:
    """`checkpoint/` of tiny models with random weights."""
    return shared("tiny", lambda folder: write_checkpoint(folder, "tiny"))


@pytest.fixture(autouse=True)
def fresh_process():
    """Start each test without Accelerate's settings and with the same random numbers; restore the handlers of
    signals after it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def parts(tiny) -> StableDiffusion:
    return load_stable_diffusion(tiny / "stable-diffusion-v1-4", torch.float32, "cpu")


@pytest.fixture
def reward(tiny) -> imagereward.ImageReward:
    return imagereward.load(tiny)


def save_lora(unet, folder: Path, metadata: dict) -> Path:
    """The LoRA of `unet` where training puts it in `folder`."""
    path = folder / LORA_FILE
    write_whole(path, pack_lora(unet, metadata))
    return path


def visible(folder: Path) -> list[str]:
    """What the program wrote for people into a folder, by name."""
    return sorted(path.name for path in folder.iterdir() if path.name != PRIVATE)


def assert_close_loras(ours: dict, theirs: dict) -> None:
    """Two trained LoRAs differ by less than a thousandth of how far they moved; train them with `SMOOTH`."""
    assert ours.keys() == theirs.keys()
    moved = max(value.abs().max() for name, value in theirs.items() if ".lora.up." in name)  # from zero
    assert moved > 1e-4
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() < 1e-3 * moved, name


# ---------------------------------------------------------------------------------------------------- options


def write_prompts(folder: Path) -> Path:
    """A file of four prompts."""
    path = folder / "prompts.txt"
    path.write_text("a red cat\na blue dog\nthree green apples\na hill at night\n")
    return path


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    return write_prompts(tmp_path)


def weight_options(checkpoint: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={checkpoint / 'stable-diffusion-v1-4'}",
        f"--reward_path={checkpoint}",
    ]


@pytest.fixture
def training_options(tiny, prompts_file, tmp_path) -> list[str]:
    """Options of a run that takes seconds; it writes to tmp_path / "out"."""
    return [
        *weight_options(tiny),
        f"--prompts={prompts_file}",
        f"--validation_prompts={prompts_file}",
        f"--output_dir={tmp_path / 'out'}",
        *"--num_inference_steps 4 --min_stop 2 --max_stop 3 --max_train_steps 2".split(),
        *"--gradient_accumulation_steps 2 --num_validation_images 3".split(),
    ]


# ---------------------------------------------------------------------------------------------------- scripts


def run_in_process(script: ModuleType, monkeypatch, *options) -> None:
    """A script's `main` with these options, in this process."""
    monkeypatch.setattr("sys.argv", [script.__name__, *(str(option) for option in options)])
    script.main()


def run_command(script: ModuleType, monkeypatch, capsys, *options) -> subprocess.CompletedProcess:
    """A script as a command, in this process: its exit code and all that it printed."""
    capsys.readouterr()
    code = 0
    with monkeypatch.context() as context:
        context.setattr("sys.argv", [script.__name__, *(str(option) for option in options)])
        try:
            run_as_command(script.main)
        except SystemExit as ended:
            code = ended.code or 0
    return subprocess.CompletedProcess(script.__name__, code, *capsys.readouterr())


def run_script(*command: str | Path, **environment: str) -> subprocess.CompletedProcess:
    """A script as a user runs it, from the repository's root."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
    )


def events(folder: Path) -> EventAccumulator:
    """TensorBoard's curves, images and histograms in `folder`."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
