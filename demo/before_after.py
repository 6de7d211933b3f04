"""Base model against LoRA on the demo's held-out prompts: reward, the oracle's verdict, and a picture of
both."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refl import board, diffusion, imagereward  # noqa: E402
from refl.errors import UserError, run_as_command  # noqa: E402
from refl.files import write_whole  # noqa: E402
from refl.prompts import read_prompts  # noqa: E402

from judge import grade  # noqa: E402

SHOWN = 12  # prompts in the picture: the first ones of the file, whatever came out
BATCH = 16


@dataclass
class Options:
    """Draw every held-out prompt with and without the LoRA, from the same noise, with the sampler of
    training."""

    checkpoint: str = "demo/checkpoint"
    """Folder laid out as a user's checkpoint/."""
    lora_path: str = "result/demo/refl_lora"
    """What training wrote."""
    prompts: str = "demo/prompts/held_out.txt"
    """Prompts that training never saw."""
    output_dir: str = "result/demo"
    """Where summary.json and before_after.png go."""
    seed: int = 1000
    """Seed of the first picture's noise."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is none. None: as in training."""
    seconds_training: float | None = None
    """Recorded in the summary."""
    seconds_before: float = 0.0
    """Seconds that passed before this command, counted into seconds_total."""


def main() -> None:
    """Draw, score, judge, show."""
    options = tyro.cli(Options, use_underscores=True)
    started = time.perf_counter()
    prompts = read_prompts(options.prompts)
    try:
        trained = json.loads(Path(options.lora_path, "options.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"no trained LoRA in {options.lora_path} ({error}); bash demo/run.sh makes one."
        ) from error
    steps, guidance = trained["num_inference_steps"], options.guidance_scale or trained["guidance_scale"]
    reward = imagereward.load(options.checkpoint)
    pipeline = diffusion.load_pipeline(
        Path(options.checkpoint) / "stable-diffusion-v1-4", "ddpm", torch.float32, "cpu"
    )
    diffusion.load_lora(pipeline, options.lora_path, 1.0)

    summary, pictures, verdicts, rewards = {}, {}, {}, {}
    for side in ("base", "lora"):
        pipeline.enable_lora() if side == "lora" else pipeline.disable_lora()
        drawn = []
        for start in tqdm(range(0, len(prompts), BATCH), f"drawing with the {side}", unit="batch"):
            batch = prompts[start : start + BATCH]
            seeds = range(options.seed + start, options.seed + start + len(batch))
            drawn.append(diffusion.generate(pipeline, batch, seeds, steps, guidance))
        drawn = torch.cat(drawn)
        with torch.no_grad():
            rewards[side] = torch.cat(
                [reward(drawn[i : i + BATCH], prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
            )
        pictures[side] = [board.to_pil(picture) for picture in drawn]
        verdicts[side] = grade(pictures[side], prompts)
        summary[side] = {"reward_mean": rewards[side].mean().item()} | {
            key: float(right.mean()) for key, right in verdicts[side].items()
        }

    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    headline = (
        f"held-out prompts, before (above) and after {trained['max_train_steps']} steps of ReFL (below): "
        f"fully right {summary['base']['all_right']:.0%} -> {summary['lora']['all_right']:.0%}, reward "
        f"{summary['base']['reward_mean']:+.2f} -> {summary['lora']['reward_mean']:+.2f}"
    )
    rows, captions = [], []
    for start in range(0, SHOWN, SHOWN // 2):
        for side, name in (("base", "before"), ("lora", "after")):
            indices = range(start, start + SHOWN // 2)
            rows.append([pictures[side][index] for index in indices])
            captions.append(
                [
                    f"{name}: {'right' if verdicts[side]['all_right'][index] else 'wrong'}, "
                    f"{rewards[side][index]:+.2f}" + (f"\n{prompts[index]}" if side == "lora" else "")
                    for index in indices
                ]
            )
    board.save_picture(board.grid(rows, captions, 192, headline), output / "before_after.png")

    summary |= {
        "num_prompts": len(prompts),
        "guidance_scale": guidance,
        "seconds_training": options.seconds_training,
        "seconds_total": round(options.seconds_before + time.perf_counter() - started, 1),
        "options": trained,
    }
    write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")

    print(f"\n{len(prompts)} held-out prompts     base     LoRA   difference")
    for key in summary["base"]:
        base, lora = summary["base"][key], summary["lora"][key]
        form = "{:+8.2f} {:+8.2f}     {:+8.2f}" if key == "reward_mean" else "{:8.1%} {:8.1%}     {:+8.1%}"
        print(f"{key:24s}" + form.format(base, lora, lora - base))
    print(f"\npicture: {output / 'before_after.png'}, figures: {output / 'summary.json'}")


if __name__ == "__main__":
    run_as_command(main)
