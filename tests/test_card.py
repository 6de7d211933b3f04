"""The model card: what it says of a real run and of damaged, hostile and evaluated ones."""

import json
import logging
import re
import shutil
import sys
import time
from hashlib import sha256

import refl.__main__
import refl_lora
from refl.model.lora import KOHYA_FILE, LORA_FILE, METADATA_KEY
from refl.report import card
from refl.report.log import Log
from refl.system.errors import UserError

import pytest
import torch
from conftest import run_command, run_script, weight_options
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from test_scripts import run_in_process

SD14 = "CompVis/stable-diffusion-v1-4"


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "prompts.txt").write_text("a red cat\na blue dog\nthree green apples\n")
    prompts = [f"--prompts={folder / 'prompts.txt'}", f"--validation_prompts={folder / 'prompts.txt'}"]
    short = "--num_inference_steps 4 --min_stop 2 --max_stop 3 --max_train_steps 2 --num_validation_images 2"
    short += " --guidance_scale 3 --draw_guidance_scale 4.5"
    with pytest.MonkeyPatch.context() as patch:
        output = f"--output_dir={folder / 'out'}"
        run_in_process(refl_lora, patch, *weight_options(tiny), *prompts, *short.split(), output)
    return folder / "out"


@pytest.fixture
def folder(run, tmp_path):
    """A copy of it."""
    return shutil.copytree(run, tmp_path / "refl_lora")


@pytest.fixture
def evaluation(tmp_path, folder):
    """The folder of an evaluation of the LoRA in `folder`, with another LoRA before it, at two scales."""
    digest = sha256((folder / LORA_FILE).read_bytes()).hexdigest()
    case = {"lora_scale": 1.0, "guidance_scale": 7.5, "step": 2}
    reward = {"difference": 0.5, "low": 0.25, "high": 0.75, "win": 15, "tie": 1, "loss": 4}
    diversity = {"difference": -0.125, "low": -0.2, "high": 0.1}
    means = {"reward": {"mean": 1.5, "low": 1, "high": 2}, "diversity": {"mean": 0.25, "low": 0, "high": 1}}
    after = {"means": means, "against_base": {"reward": reward, "diversity": diversity}}
    base_means = means | {"reward": {"mean": 1.0, "low": 0.5, "high": 1.5}}
    worse = {"means": base_means, "against_base": {"reward": reward | {"difference": -0.5}}}
    about = {
        "date": "2026-11-20", "command": "python evaluate.py `a` | b", "seconds": 1.5, "options": {},
        "num_prompts": 10, "num_images_per_prompt": 2, "reward": "imagereward",
        "measures": ["reward", "diversity"],
        "cases": [
            case | {"name": "base", "lora_path": None, "means": base_means, "against_base": None},
            case | {"name": "oth|er", "lora_path": "checkpoint/other", "lora_sha256": "0"} | after,
            case | {"name": "half", "lora_path": "elsewhere", "lora_sha256": digest} | worse,
            case | {"name": "refl_lora", "lora_path": "elsewhere", "lora_sha256": digest} | after,
        ],
        "shown": 3,
    }  # fmt: skip
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(about))
    Image.new("RGB", (8, 8), "red").save(folder / "grid.png")
    return folder


def read(folder) -> str:
    """The card, which is one to the Hub's library, and whose tables have as many cells as columns."""
    text = (folder / "README.md").read_text()
    assert {"lora", "diffusers"} < set(ModelCard(text).data.tags)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
    for file in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / file).is_file(), file
    assert not re.search(r"^\|.*\n\n\|", text, re.MULTILINE)  # a table that falls apart
    assert "\n\n\n" not in text and not re.search(r"\{[{%]|Undefined", text)
    return text


def test_a_runs_card(folder):
    assert card.write(folder) == folder / "README.md"
    text = read(folder)
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.license) == ("diffusers", None, None)  # the tiny model
    for said in (
        "of rank 4",
        "after 2 steps",
        "arxiv.org/abs/2304.05977",
        "| `max_stop` | `3` |",
        "prompts of `prompts.txt`, 3 of them",
        "No images were trained on",
        f"[{KOHYA_FILE}]({KOHYA_FILE}) is for ComfyUI",
        "**Draw with guidance 4.5**: `guidance_scale=4.5` in diffusers, CFG scale 4.5 in A1111 and ComfyUI.",
        "The LoRA was trained with guidance 3.0.",
        "guidance_scale=4.5, height=64",
        "curves.png",
        "validation_after.png",
        "**Validation reward ",
        f"torch {torch.__version__}",
    ):
        assert said in text
    assert "## Evaluation" not in text
    for name in ("curves.png", "validation_before.png", "validation_after.png"):
        with Image.open(folder / name) as image:
            image.verify()
    before = {path.name: path.read_bytes() for path in folder.glob("[!.]*.*")}
    card.write(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("[!.]*.*")} == before


@pytest.mark.slow
def test_its_code_runs(folder, tiny):
    card.write(folder)
    text = read(folder)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "DDPMScheduler" in code and "num_inference_steps=4, guidance_scale=4.5, height=64" in code
    code = code.replace("path/to/the/base/model", str(tiny / "stable-diffusion-v1-4"))
    ran = run_script(
        sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{code}", HF_HUB_OFFLINE="1"
    )
    assert ran.returncode == 0, ran.stderr
    assert Image.open(folder / "image.png").size == (64, 64)


def test_an_evaluation_stays_with_its_lora(folder, evaluation):
    card.write(folder, evaluation)
    text = read(folder)
    assert "**Mean reward +1.000 → +1.500** at guidance 7.5" in text and "in 75% of images" in text
    assert "| reward | 1.000 | 1.500 | +0.500 | +0.250 to +0.750 | 75% | 5% | 20% |" in text
    assert "| diversity | 0.250 | 0.250 | -0.125 | -0.200 to +0.100 | | | |" in text
    assert text.index("**refl&#95;lora**") < text.index("**half**") < text.index("**oth&#124;er**")
    assert "![without and with this LoRA" in text and "validation_after.png" not in text
    assert (folder / "before_after.png").read_bytes() == (evaluation / "grid.png").read_bytes()
    shutil.rmtree(evaluation)
    card.write(folder)
    assert read(folder) == text
    shutil.copy(folder / "checkpoint-2" / "optimizer.safetensors", folder / LORA_FILE)  # another one
    card.write(folder)
    text = read(folder)
    assert "Of an earlier LoRA" in text and "+0.500" in text and "**Mean reward" not in text


def test_every_base_model_is_in_the_card(folder, evaluation):
    file = evaluation / "evaluation.json"
    about = json.loads(file.read_text())
    shown = about["cases"][3]
    base = about["cases"][0] | {"name": "base guidance 3", "guidance_scale": 3.0}
    base["means"] = base["means"] | {"reward": {"mean": 0.75, "low": 0.5, "high": 1.5}}
    against = {"reward": shown["against_base"]["reward"] | {"difference": 0.625}}
    about["cases"][3] = shown | {"guidance_scale": 3.0, "against_default_base": against}
    about |= {"cases": [*about["cases"], base], "base_guidance_scale": 7.5, "best_against_best": None}
    file.write_text(json.dumps(about))
    card.write(folder, evaluation)
    text = read(folder)
    assert "**Mean reward +0.750 → +1.500** at guidance 3, a difference of +0.500" in text
    assert "The base model at guidance 7.5 has +1.000." in text
    assert text.index("| reward | 0.750 | 1.500 | +0.500 |") < text.index(
        "| reward | 1.000 | 1.500 | +0.625 |"
    )
    assert "Best against best" not in text

    best = {"criterion": "reward", "base": 0, "loras": [{"case": 3, "against_best_base": against},
                                                        {"case": 1, "against_best_base": {}}]}  # fmt: skip
    file.write_text(json.dumps(about | {"best_against_best": best}))
    card.write(folder, evaluation)
    text = read(folder)
    assert "**Best against best**: the base model at guidance 7.5, the LoRA at guidance 3 and scale 1" in text
    assert text.count("Best against best") == 1  # of this folder's LoRA alone
    assert text.count("| reward | 1.000 | 1.500 | +0.625 |") == 1

    best["loras"] = [{"case": 3, "against_best_base": about["cases"][3]["against_base"]}]
    best["base"] = next(
        i for i, c in enumerate(about["cases"]) if not c["lora_path"] and c["guidance_scale"] == 3
    )
    file.write_text(json.dumps(about | {"best_against_best": best}))
    card.write(folder, evaluation)
    text = read(folder)
    assert "**Mean reward +0.750 → +1.500** at guidance 3, a difference of +0.500" in text
    assert text.count("| reward | 0.750 | 1.500 | +0.500 |") == 1  # the best are those at the same guidance


@pytest.mark.parametrize("damage", ["{", "[]", '{"cases": [{}]}', '{"cases": 3}', "{}"])
def test_a_damaged_evaluation(folder, evaluation, damage):
    (evaluation / "evaluation.json").write_text(damage)
    before = read(folder)
    with pytest.raises(UserError, match="--evaluation .*no readable evaluation.json"):
        card.write(folder, evaluation)
    assert read(folder) == before and not (folder / "evaluation.json").exists()
    (folder / "evaluation.json").write_text(damage)  # kept, and damaged since
    card.write(folder)
    assert "## Evaluation" not in read(folder)


def test_what_is_damaged_or_not_there_is_left_out(folder):
    (folder / "options.json").write_text("{")
    for file in (folder / "logs").iterdir():
        file.write_bytes(b"nothing of TensorBoard's")
    shutil.rmtree(folder / "checkpoint-2")
    card.write(folder)
    text = read(folder)
    assert "after 2 steps" in text and "## Limits" in text
    for section in ("## Training", "## Data", "All options", "Software", "Validation reward"):
        assert section not in text
    shutil.rmtree(folder / "logs")
    card.write(folder)
    assert read(folder) == text


def test_a_resumed_runs_log_is_read_without_a_warning(tmp_path, caplog):
    for steps, purge_step in (((1, 2, 3), 0), ((2, 3), 2)):
        log = Log(tmp_path, purge_step=purge_step)
        for step in steps:
            log.scalars({"loss": purge_step}, step)
        log.close()
        time.sleep(1.01)  # a file's name has the second
    assert [point.value for point in card._read_events(tmp_path)[0]["loss"]] == [0, 2, 2]
    assert not caplog.text
    logging.getLogger("tensorboard").warning("another message")
    assert "another message" in caplog.text


def test_hostile_text(folder):
    options = json.loads((folder / "options.json").read_text())
    hostile = "a|b`c\\|<script>[x](y)\n| d {{ 777 * 1000 }} {% raw %}"
    (folder / "options.json").write_text(
        json.dumps(dict.fromkeys(options, hostile) | {"logging_dir": "logs"})
    )
    card.write(folder)
    text = read(folder)
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", text) and "[x](y)" not in text and "777000" not in text


def test_sd14_is_told_by_name_and_size(tmp_path):
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    for name, width, is_sd14 in (("stable-diffusion-v1-4", 768, True), ("stable-diffusion-v1-4", 1024, False),
                                 ("stable-diffusion-v1-5", 768, False)):  # fmt: skip
        lora = {
            f"{block}.attn1.to_q.lora.down.weight": torch.zeros(4, 320),
            f"{block}.attn2.to_k.lora.down.weight": torch.zeros(4, width),
        }
        about = {METADATA_KEY: json.dumps({"base_model": f"checkpoint/{name}/"})}
        save_file(lora, tmp_path / LORA_FILE, about)
        card.write(tmp_path)
        text = read(tmp_path)
        data = ModelCard(text).data
        wanted = (SD14, "creativeml-openrail-m") if is_sd14 else (None, None)
        assert (data.base_model, data.license) == wanted
        assert (f'model = "{SD14}"' in text) == is_sd14 == ("CreativeML Open RAIL-M" in text)


def test_as_a_command(folder, tmp_path, monkeypatch, capsys):
    ran = run_command(refl.__main__, monkeypatch, capsys, "card", folder)
    assert (ran.returncode, ran.stdout) == (0, f"model card written: {folder / 'README.md'}\n"), ran.stderr
    ran = run_command(refl.__main__, monkeypatch, capsys, "card", tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith("error: no LoRA at"), ran.stderr
