"""Starting several processes: what is wrong is said within a bounded time, and no process is left behind."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

from refl.system import distributed, launch
from refl.system.errors import UserError

import pytest
from conftest import HANG, ROOT

WHOLE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_PORT": "29500",
    "MASTER_ADDR": "127.0.0.1",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"RANK": None}, "WORLD_SIZE=2 in the environment, without RANK"),
        ({"RANK": None, "LOCAL_RANK": None, "MASTER_PORT": None}, "WORLD_SIZE=2 in the environment, without"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x in the environment: must be a whole number"),
        ({"RANK": "2"}, "RANK=2 in the environment: must be below 2"),
        ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE=9+ in the environment: must be a whole number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 in the environment: must be below 65536"),
    ],
)
def test_variables_of_a_launcher(monkeypatch, changes, message):
    for name, value in (WHOLE | changes).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if message is None:
        distributed.check_environment()
    else:
        with pytest.raises(UserError, match=message):
            distributed.check_environment()


def test_waiting_for_the_other_processes_ends(monkeypatch, capsys):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "START_NOTE", timedelta(seconds=0.01))
    monkeypatch.setattr(distributed, "START_LIMIT", timedelta(seconds=0.05))
    codes = []
    monkeypatch.setattr(distributed.os, "_exit", codes.append)
    with distributed.joining():
        deadline = time.monotonic() + HANG
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert codes == [2]
    printed = capsys.readouterr().err
    assert "waiting for all 2 processes to meet at 127.0.0.1:29500" in printed
    assert "error: not all 2 processes met at 127.0.0.1:29500 within" in printed
    with distributed.joining():  # without waiting
        pass
    time.sleep(0.1)
    assert codes == [2]


def test_the_place_to_meet_is_checked():
    with pytest.raises(UserError, match="--main_process_ip no.such.host.invalid: no such host"):
        launch.check_meeting_point("no.such.host.invalid", 29500, 1)
    with pytest.raises(UserError, match="--main_process_port 99999: must be below 65536"):
        launch.check_meeting_point("127.0.0.1", 99999, 0)
    launch.check_meeting_point("127.0.0.1", 0, 0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--main_process_port {port} cannot be used: Address already in"):
            launch.check_meeting_point("127.0.0.1", port, 0)
        launch.check_meeting_point("127.0.0.1", port, 1)


def test_an_unreachable_machine_is_waited_for_and_named(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1 --main_process_port {port}: machine 0 cannot be reached"):
        launch.check_meeting_point("127.0.0.1", port, 1, limit=0.5)
    assert f"waiting for machine 0 at 127.0.0.1:{port}" in capsys.readouterr().err


WORKER = """
import os, signal, sys, time
from refl.system import distributed
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(0)))
distributed.watch_launcher()
print(os.getpid(), flush=True)
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""


def test_processes_stop_when_their_launcher_is_killed_alone():
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, WORKER], cwd=ROOT, env={**os.environ, "TORCHELASTIC_RUN_ID": "none"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    worker = int(process.stdout.readline())
    process.kill()
    out, err = process.communicate(timeout=HANG)  # until the worker has closed its output
    assert out == "stopped\n" and "the launcher has ended, so its processes stop" in err
    with pytest.raises(ProcessLookupError):
        for _ in range(HANG):
            os.kill(worker, 0)
            time.sleep(0.1)
