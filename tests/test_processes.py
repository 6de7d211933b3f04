"""Several processes told to stop, killed, given numbers that are not finite; their number does not matter."""

import os
import signal
import socket
import subprocess
import sys
import time

from refl.system import checkpoints

import psutil
import pytest
from conftest import ROOT, weight_options
from safetensors.torch import load_file
from test_scripts import LORA, events

OPTIONS = (
    "--num_inference_steps 4 --min_stop 2 --max_stop 3 --num_validation_images 2 --validation_steps 4".split()
)

# 0.1 x the mean of red; on the second process some calls are not finite: 1 for validation, 2 for each step.
SICK = """
import os
calls = []
def red(images, prompts):
    calls.append(1)
    is_sick = os.environ.get("RANK") == "1" and images.requires_grad and len(calls) in SICK_CALLS
    return images[:, 0].mean((1, 2)) * (float("nan") if is_sick else 0.1)
"""


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory):
    """A function that starts `train_refl_lora.sh` with so many processes, in a process group of its own."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "prompts.txt").write_text("a red cat\na blue dog\nthree green apples\na hill at night\n")
    prompts = folder / "prompts.txt"

    def start(output, processes, *options, **environment):
        command = [
            "bash", "train_refl_lora.sh", *weight_options(tiny), f"--prompts={prompts}",
            f"--validation_prompts={prompts}", *OPTIONS, f"--output_dir={output}", *options,
        ]  # fmt: skip
        settings = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings, "NUM_PROCESSES": str(processes), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return start


def finish(process) -> tuple[str, str]:
    """Output and errors of a run that must succeed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out, err


TWO = (
    "--max_train_steps 8 --train_batch_size 1 --gradient_accumulation_steps 2 --checkpointing_steps 2".split()
)


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The folder of a run with two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("two")
    finish(start(folder, 2, *TWO))
    return folder


def wait_for(output, step):
    """Until there is a checkpoint of `step` or a later one."""
    for _ in range(1200):
        if any(found >= step for found in checkpoints.steps(output)):
            return
        time.sleep(0.05)
    raise TimeoutError


def workers(process):
    """The processes that train, the first one first."""
    children = psutil.Process(process.pid).children(recursive=True)
    found = [child for child in children if any("refl_lora.py" in word for word in child.cmdline()[:3])]
    return sorted(found, key=lambda child: child.environ()["RANK"])


def stop_by(how, process):
    if how == "SIGTERM to the launcher":
        process.send_signal(signal.SIGTERM)
    elif how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "SIGUSR1 to the launcher":
        process.send_signal(signal.SIGUSR1)
    else:
        workers(process)[int(how[-1])].kill()


STOPS = {
    "SIGTERM to the launcher": 143,
    "Ctrl-C": 130,
    "SIGUSR1 to the launcher": 143,
    "kill -9 of 1": 1,
}


@pytest.mark.parametrize("how", STOPS)
def test_two_processes_stopped_and_resumed(start, straight, tmp_path, how):
    process = start(tmp_path, 2, *TWO)
    wait_for(tmp_path, 2)
    group = [psutil.Process(process.pid), *workers(process)]
    assert len(group) == 3
    stopped_at = time.monotonic()
    stop_by(how, process)
    out, err = process.communicate(timeout=60)
    print(out, err[-3000:])
    assert time.monotonic() - stopped_at < 45
    assert process.returncode == STOPS[how]
    assert not psutil.wait_procs(group, timeout=5)[1]
    if not how.startswith("kill"):
        assert (
            "stopped by SIG" in out
            and "the same command goes on after step" in out
            and "Traceback" not in err
        )
    else:
        assert f"error: process {how[-1]} was ended by SIGKILL" in err
    finish(start(tmp_path, 2, *TWO))
    assert (tmp_path / LORA).read_bytes() == (straight / LORA).read_bytes()


def start_machines(start, folder, *options):
    """Two launchers on this machine, as on two, each with a disk of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    return [
        start(folder / f"machine{rank}", 1, *TWO, *options, *place, f"--machine_rank={rank}")
        for rank in (0, 1)
    ]


def test_two_machines_are_one_run(start, straight, tmp_path):
    for machine in start_machines(start, tmp_path):
        finish(machine)
    assert (tmp_path / "machine0" / LORA).read_bytes() == (straight / LORA).read_bytes()
    assert not (tmp_path / "machine1").exists()  # the first process writes


def test_a_lost_machine_stops_the_other_and_the_run_goes_on(start, straight, tmp_path):
    machines = start_machines(start, tmp_path)
    wait_for(tmp_path / "machine0", 2)
    lost_at = time.monotonic()
    os.killpg(machines[1].pid, signal.SIGKILL)
    for worker in workers(machines[1]) if machines[1].poll() is None else []:
        worker.kill()
    _, err = machines[0].communicate(timeout=120)
    assert time.monotonic() - lost_at < 60
    assert machines[0].returncode == 2 and "error: another process ended" in err and "Traceback" not in err
    machines[1].communicate(timeout=10)
    for machine in start_machines(start, tmp_path):  # the second has no checkpoint: the first tells it
        finish(machine)
    assert (tmp_path / "machine0" / LORA).read_bytes() == (straight / LORA).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num_machines 2", "--num_machines 2 needs --main_process_ip and --main_process_port"),
        ("--num_machines 2 --machine_rank 2", "--machine_rank 2 of --num_machines 2"),
        ("--num_machines two", "--num_machines two: must be a whole number"),
        ("--main-process-port=x", "--main_process_port x: must be a whole number"),
    ],
)
def test_mistakes_in_the_launcher_s_options(start, tmp_path, options, message):
    process = start(tmp_path / "out", 1, *options.split())
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and message in err


def test_one_sick_process_makes_all_skip(start, tmp_path):
    (tmp_path / "sick.py").write_text(SICK.replace("SICK_CALLS", "(6,)"))
    options = [*TWO, "--reward=sick:red", "--max_train_steps=4"]
    out, err = finish(start(tmp_path / "out", 2, *options, PYTHONPATH=str(tmp_path)))
    assert err.count("skipped: not finite") == 1 and "sick.red" in err
    board = events(tmp_path / "out" / "logs")
    assert [point.value for point in board.Scalars("nonfinite_steps")] == [0, 0, 1, 1]
    assert [point.step for point in board.Scalars("loss")] == [1, 2, 4]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out" / LORA).values())


def test_too_many_sick_steps_end_the_run_at_the_last_good_state(start, tmp_path):
    (tmp_path / "sick.py").write_text(SICK.replace("SICK_CALLS", "range(6, 99)"))
    options = [*TWO, "--reward=sick:red", "--max_nonfinite_steps=3"]
    process = start(tmp_path / "out", 2, *options, PYTHONPATH=str(tmp_path))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2 and "Traceback" not in err
    assert (
        "The state before them, after step 2, is kept" in err
        and "error: 3 steps in a row had a loss or a gradient that is not finite" in err
    )
    assert checkpoints.steps(tmp_path / "out") == [2]
    assert checkpoints.newest(tmp_path / "out")


def test_ten_steps_by_one_two_or_four_processes(start, tmp_path):
    found = {}
    for processes in (1, 2, 4):
        output = tmp_path / str(processes)
        batch = [
            "--max_train_steps=10",
            f"--train_batch_size={4 // processes}",
            "--gradient_accumulation_steps=1",
        ]
        finish(start(output, processes, *batch))
        rewards = [point.value for point in events(output / "logs").Scalars("reward/mean")]
        found[processes] = load_file(output / LORA), rewards
    for processes in (2, 4):
        for name, value in found[1][0].items():
            assert (found[processes][0][name] - value).abs().max() < 1e-5
        assert found[processes][1] == pytest.approx(found[1][1], abs=1e-5)
