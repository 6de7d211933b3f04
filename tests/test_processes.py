"""Several processes: stopped, killed, one with numbers that are not finite, three of them."""

import os
import signal
import socket
import subprocess
import sys
import time

import refl_lora
from refl.system import checkpoints

import psutil
import pytest
from conftest import (
    HANG,
    LORA,
    ROOT,
    SMOOTH,
    assert_close_loras,
    events,
    run_in_process,
    weight_options,
    write_prompts,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

OPTIONS = """--num_inference_steps 4 --min_stop 2 --max_stop 3 --num_validation_images 2 --validation_steps 4
    --max_train_steps 8 --train_batch_size 1 --gradient_accumulation_steps 2 --checkpointing_steps 2
    --reward watched:red""".split()

# 0.1 x the mean of red. A process is called once for validation, then twice for each step: its sixth call is
# in step 3. There it waits, if WAIT names a folder, for a signal to stop or a file "go". On the second
# process the calls that SICK names are not finite.
WATCHED = """
import os, signal, time
from pathlib import Path

calls, rank = [], os.environ.get("RANK", "0")

def red(images, prompts):
    calls.append(1)
    if "WAIT" in os.environ and len(calls) == 6:
        wait(Path(os.environ["WAIT"]))
    is_sick = rank == "1" and images.requires_grad and str(len(calls)) in os.environ.get("SICK", "").split()
    return images[:, 0].mean((1, 2)) * (float("nan") if is_sick else 0.1)

def wait(folder):
    received, handler = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *arguments: (received.append(1), handler(*arguments)))
    (folder / f"waiting-{rank}").touch()
    while not received and not (folder / "go").exists():
        time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def inputs(shared):
    """The folder of the reward's module and of prompts."""

    def make(folder):
        (folder / "watched.py").write_text(WATCHED)
        write_prompts(folder)

    return shared("inputs", make)


@pytest.fixture(scope="module")
def options(tiny, inputs):
    """Options of a run of 8 steps."""
    prompts = inputs / "prompts.txt"
    return [*weight_options(tiny), f"--prompts={prompts}", f"--validation_prompts={prompts}", *OPTIONS]


@pytest.fixture(scope="module")
def start(inputs, options):
    """A function that starts `train_refl_lora.sh` with so many processes, in a process group of its own."""

    def start(output, processes, *changes, **environment):
        command = ["bash", "train_refl_lora.sh", *options, f"--output_dir={output}", *changes]
        settings = {"PYTHON": sys.executable, "PYTHONPATH": str(inputs), "NUM_PROCESSES": str(processes)}
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return start


def finish(process) -> tuple[str, str]:
    """Output and errors of a run that must succeed."""
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def straight(shared, start):
    """The folder of a run with two processes that nothing stopped."""
    return shared("straight2", lambda folder: finish(start(folder, 2)))


def wait_until(happened, process):
    """Wait for `happened()` while the process runs; the limit only bounds a hang."""
    deadline = time.monotonic() + HANG
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_both(folder, process):
    wait_until(lambda: all((folder / f"waiting-{rank}").exists() for rank in (0, 1)), process)


def workers(process):
    """The processes that train, the first one first."""
    children = psutil.Process(process.pid).children(recursive=True)
    found = [child for child in children if any("refl_lora.py" in word for word in child.cmdline()[:3])]
    return sorted(found, key=lambda child: child.environ()["RANK"])


# tests/test_signals.py has what the other signals become.
@pytest.mark.parametrize(
    ("how", "code"),
    [("SIGTERM to the launcher", 143), ("kill -9 of 1", 1), ("kill -9 of the launcher", -signal.SIGKILL)],
)
def test_two_processes_stopped_and_resumed(start, straight, tmp_path, how, code):
    process = start(tmp_path, 2, WAIT=str(tmp_path))
    wait_for_both(tmp_path, process)
    group = [psutil.Process(process.pid), *workers(process)]
    assert len(group) == 3
    if how == "kill -9 of 1":
        workers(process)[1].kill()
    elif how == "kill -9 of the launcher":
        process.kill()
    else:
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=HANG)
    print(out, err[-3000:])
    assert process.returncode == code
    assert not psutil.wait_procs(group, timeout=HANG)[1]
    if how == "kill -9 of 1":
        assert "error: process 1 was ended by SIGKILL" in err
        assert checkpoints.steps(tmp_path) == [2]
    else:
        assert "stopped by SIGTERM after 3 steps; the same command resumes after step 3" in out
        assert "Traceback" not in err
    finish(start(tmp_path, 2))
    assert (tmp_path / LORA).read_bytes() == (straight / LORA).read_bytes()


def start_machines(start, folder, **environment):
    """Two launchers on this machine, as on two, each with a disk of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    return [
        start(folder / f"machine{rank}", 1, *place, f"--machine_rank={rank}", **environment)
        for rank in (0, 1)
    ]


def test_a_lost_machine_stops_the_other_and_the_run_resumes(start, straight, tmp_path):
    machines = start_machines(start, tmp_path, WAIT=str(tmp_path))
    wait_for_both(tmp_path, machines[0])
    lost = workers(machines[1])
    os.killpg(machines[1].pid, signal.SIGKILL)
    for worker in lost:  # in a group of its own
        worker.kill()
    machines[1].communicate(timeout=HANG)
    (tmp_path / "go").touch()
    _, err = machines[0].communicate(timeout=HANG)
    assert machines[0].returncode == 2 and "error: another process ended" in err and "Traceback" not in err
    for machine in start_machines(start, tmp_path):  # the second has no checkpoint: the first tells it
        finish(machine)
    assert (tmp_path / "machine0" / LORA).read_bytes() == (straight / LORA).read_bytes()
    assert not (tmp_path / "machine1").exists()  # the first process writes


def test_one_sick_process_makes_all_skip(start, tmp_path):
    _, err = finish(start(tmp_path, 2, "--max_train_steps=4", SICK="6"))
    assert err.count("skipped: not finite") == 1 and "watched.red" in err
    board = events(tmp_path / "logs")
    assert [point.value for point in board.Scalars("nonfinite_steps")] == [0, 0, 1, 1]
    assert [point.step for point in board.Scalars("loss")] == [1, 2, 4]
    assert all(value.isfinite().all() for value in load_file(tmp_path / LORA).values())


def test_three_processes_train_and_validate_as_one(start, inputs, options, tmp_path, monkeypatch):
    """Of four validation prompts each of three processes draws two, so that two are drawn in vain."""
    changes = "--max_train_steps 3 --validation_steps 3 --num_validation_images 4".split()
    changes += ["--learning_rate=1e-2", *SMOOTH]
    finish(start(tmp_path / "3", 3, *changes))
    one = ["--train_batch_size=3", f"--output_dir={tmp_path / '1'}"]
    monkeypatch.syspath_prepend(inputs)
    run_in_process(refl_lora, monkeypatch, *options, *changes, *one)
    assert_close_loras(*(load_file(tmp_path / world / LORA) for world in ("3", "1")))
    three, one = (events(tmp_path / world / "logs") for world in ("3", "1"))
    for tag in ("reward/mean", "validation/reward", "validation/saturated"):
        values = [[point.value for point in board.Scalars(tag)] for board in (three, one)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-5), tag
