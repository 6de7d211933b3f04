"""What a signal to stop becomes in a process that trains and in the launcher."""

import os
import signal
from types import SimpleNamespace

from refl.system import launch
from refl.system.signals import SIGNALS, Stopped, StopSignals

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_an_interruptible_block_at_once(number):
    signals = StopSignals(immediate=True)
    with pytest.raises(Stopped) as stopped, signals.interruptible():
        send(number)
        pytest.fail("the block went on")
    assert stopped.value.exit_code == 128 + number and stopped.value.name == number.name


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_an_interruptible_block(number):
    signals = StopSignals(immediate=True)
    send(number)
    assert signals.received == number  # and nothing was raised
    with pytest.raises(Stopped, match=number.name), signals.interruptible():
        pytest.fail("the block began")
    with pytest.raises(Stopped), signals.interruptible():
        pytest.fail("the next block began")


def test_a_second_signal_does_not_interrupt_what_the_first_began():
    signals = StopSignals(immediate=True)
    with pytest.raises(Stopped, match="SIGTERM"), signals.interruptible():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGINT)
    assert signals.received == signal.SIGTERM


def test_one_of_several_processes_only_takes_note():
    signals = StopSignals(immediate=False)
    with signals.interruptible():
        send(signal.SIGINT)
    with signals.interruptible():
        pass
    assert signals.received == signal.SIGINT


# ----------------------------------------------------------------------------------------------- the launcher


def launched(monkeypatch, run) -> int | str | None:
    """What the launcher exits with where accelerate's `main` is `run`."""
    options = SimpleNamespace(main_process_ip=None, main_process_port=0, machine_rank=0)
    parser = SimpleNamespace(parse_args=lambda: options)
    accelerate = SimpleNamespace(launch_command_parser=lambda: parser, launch_command=lambda _: run())
    monkeypatch.setattr(launch, "launch", accelerate)
    monkeypatch.setattr(launch.logging, "disable", lambda: None)
    with pytest.raises(SystemExit) as ended:
        launch.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)]
)
def test_the_launcher_ends_as_a_process_stopped_by_a_signal(monkeypatch, number, code):
    def stop(received, _):
        raise SignalException("stopped", signal.Signals(received))

    def run():  # torch's launcher has such a handler for these two
        for own in (signal.SIGTERM, signal.SIGINT):
            signal.signal(own, stop)
        send(number)

    assert launched(monkeypatch, run) == code


@pytest.mark.parametrize(
    ("exit_code", "expected"),
    [
        (2, 2),
        (-9, "error: process 1 was ended by SIGKILL, which is what happens when the machine's memory runs"),
        (-11, "error: process 1 was ended by SIGSEGV. The others were stopped."),
    ],
)
def test_the_launcher_ends_as_the_process_that_failed_first(monkeypatch, exit_code, expected):
    def run():
        failure = ProcessFailure(local_rank=0, pid=0, exitcode=exit_code, error_file="none")
        raise ChildFailedError("training", {1: failure})

    code = launched(monkeypatch, run)
    assert code == expected or str(code).startswith(str(expected))
