"""Only the program's own files are replaced or deleted, and one process at a time writes to a folder."""

import json
import os
import shutil
import subprocess
import sys
from threading import Timer

import evaluate
import inference
import inference_lora
import refl_lora
from refl.model import merge
from refl.model.lora import KOHYA_FILE
from refl.report import card, outputs
from refl.system import checkpoints, ownership
from refl.system.errors import UserError
from refl.system.ownership import PRIVATE, OutputFolder, locks_released, take

import pytest
from conftest import LORA, ROOT, run_in_process, weight_options, write_prompts
from PIL import Image, ImageOps

# ---------------------------------------------------------------------------------------------- the mechanism


def test_own_files_are_replaced_and_others_are_not(tmp_path):
    output = OutputFolder(tmp_path)
    output.write("card.md", "one")
    output.write("sub/card.md", "two")
    output.write("card.md", "three")
    assert (tmp_path / "card.md").read_text() == "three" and (tmp_path / "sub/card.md").read_text() == "two"
    assert not list((tmp_path / PRIVATE).glob("*card.md"))
    again = OutputFolder(tmp_path)  # of another process
    again.check(["card.md", "sub/card.md", "new.md"])
    (tmp_path / "card.md").write_text("edited")
    (tmp_path / "foreign.md").write_text("foreign")
    with pytest.raises(UserError, match=r"card\.md, foreign\.md would be replaced, and this program did not"):
        again.check(["card.md", "foreign.md", "new.md"])
    for name in ("card.md", "foreign.md"):
        before = (tmp_path / name).read_text()
        with pytest.raises(UserError, match=f"{name} would be replaced"):
            again.write(name, "new")
        again.delete(name)
        assert (tmp_path / name).read_text() == before
    (tmp_path / "card.md").write_text("one")  # what the program wrote earlier is its own as well
    again.delete("card.md")
    assert not (tmp_path / "card.md").exists()


def test_a_kill_at_any_point_of_writing_leaves_a_file_that_is_own(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    OutputFolder(tmp_path).write("a", "old")
    for owner, name in ((ownership, "write_synced"), (OutputFolder, "record"), (ownership, "sync_folder")):
        with monkeypatch.context() as context:
            context.setattr(owner, name, kill)
            with pytest.raises(Killed):
                OutputFolder(tmp_path).write("a", f"new {name}")
        OutputFolder(tmp_path).check(["a"])
    records = tmp_path / PRIVATE / "written-0.sha256"
    records.write_bytes(records.read_bytes()[:-10])  # the end of the last line was not written
    OutputFolder(tmp_path).record("b", b"whole")
    assert OutputFolder(tmp_path).written.keys() >= {"a", "b"}


def test_records_of_several_processes_count(tmp_path, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        OutputFolder(tmp_path).write(f"{rank}.png", rank)
    OutputFolder(tmp_path).check(["0.png", "1.png"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "a").mkdir(), "a is a folder, where a file is to be written"),
        (lambda f: (f / "a").symlink_to(f / "nothing"), "a would be replaced"),
        (lambda f: os.mkfifo(f / "a"), "a would be replaced"),
        (lambda f: (f / "sub").write_text(""), "sub is not a folder"),
    ],
)
def test_obstacles_are_found_before_the_work(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        OutputFolder(tmp_path).check(["a", "sub/b"])


def test_an_input_is_never_replaced(tmp_path):
    OutputFolder(tmp_path).write("prompts.csv", "text\na cat\n")
    OutputFolder(tmp_path).check(["prompts.csv"])
    with pytest.raises(UserError, match=r"prompts\.csv would be replaced"):
        OutputFolder(tmp_path).check(["prompts.csv"], inputs=[tmp_path / "sub" / ".." / "prompts.csv"])


# ------------------------------------------------------------------------------------------------- one writer

HOLD = """
import sys, time
from refl.system.ownership import take
take(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_one_process_writes_to_a_folder(tmp_path):
    folder = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"out is in use by process {holder.pid} on .*, since 20..-"):
            take(folder)
    finally:
        holder.kill()
        holder.communicate()
    assert (folder / PRIVATE / "lock").exists()  # left behind, and no hindrance
    with locks_released():
        take(folder)
        take(folder)  # the same process may
        take(folder).write("a", "text")
    assert (folder / "a").exists()


def test_a_process_that_is_ending_is_waited_for(tmp_path):
    ends = HOLD.replace("time.sleep(600)", "ownership.mark_ending(); input()")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"from refl.system import ownership{ends}", tmp_path], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    Timer(0.7, holder.communicate, ["end\n"]).start()
    with locks_released():
        take(tmp_path)
        assert holder.wait() == 0


def test_a_folder_in_which_nothing_was_written_disappears(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(KeyError), locks_released():
            take(tmp_path / name)
            raise KeyError
    assert (tmp_path / "old").is_dir() and not list((tmp_path / "old").iterdir())
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------- wrong uses (table)


@pytest.fixture(scope="module")
def finished(shared, tiny):
    """The folder of a finished run, and prompts beside it."""

    def make(folder):
        write_prompts(folder)
        with pytest.MonkeyPatch.context() as patch:
            run_in_process(refl_lora, patch, *training(folder, tiny, folder / "run"))

    return shared("owned", make)


def training(folder, tiny, output) -> list[str]:
    return [
        *weight_options(tiny), f"--output_dir={output}", f"--prompts={folder / 'prompts.txt'}",
        f"--validation_prompts={folder / 'prompts.txt'}", "--also_kohya",
        *"--num_inference_steps 4 --min_stop 2 --max_stop 3 --gradient_accumulation_steps 1".split(),
        *"--max_train_steps 2 --checkpointing_steps 1 --num_validation_images 1 --early_stop".split(),
    ]  # fmt: skip


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, with a file of prompts beside it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def without_records(run):
    """The folder as earlier versions left it."""
    shutil.rmtree(run / PRIVATE)


MORE = ["--max_train_steps=3"]
MINE = "written by hand"
# What a user has in the folder, and the message.
FOREIGN = {
    LORA: "pytorch_lora_weights.safetensors would be replaced",
    KOHYA_FILE: "kohya_lora.safetensors would be replaced",
    "README.md": "README.md would be replaced",
    "options.json": "options.json would be replaced",
    "curves.png": "curves.png would be replaced",
    "validation_before.png": "validation_before.png would be replaced",
    f"best/{LORA}": f"best/{LORA} would be replaced",
    "checkpoint-500/optimizer.bin": "checkpoint-500 was not written by this program",
    "logs": "logs is not a folder",
    "best": "best is not a folder",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("resume", ["latest", "none"])
def test_training_refuses_files_of_others_before_it_begins(run, tiny, monkeypatch, capsys, name, resume):
    if name in ("logs", "best"):
        shutil.rmtree(run / name)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(MINE)
    before = contents(run)
    options = [*training(run.parent, tiny, run), *MORE, f"--resume_from_checkpoint={resume}"]
    with pytest.raises(UserError, match=FOREIGN[name]):
        run_in_process(refl_lora, monkeypatch, *options)
    assert contents(run) == before
    assert "ReFL:" not in capsys.readouterr().err


def contents(folder):
    """Every file with its bytes, but for the lock, which says who held it last."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.mark.parametrize("is_old", [False, True])
def test_a_finished_run_resumes_with_or_without_records(run, tiny, monkeypatch, is_old):
    if is_old:
        without_records(run)
    (run / "notes.txt").write_text(MINE)
    card_before = (run / "README.md").read_bytes()
    run_in_process(refl_lora, monkeypatch, *training(run.parent, tiny, run), *MORE)
    assert sorted(checkpoints.steps(run)) == [1, 2, 3] and (run / "notes.txt").read_text() == MINE
    assert (run / "README.md").read_bytes() != card_before
    if is_old:  # it may have been edited
        assert (run / PRIVATE / "adopted" / "README.md").read_bytes() == card_before
    OutputFolder(run).check([LORA, KOHYA_FILE, *card.FILES[:-1], "options.json", f"best/{LORA}"])


def test_starting_anew_deletes_own_files_alone(run, tiny, monkeypatch):
    (run / "best" / "notes.txt").write_text(MINE)
    options = training(run.parent, tiny, run)
    options.remove("--early_stop")
    run_in_process(refl_lora, monkeypatch, *options, "--resume_from_checkpoint=none", "--max_train_steps=1")
    assert checkpoints.steps(run) == [1]
    assert [path.name for path in (run / "best").iterdir()] == ["notes.txt"]


def test_a_file_called_as_a_checkpoint_is_no_obstacle(run, tiny, monkeypatch, capsys):
    (run / "checkpoint-4").write_text(MINE)
    run_in_process(refl_lora, monkeypatch, *training(run.parent, tiny, run), "--max_train_steps=4")
    captured = capsys.readouterr()
    assert "resuming after step 2" in captured.out
    assert "checkpoint-4 is not a checkpoint; it is ignored" in captured.err
    assert "checkpoint-4 could not be saved" in captured.err
    assert (run / "checkpoint-4").read_text() == MINE and sorted(checkpoints.steps(run)) == [1, 2, 3]


def test_a_card_that_was_edited_is_kept(run):
    (run / "README.md").write_text(MINE)
    with pytest.raises(UserError, match=r"README\.md would be replaced"):
        card.write(run)
    assert (run / "README.md").read_text() == MINE


EVALUATION = (
    "--num_prompts 1 --num_images_per_prompt 1 --num_inference_steps 2 --base_guidance_scale None".split()
)


def evaluating(tiny, run, output, prompts):
    return [
        *weight_options(tiny),
        *EVALUATION,
        f"--lora_paths={run}",
        f"--output_dir={output}",
        f"--prompts={prompts}",
    ]


@pytest.mark.parametrize("name", ["prompts.csv", "report.html", "grid.png", "images.csv", "evaluation.json"])
def test_evaluation_refuses_files_of_others(run, tiny, tmp_path, monkeypatch, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text("text\na cat\n")
    prompts = mine / name if name == "prompts.csv" else tmp_path / "prompts.txt"
    with pytest.raises(UserError, match=f"{name} would be replaced"):
        run_in_process(evaluate, monkeypatch, *evaluating(tiny, run, mine, prompts))
    assert contents(mine) == {(mine / name).relative_to(mine): b"text\na cat\n"}


def test_evaluation_knows_its_images_and_leaves_an_edited_card(run, tiny, tmp_path, monkeypatch, capsys):
    options = evaluating(tiny, run, tmp_path / "evaluation", tmp_path / "prompts.txt")
    (run / "README.md").write_text(MINE)
    run_in_process(evaluate, monkeypatch, *options)
    assert "note: the model card will not be updated" in capsys.readouterr().out
    assert (run / "README.md").read_text() == MINE
    shutil.rmtree(tmp_path / "evaluation" / PRIVATE)  # as of an earlier version
    run_in_process(evaluate, monkeypatch, *options)
    one, other = sorted((tmp_path / "evaluation" / "images").glob("*/*.png"))
    with Image.open(other) as image:
        ImageOps.invert(image).save(one)
    with pytest.raises(UserError, match=r"\.png: not the image that was drawn there\. Delete it"):
        run_in_process(evaluate, monkeypatch, *options)
    one.unlink()
    run_in_process(evaluate, monkeypatch, *options)


@pytest.mark.parametrize("name", ["0.png", "grid.png", "rewards.json"])
def test_inference_refuses_files_of_others(run, tiny, tmp_path, monkeypatch, name):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / name).write_text(MINE)
    options = [
        weight_options(tiny)[0],
        f"--output_dir={mine}",
        "--num_images_per_prompt=1",
        "--num_inference_steps=2",
    ]
    scripts = [(inference_lora, [f"--lora_path={run}", f"--reward_path={tiny}"])]
    scripts += [(inference, [])] * (name == "0.png")
    for script, own in scripts:
        with pytest.raises(UserError, match=f"{name} would be replaced"):
            run_in_process(script, monkeypatch, *options, *own)
    assert (mine / name).read_text() == MINE and len(list(mine.glob("*.*"))) <= 2


def test_merge_deletes_nothing_of_others(run, tiny, tmp_path):
    model, output, partial = tiny / "stable-diffusion-v1-4", tmp_path / "merged", tmp_path / "merged.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text(MINE)
    options = merge.Options(str(model), str(run), 1.0, str(output))
    with pytest.raises(UserError, match=r"merged\.partial is in the way, and this program did not write it"):
        merge.merge(options)
    assert (partial / "mine.txt").read_text() == MINE and not output.exists()
    (partial / PRIVATE).mkdir()  # as a merge that was killed leaves it
    merge.merge(options)
    assert not partial.exists() and not (output / PRIVATE).exists() and not (output / "mine.txt").exists()


@pytest.mark.parametrize("place", ["the repository", "model", "model/unet", "weights"])
def test_output_is_never_where_the_program_or_its_inputs_are(run, tiny, monkeypatch, place):
    model = tiny / "stable-diffusion-v1-4"
    folder = {"the repository": ROOT, "model": model, "model/unet": model / "unet", "weights": tiny}[place]
    for script, options in (
        (refl_lora, training(run.parent, tiny, folder)),
        (evaluate, evaluating(tiny, run, folder, run.parent / "prompts.txt")),
    ):
        before = set(folder.iterdir())
        with pytest.raises(UserError, match="is the folder of this program|is in the folder of --"):
            run_in_process(script, monkeypatch, *options)
        assert set(folder.iterdir()) == before


def test_an_options_file_cannot_start_anew(run, tiny, tmp_path, monkeypatch, capsys):
    before = contents(run)
    for name in ("resume_from_checkpoint", "resume-from-checkpoint"):
        (tmp_path / "options.json").write_text(json.dumps({name: "none"}))
        options = [*training(run.parent, tiny, run), f"--options_file={tmp_path / 'options.json'}"]
        run_in_process(refl_lora, monkeypatch, *options)
        assert "finished before: 2 steps" in capsys.readouterr().out
    assert contents(run) == before
    for name in ("resume_from_checkpoint=none --seed", "--seed", "Seed"):
        (tmp_path / "options.json").write_text(json.dumps({name: 1}))
        with pytest.raises(UserError, match="is not an option or not a value of it"):
            run_in_process(refl_lora, monkeypatch, *options)


def test_folders_of_earlier_versions_are_known(run):
    without_records(run)
    names = {path.relative_to(run).as_posix() for path in run.rglob("*.*") if path.is_file()}
    output = OutputFolder(run, outputs.RUN)
    unknown = {
        name for name in names if not output.is_own(name) and not name.startswith(("logs/", "checkpoint-"))
    }
    assert not unknown
    assert sorted(checkpoints.steps(run)) == [1, 2] and not checkpoints.foreign(run)
