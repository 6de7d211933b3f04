"""Seconds, FLOPs and memory of our training step, and of the published step ported directly, in alternation.

python benchmarks/step.py                                       # the demo world, on whatever there is
python benchmarks/step.py --size sd14 --resolutions 256 512 --batch_sizes 1 2 4 8 --precisions bf16 fp16 fp32
python benchmarks/step.py --variants ours no_lean no_channels_last no_batched_rollout peft_lora baseline

Each variant lives in a process of its own, loads the same weights, and does the same images: same prompts,
noise and stop indices. They take turns, one optimizer step each, and ratios are those of neighbours. SD-1.4
is its exact architecture with random weights, written to --checkpoint on the first run (4 GB). Results, a
table and a plot go to --output_dir.
"""

import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Literal
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import refl_lora
from refl.model import lean
from refl.model.conditioning import Conditioning
from refl.model.drawing import DTYPES
from refl.model.lora import add_lora
from refl.model.noise_schedule import NoiseSchedule
from refl.model.stable_diffusion import (
    load_stable_diffusion,
    vae_factor,
)
from refl.preflight.cost import flop_counter
from refl.reward import (
    imagereward,
    rewards,
)
from refl.system import (
    devices,
    prompts,
    randomness,
)
from refl.system.files import write_whole
from refl.system.timing import Phases
from refl.train.batches import MicroBatch
from refl.train.models import Models
from refl.train.plan import to_stop

import baseline_step
import torch
import tyro
from accelerate import Accelerator
from diffusers import DDPMScheduler
from matplotlib.figure import Figure
from random_checkpoint import write_checkpoint
from tqdm import tqdm

PHASES = ("text", "rollout", "grad_step", "decode", "reward", "backward", "optimizer")
VARIANTS = {
    "ours": "the step of refl_lora.py",
    "baseline": "the published step, ported directly: baseline_step.py",
    "no_lean": "ours with torch's and diffusers' own layers, which keep more for the backward pass",
    "no_channels_last": "ours with channels first",
    "no_batched_rollout": "ours, each micro-batch rolled out alone",
    "peft_lora": "ours with peft's LoRA layers under autocast",
    "torch_compile": "ours with the UNet compiled",
    "cuda_graphs": "the same, launched as CUDA graphs",
    "fused_adamw": "ours with AdamW's fused kernel",
    "cudnn_benchmark": "ours with convolutions by the algorithm that cuDNN finds fastest for their size",
    "expandable_segments": "ours with an allocator whose segments grow, which wastes less to fragments",
}
# What torch reads once, when a process starts.
ENVIRONMENT = {"expandable_segments": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}


@dataclass
class Options:
    """Our training step against the published one."""

    size: Literal["demo", "sd14"] = "demo"
    """demo: the bundled world; sd14: SD-1.4's and ImageReward's architectures with random weights."""
    resolutions: tuple[int, ...] = (0,)
    """Pixels a side; 0: the model's own."""
    batch_sizes: tuple[int, ...] = (2,)
    """Images of a micro-batch."""
    precisions: tuple[Literal["bf16", "fp16", "fp32"], ...] = ("fp32",)
    """Of the frozen parts."""
    variants: tuple[Literal[tuple(VARIANTS)], ...] = ("ours", "baseline")
    """What to compare; ratios are to the first. What each is, is said at the top of step.py."""
    gradient_accumulation_steps: int = 4
    """Micro-batches of an optimizer step."""
    rollout_batch_size: int = 8
    """As in training."""
    gradient_checkpointing: bool = False
    """As in training; for all variants."""
    num_inference_steps: int = 40
    """DDPM steps."""
    min_stop: int = 30
    """First step that may get the gradient."""
    max_stop: int = 39
    """Last step that may get the gradient."""
    rounds: int = 3
    """Optimizer steps of each variant that count, after one that does not."""
    threads: int = 0
    """Threads of each process on the CPU; 0: torch's choice."""
    checkpoint: str = "result/benchmarks/sd14"
    """Where the random weights are, or are written."""
    output_dir: str = "result/benchmarks/step"
    """Where results.json, table.md and plot.png go."""


@dataclass
class Case:
    """One thing to be measured."""

    resolution: int
    batch_size: int
    precision: str


# ----------------------------------------------------------------------------------------------- one variant


def serve(variant: str, options: Options, case: Case, pipe) -> None:
    """Load a variant; then one optimizer step for each word that comes through the pipe."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        step = Step(variant, options, case)
        while pipe.recv() == "step":
            pipe.send(step())
    except (torch.OutOfMemoryError, MemoryError) as error:
        pipe.send({"error": str(error).partition(". ")[0]})
    except EOFError:
        pass


class Step:
    """A variant, ready to do one optimizer step after another."""

    def __init__(self, variant: str, options: Options, case: Case):
        self.variant = variant
        torch.backends.cudnn.benchmark = variant == "cudnn_benchmark"
        self.is_compiled = variant in ("torch_compile", "cuda_graphs")
        precision = {"fp32": "no"}.get(case.precision, case.precision)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
        self.device = device = self.accelerator.device
        self.dtype = dtype = DTYPES[case.precision]
        folder = Path("demo/checkpoint" if options.size == "demo" else options.checkpoint)
        parts = load_stable_diffusion(folder / "stable-diffusion-v1-4", dtype, device)
        lora = add_lora(parts.unet, 4, 4, 0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # a LoRA that does something: the first one does not
            for matrix in lora:
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.02)
        reward = imagereward.load(folder, device, dtype)
        self.lora = lora
        self.optimizer = torch.optim.AdamW(lora, lr=1e-5, fused=variant == "fused_adamw" or None)

        # the same images for all
        names = prompts.read_prompts(ROOT / "demo/prompts/train.txt" if options.size == "demo" else
                                     ROOT / "data/train_prompts.txt")  # fmt: skip
        own_resolution = parts.unet.config.sample_size * vae_factor(parts.vae)
        shape = parts.latent_shape(case.resolution or own_resolution)
        embeds = dict(zip(names[:32], parts.encode_prompts(names[:32]), strict=True))

        self.schedule = NoiseSchedule(parts.scheduler_config, options.num_inference_steps)

        def micro_batches(step: int) -> list:
            batches = []
            for micro_step in range(options.gradient_accumulation_steps):
                stop = randomness.stop_index(0, 0, micro_step, options.min_stop, options.max_stop)
                noise = randomness.noise((0, 0, step, micro_step), range(case.batch_size), (stop + 1, *shape))
                chosen = [names[(step * 8 + micro_step * 3 + i) % 32] for i in range(case.batch_size)]
                conditioning = Conditioning.stack([embeds[name] for name in chosen]).to(torch.device("cpu"))
                batches.append(MicroBatch(chosen, conditioning, noise, to_stop(self.schedule, stop)))
            return batches

        self.micro_batches, self.index = micro_batches, 0
        if options.gradient_checkpointing:
            for part in (parts.unet, parts.vae):
                part.enable_gradient_checkpointing()
        if variant in ("baseline", "no_channels_last"):
            for part in (parts.unet, parts.vae):
                part.to(memory_format=torch.contiguous_format)
        if variant == "baseline":
            baseline_step.use_eager_attention(reward)
            self.models = baseline_step.Baseline(
                parts.tokenizer, parts.text_encoder, parts.unet, parts.vae,
                DDPMScheduler.from_config(parts.scheduler_config, clip_sample=False),
                reward, self.accelerator.prepare(self.optimizer), self.accelerator,
            )  # fmt: skip
            self.run = lambda batches, phase: baseline_step.baseline_step(
                self.models, [(b.prompts, b.noise, b.plan.terms[0].stop) for b in batches], 0.01,
                options.num_inference_steps, 1.0, phase,
            )  # fmt: skip
            return
        parts.text_encoder = parts.vae.encoder = None
        if variant != "no_lean":
            for model in (parts.unet, parts.vae):
                lean.make_lean(model)
        if variant == "peft_lora":
            for module in parts.unet.modules():
                if type(module) is lean.LoraLinear:
                    module.__class__ = lean.PeftLinear
        self.models = Models(
            parts,
            lora,
            rewards.WeightedRewards({"imagereward": reward}, {"imagereward": 1.0}),
            self.schedule,
        )
        self.models.rewards.validated.add("imagereward")  # costs a backward pass
        if self.is_compiled:
            # Each size by itself: a dynamic one fails in torch 2.13's inductor.
            parts.unet.compile(
                dynamic=False, mode="reduce-overhead" if variant == "cuda_graphs" else "default"
            )
        self.rollout_batch_size = 1 if variant == "no_batched_rollout" else options.rollout_batch_size
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.run = self.ours

    def ours(self, batches: list, phase) -> float:
        """Our step as refl_lora.py does it: sum of the micro-batches' gradients, clip, AdamW."""
        gradients, losses = [torch.zeros_like(matrix) for matrix in self.lora], []
        with torch.autocast(self.device.type, self.dtype, enabled=self.variant == "peft_lora"
                            and self.dtype != torch.float32):  # fmt: skip
            for result, own in refl_lora.refl_step(
                self.models, batches, 0.01, 2.0, 1, self.rollout_batch_size, self.scaler.scale, phase
            ):
                torch._foreach_add_(gradients, own)
                losses.append(result.loss)
        with phase("optimizer"):
            for matrix, gradient in zip(self.lora, gradients, strict=True):
                matrix.grad = gradient / len(batches)
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.lora, 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            loss = torch.stack(losses).mean().item()
        return loss

    def __call__(self) -> dict:
        """One optimizer step: seconds and FLOPs by phase, peak memory, loss, the LoRA's norm."""
        batches, first = self.micro_batches(self.index), self.index == 0
        self.index += 1
        clock = Clock(self.device, count_flops=first and not self.is_compiled)
        reset_peak_memory(self.device)
        started = time.perf_counter()
        with clock:
            loss = self.run(batches, clock)
            synchronize(self.device)
        seconds = time.perf_counter() - started
        return {
            "seconds": clock.seconds() | {"total": seconds},
            "flops": clock.flops,
            "memory": peak_memory(self.device),
            "loss": loss,
            "lora_norm": torch.nn.utils.get_total_norm([m.detach() for m in self.lora]).item(),
            "images": sum(len(batch.prompts) for batch in batches),
            "matmul": None if first else matmul_rate(self.device, self.dtype),
        }


# ------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Seconds and, if so asked, FLOPs of each phase."""

    def __init__(self, device, count_flops: bool):
        self.phases = Phases(device)
        self.flops = defaultdict(int)
        self.counter = flop_counter() if count_flops else None

    def __enter__(self):
        if self.counter:
            self.counter.__enter__()
        return self

    def __exit__(self, *error):
        if self.counter:
            self.counter.__exit__(*error)

    @contextmanager
    def __call__(self, name: str):
        before = self.counter.get_total_flops() if self.counter else 0
        with self.phases(name):
            yield
        if self.counter:
            self.flops[name] += self.counter.get_total_flops() - before

    def seconds(self) -> dict[str, float]:
        return self.phases.pop()


def synchronize(device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device) -> None:
    """Start anew what `peak_memory` returns; on Linux's CPU as well."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device) -> float:
    """GiB: the most that torch's allocator held on a GPU, or that the process held."""
    if device.type != "cuda" and sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) / 2**20
    return devices.peak_memory(device)


def matmul_rate(device, dtype) -> float:
    """FLOP/s of a large matrix product in `dtype`, the best of three."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


# ------------------------------------------------------------------------------------------------------- run


def measure(options: Options, case: Case) -> dict[str, list[dict]]:
    """What each variant found, one entry a round, the first round not counted."""
    context = multiprocessing.get_context("spawn")
    names, workers = options.variants, {}
    for name in names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(name, options, case, theirs), daemon=True)
        with patch.dict(os.environ, ENVIRONMENT.get(name, {})):
            process.start()
        theirs.close()
        workers[name] = process, ours
    found = {name: [] for name in names}
    rounds = [name for _ in range(options.rounds + 1) for name in names]
    for name in tqdm(rounds, f"{case.resolution or ''} batch {case.batch_size} {case.precision}"):
        if found[name] and "error" in found[name][-1]:
            continue
        pipe = workers[name][1]
        try:
            pipe.send("step")
            found[name].append(pipe.recv())
        except (EOFError, BrokenPipeError):
            found[name].append({"error": "the process ended"})
    for process, pipe in workers.values():
        pipe.close()
        process.join(10)
        process.terminate()
    return found


def summarise(found: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians of each variant, and its ratio to the first one round by round."""
    summary, first = {}, next(iter(found.values()))
    for name, entries in found.items():
        if "error" in entries[-1]:
            summary[name] = {"error": entries[-1]["error"]}
            continue
        warm, images = entries[1:], entries[0]["images"]
        seconds = {
            phase: statistics.median(entry["seconds"].get(phase, 0) for entry in warm) / images
            for phase in (*PHASES, "total")
        }
        flops = {phase: entries[0]["flops"].get(phase, 0) / images for phase in PHASES}
        matmul = statistics.median(entry["matmul"] for entry in warm)
        summary[name] = {
            "images_per_second": 1 / seconds["total"],
            "seconds_per_image": seconds,
            "tflop_per_image": {phase: count / 1e12 for phase, count in flops.items()},
            "matmul_tflops": matmul / 1e12,
            "share_of_matmul_rate": sum(flops.values()) / seconds["total"] / matmul,
            "peak_gib": max(entry["memory"] for entry in warm),
            "first_step_seconds": entries[0]["seconds"]["total"],
            "losses": [entry["loss"] for entry in entries],
            "lora_norms": [entry["lora_norm"] for entry in entries],
        }
        if "error" not in first[-1]:
            ratios = [
                other["seconds"]["total"] / own["seconds"]["total"]
                for own, other in zip(first[1:], warm, strict=True)
            ]
            summary[name]["seconds_to_first"] = [min(ratios), statistics.median(ratios), max(ratios)]
    return summary


def table(results: list[dict]) -> str:
    """All results as Markdown."""
    lines = [
        "| pixels | batch | precision | variant | images/s | time, ratio to the first (spread) | peak GiB | TFLOP an image | of matmul rate | largest phases |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        case = f"| {result['resolution'] or 'own'} | {result['batch_size']} | {result['precision']} "
        for name, own in result["variants"].items():
            if "error" in own:
                lines.append(f"{case}| {name} | {own['error']} | | | | | |")
                continue
            total = own["seconds_per_image"]["total"]
            phases = sorted(
                ((seconds / total, phase) for phase, seconds in own["seconds_per_image"].items()
                 if phase != "total"), reverse=True,
            )[:4]  # fmt: skip
            low, middle, high = own.get("seconds_to_first", [float("nan")] * 3)
            count = sum(own["tflop_per_image"].values())
            counted = f"{count:.3g} | {own['share_of_matmul_rate']:.0%}" if count else "not counted |"
            lines.append(
                f"{case}| {name} | {own['images_per_second']:.3g} | {middle:.2f} ({low:.2f} to {high:.2f}) "
                f"| {own['peak_gib']:.2f} | {counted} "
                f"| {', '.join(f'{phase} {share:.0%}' for share, phase in phases)} |"
            )
    return "\n".join(lines) + "\n"


def plot(results: list[dict], path: Path) -> None:
    """Time and memory against batch size, a line for each variant, precision and resolution."""
    lines = defaultdict(list)
    for result in results:
        for name, own in result["variants"].items():
            if "error" not in own:
                label = f"{name}, {result['resolution'] or 'own size'}, {result['precision']}"
                total = own["seconds_per_image"]["total"]
                lines[label].append((result["batch_size"], total, own["peak_gib"]))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for label, points in lines.items():
        batch_sizes, seconds, memory = zip(*sorted(points), strict=True)
        style = "--" if label.startswith("baseline") else "-"
        axes[0].plot(batch_sizes, seconds, "o" + style, label=label)
        axes[1].plot(batch_sizes, memory, "o" + style, label=label)
    for axis, title in zip(axes, ("seconds an image", "peak memory, GiB"), strict=True):
        axis.set(xlabel="images of a micro-batch", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def machine() -> str:
    """What this was measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"


def main() -> None:
    """Weights if there are none; each case; results."""
    os.chdir(ROOT)
    # Memory that is freed goes back to the system, so that the peak is that of one step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    options = tyro.cli(Options, use_underscores=True)
    if options.size == "sd14" and not Path(options.checkpoint, "ImageReward.pt").exists():
        print(f"writing random weights to {options.checkpoint}")
        write_checkpoint(options.checkpoint, "full")
    output, results = Path(options.output_dir), []
    output.mkdir(parents=True, exist_ok=True)
    for resolution, precision, batch_size in product(
        options.resolutions, options.precisions, options.batch_sizes
    ):
        case = Case(resolution, batch_size, precision)
        results.append(asdict(case) | {"variants": summarise(measure(options, case))})
        report = {
            "date": date.today().isoformat(),
            "machine": machine(),
            "command": f"python benchmarks/step.py {' '.join(sys.argv[1:])}",
            "options": asdict(options),
            "results": results,
        }
        write_whole(output / "results.json", json.dumps(report, indent=1) + "\n")
        heading = f"{report['date']}, {report['machine']}: `{report['command']}`"
        write_whole(output / "table.md", f"{heading}\n\n{table(results)}")
    print((output / "table.md").read_text())
    plot(results, output / "plot.png")


if __name__ == "__main__":
    main()
