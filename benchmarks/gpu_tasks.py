"""Tasks of benchmarks/gpu.py: each checks or measures one thing and runs in a process of its own.

python benchmarks/gpu_tasks.py gradients_bf16 --work_dir DIR --size tiny     # writes DIR/gradients_bf16.json
"""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import refl_lora
from refl.model import offload
from refl.preflight import memory
from refl.system.files import write_whole
from refl.train.options import Options as TrainingOptions

import step
import torch
import tyro
from random_checkpoint import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class Options:
    """Run one task."""

    task: Annotated[str, tyro.conf.Positional]
    """One of TASKS."""
    work_dir: str
    """Weights and intermediate files, shared by the tasks; the result goes to work_dir/TASK.json."""
    size: Literal["full", "tiny"] = "full"
    """full: SD-1.4's and ImageReward's architectures; tiny: models for a quick look. Weights are random."""


@dataclass
class Result:
    """Outcome of a task."""

    status: Literal["passed", "failed", "measured", "skipped", "error", "timeout"]
    detail: str  # one line
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Skip(Exception):
    """A task that cannot run on this machine; the message is the reason."""


def check(passed: bool, detail: str, **numbers: Any) -> Result:
    return Result("passed" if passed else "failed", detail, numbers)


def weights(options: Options) -> Result:
    """Write random weights, if there are none, and say what machine this is."""
    for size in {"tiny", options.size}:
        folder = Path(options.work_dir) / f"weights-{size}"
        if not (folder / "written").exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_checkpoint(folder, size)
            (folder / "written").touch()
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")}
    machine = step.machine()
    return Result("measured", machine, {"machine": machine, "gpus": torch.cuda.device_count()} | libraries)


# --------------------------------------------------------------------------------------- the step, in process


def step_options(options: Options, **changes: Any) -> step.Options:
    """Options of benchmarks/step.py: one micro-batch of one image unless `changes` say otherwise."""
    defaults = {"num_inference_steps": 4, "min_stop": 2, "max_stop": 2, "gradient_accumulation_steps": 1}
    return step.Options(size="sd14", checkpoint=str(weights_folder(options)), **(defaults | changes))


def weights_folder(options: Options) -> Path:
    return Path(options.work_dir) / f"weights-{options.size}"


def resolution(options: Options, pixels: int) -> int:
    """`pixels` a side for full-size models; 0, the model's own, for tiny ones."""
    return pixels if options.size == "full" else 0


def gradients_of(options: Options, precision: str) -> dict[str, Tensor]:
    """Gradient of each LoRA matrix in one optimizer step at 256 x 256, on the CPU, and the loss."""
    one = step.Step("ours", step_options(options), step.Case(resolution(options, 256), 1, precision))
    loss = one()["loss"]
    gradients = {f"{index:03d}": matrix.grad.float().cpu() for index, matrix in enumerate(one.lora)}
    return gradients | {"loss": torch.tensor(loss)}


def reference(options: Options) -> Result:
    """Gradients in float32 on the CPU."""
    found = gradients_of(options, "fp32")
    save_file(found, Path(options.work_dir) / "reference.safetensors")
    return Result("measured", f"loss {found['loss']:.6f}, float32 on the CPU")


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


def difference(ours: Tensor, other: Tensor) -> dict[str, float]:
    """Relative norm of the difference, and cosine."""
    return {
        "relative_difference": ((ours - other).norm() / other.norm()).item(),
        "cosine": torch.cosine_similarity(ours, other, dim=0).item(),
    }


# Largest relative difference of the LoRA's gradient to that of float32 on the CPU. bfloat16 on the CPU has
# 0.019 at full size, measured; float16 has 8 times finer steps, TF32, which is not float32, 4 times finer.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.06}


def gradients(options: Options, precision: str) -> Result:
    """The GPU's gradients in `precision` against the CPU's in float32, at 256 x 256."""
    file = Path(options.work_dir) / "reference.safetensors"
    if precision == "fp16":
        require_gpus(1)  # accelerate has no float16 on the CPU
    if not file.exists():
        raise Skip("the task `reference` made no gradients to compare with")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    expected, found = load_file(file), gradients_of(options, precision)
    losses = expected.pop("loss").item(), found.pop("loss").item()
    numbers = difference(flat(found), flat(expected))
    is_finite = flat(found).isfinite().all().item()
    relative = numbers["relative_difference"]
    return check(
        is_finite and relative < TOLERANCES[precision],
        f"relative difference {relative:.2e}, at most {TOLERANCES[precision]}",
        **numbers, losses=losses,
    )  # fmt: skip


def host_syncs(options: Options) -> Result:
    """Places where `refl_step` makes the CPU wait for the GPU, as CUDA itself reports them."""
    require_gpus(1)
    one = step.Step("ours", step_options(options), step.Case(resolution(options, 256), 1, "bf16"))
    batches = one.micro_batches(0)
    run = partial(refl_lora.refl_step, one.models, batches, 0.01, 2.0)
    list(run())  # CUDA's libraries start up
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        list(run())
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return check(not places, f"{len(places)} host syncs in a step {sorted(set(places))}", syncs=len(places))


def memory_count(options: Options) -> Result:
    """Memory of a step as it is counted beforehand against torch's allocator, at 512 x 512, batch 2."""
    require_gpus(1)
    numbers, ratios = {}, []
    own = TrainingOptions(
        pretrained_model_name_or_path=str(weights_folder(options) / "stable-diffusion-v1-4"),
        reward_path=str(weights_folder(options)), train_batch_size=2, gradient_accumulation_steps=4,
        guidance_scale=1.0,
    )  # fmt: skip
    for precision in ("bf16", "fp32"):
        case = step.Case(resolution(options, 512), 2, precision)
        one = step.Step("ours", step_options(options, gradient_accumulation_steps=4), case)
        measured = [one() for _ in range(2)][1]["memory"]
        counted = memory.count(own, step.DTYPES[precision], case.resolution or 64)
        counted = max(sum(sizes) for sizes in counted.values())
        numbers[precision] = {"counted_gib": counted, "measured_gib": measured}
        ratios.append(measured / counted)
        del one
        gc.collect()
        torch.cuda.empty_cache()
    detail = "; ".join(
        f"{name} {own['measured_gib']:.2f} GiB measured, {own['counted_gib']:.2f} counted"
        for name, own in numbers.items()
    )
    return check(all(0.8 < ratio < 1.15 for ratio in ratios), f"{detail}; ratio 0.8 to 1.15", **numbers)


def offloading(options: Options) -> Result:
    """A step with the frozen models in pinned memory gives the gradient of one with them on the GPU."""
    one = step.Step("ours", step_options(options), step.Case(resolution(options, 512), 1, "bf16"))
    models, device, batches, numbers = one.models, one.device, one.micro_batches(0), {}

    def run(name: str) -> Tensor:
        step.reset_peak_memory(device)
        started = time.perf_counter()
        [(_, found)] = refl_lora.refl_step(models, batches, 0.01, 2.0)
        step.synchronize(device)
        numbers[f"{name}_seconds"] = time.perf_counter() - started
        numbers[f"{name}_peak_gib"] = step.peak_memory(device)
        return torch.cat([gradient.flatten() for gradient in found]).double()

    run("first")
    resident = run("resident")
    for model in (models.base.unet, models.base.vae, *models.rewards.modules()):
        model.cpu()
        if device.type == "cuda":
            offload.pin(model)
    for matrix in models.lora:
        matrix.data = matrix.data.to(device)
    models.on_device = partial(offload.on_device, device)
    numbers |= difference(run("offloaded"), resident)
    relative = numbers["relative_difference"]
    return check(
        relative < 1e-3,
        f"relative difference {relative:.1e}, at most 1e-3; peak {numbers['offloaded_peak_gib']:.2f} GiB, "
        f"{numbers['resident_peak_gib']:.2f} with all on the device",
        **numbers,
    )


def require_gpus(number: int) -> None:
    """Raises `Skip` where fewer are visible."""
    if torch.cuda.device_count() < number:
        raise Skip(f"needs {number} GPU{'s' if number > 1 else ''}, {torch.cuda.device_count()} visible")


# -------------------------------------------------------------------------------------- training, as users do


TRAINING = (
    "--num_inference_steps 4 --min_stop 2 --max_stop 3 --max_train_steps 4 --checkpointing_steps 2 "
    "--learning_rate 1e-3 --train_batch_size 2 --gradient_accumulation_steps 2 --num_validation_images 2 "
    "--validation_steps 0 --mixed_precision no"
).split()


def train(options: Options, name: str, *flags: str, processes: int = 1, start: Path | None = None) -> Path:
    """Train tiny models into a folder, from a copy of the checkpoint `start` if given; returns the folder."""
    folder, weights = Path(options.work_dir) / f"train-{name}", Path(options.work_dir) / "weights-tiny"
    shutil.rmtree(folder, ignore_errors=True)
    if start:
        shutil.copytree(start, folder / start.name)
    command = [
        "bash", "train_refl_lora.sh", *TRAINING, f"--output_dir={folder}", f"--reward_path={weights}",
        f"--pretrained_model_name_or_path={weights / 'stable-diffusion-v1-4'}", *flags,
    ]  # fmt: skip
    environment = os.environ | {"NUM_PROCESSES": str(processes), "PYTHON": sys.executable}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code:
        raise RuntimeError(f"training into {folder} ended with exit code {code}; log.txt says why")
    return folder


def trained(folder: Path) -> Tensor:
    """The LoRA's matrices B, which start at zero: all that training made of them."""
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return flat({name: value for name, value in weights.items() if ".lora.up." in name or "lora_B" in name})


def resume(options: Options) -> Result:
    """A run resumed from its middle ends as the run that was not stopped.

    A GPU adds some sums in any order, so two runs of one command may differ; a resumed one may differ ten
    times as much.
    """
    straight = train(options, "straight")
    again, resumed = train(options, "again"), train(options, "resumed", start=straight / "checkpoint-2")
    noise = difference(trained(again), trained(straight))["relative_difference"]
    found = difference(trained(resumed), trained(straight))["relative_difference"]
    return check(
        found <= 10 * noise + 1e-6,
        f"relative difference {found:.1e}, of two runs of one command {noise:.1e}",
        resumed=found, repeated=noise,
    )  # fmt: skip


def same_training(options: Options, name: str, *flags: str, processes: int = 1) -> Result:
    """A run with other flags for the same samples ends near the run without: cosine of the LoRAs 0.99."""
    straight = Path(options.work_dir) / "train-straight"
    if not (straight / "pytorch_lora_weights.safetensors").exists():
        straight = train(options, "straight")
    numbers = difference(trained(train(options, name, *flags, processes=processes)), trained(straight))
    return check(numbers["cosine"] > 0.99, f"cosine {numbers['cosine']:.6f}, at least 0.99", **numbers)


def two_processes(options: Options) -> Result:
    """Two processes (NCCL on GPUs, gloo without) with batch 1 train as one with batch 2."""
    if torch.cuda.is_available():
        require_gpus(2)
    return same_training(options, "two", "--train_batch_size", "1", processes=2)


def low_memory(options: Options) -> Result:
    """--low_memory trains the LoRA that training without it does."""
    return same_training(options, "low_memory", "--low_memory")


# ----------------------------------------------------------------------------------------------- measurements


def variants(
    options: Options,
    names: tuple[str, ...],
    precision: str = "bf16",
    batch_size: int = 2,
    micro_steps: int = 4,
) -> Result:
    """Variants of benchmarks/step.py against `ours`, in turn, one optimizer step each, at 512 x 512."""
    if options.size == "tiny" and {"torch_compile", "cuda_graphs"} & set(names):
        raise Skip("compiling takes longer than tiny models are worth")
    output = (Path(options.work_dir) / f"step-{options.task}").resolve()
    folder = weights_folder(options).resolve()
    shutil.rmtree(output, ignore_errors=True)
    rollout, rounds = ("40", "30", "39"), "3"
    if options.size == "tiny":
        rollout, rounds = ("4", "2", "3"), "1"
    settings = {
        "size": "sd14", "checkpoint": str(folder), "output_dir": str(output), "precisions": precision,
        "resolutions": str(resolution(options, 512)), "batch_sizes": str(batch_size),
        "gradient_accumulation_steps": str(micro_steps), "rounds": rounds,
        **dict(zip(("num_inference_steps", "min_stop", "max_stop"), rollout, strict=True)),
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "benchmarks/step.py", *flags, "--variants", "ours", *names]
    subprocess.run(command, cwd=ROOT, check=True)
    [case] = json.loads((output / "results.json").read_text())["results"]
    found = case["variants"]
    if "error" in found["ours"]:
        return Result("error", found["ours"]["error"], found)
    times = {name: own.get("error") or f"{own['seconds_to_first'][1]:.2f}" for name, own in found.items()}
    detail = ", ".join(f"{name} {times[name]}" for name in names)
    speed = found["ours"]["images_per_second"]
    return Result("measured", f"ours {speed:.3g} images/s; seconds, ours = 1: {detail}", found)


TASKS: dict[str, Callable[[Options], Result]] = {
    "weights": weights,
    "reference": reference,
    "gradients_fp32": partial(gradients, precision="fp32"),
    "gradients_bf16": partial(gradients, precision="bf16"),
    "gradients_fp16": partial(gradients, precision="fp16"),
    "host_syncs": host_syncs,
    "memory": memory_count,
    "offloading": offloading,
    "resume": resume,
    "low_memory": low_memory,
    "two_processes": two_processes,
    "settings": partial(variants, names=("no_channels_last", "cudnn_benchmark", "expandable_segments")),
    "baseline": partial(
        variants, names=("no_lean", "no_batched_rollout", "peft_lora", "fused_adamw", "baseline")
    ),
    # One micro-batch, because each number of images that is rolled out together is compiled by itself.
    "torch_compile": partial(variants, names=("torch_compile",), batch_size=4, micro_steps=1),
    "cuda_graphs": partial(variants, names=("cuda_graphs",), batch_size=4, micro_steps=1),
    "fp16": partial(variants, names=("baseline",), precision="fp16"),
    "fp32": partial(variants, names=("baseline",), precision="fp32"),
}


def main() -> None:
    """Run one task and write its result."""
    os.chdir(ROOT)
    options = tyro.cli(Options, use_underscores=True)
    started = time.perf_counter()
    try:
        result = TASKS[options.task](options)
    except Skip as reason:
        result = Result("skipped", str(reason))
    result.seconds = time.perf_counter() - started
    write_whole(Path(options.work_dir) / f"{options.task}.json", json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
