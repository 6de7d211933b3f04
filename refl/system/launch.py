"""`accelerate launch` with the exit code of the script and without a traceback of the launcher.

python -m refl launch --multi_gpu --num_processes 2 refl_lora.py ...
"""

import logging
import os
import signal
import socket
import sys
import time

# Seconds in which processes that are told to stop finish their step and save it.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")

from refl.system.errors import UserError

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# What a signal that ended a process means here.
REASONS = {
    "SIGKILL": "which is what happens when the machine's memory runs out",
    "SIGABRT": "which is how NCCL ends a process that lost another one; the same command resumes the run",
}


def check_meeting_point(host: str, port: int, machine_rank: int, limit: float = 360.0) -> None:
    """Check where the processes are to meet; other machines than the first wait until it listens there.

    Raises `UserError` for an unknown host or a port that cannot be used, and after `limit` seconds.
    """
    place = f"--main_process_ip {host} --main_process_port {port}"
    if not 0 <= port < 2**16:
        raise UserError(f"--main_process_port {port}: must be below {2**16}.")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--main_process_ip {host}: no such host ({error}).") from error
    if machine_rank == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise UserError(f"--main_process_port {port} cannot be used: {error.strerror}.") from error
        return
    started, is_noted = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > started + limit:
                raise UserError(
                    f"{place}: machine 0 cannot be reached ({error}). Start it, or correct the address."
                ) from error
        if not is_noted:
            print(f"waiting for machine 0 at {host}:{port} ...", file=sys.stderr, flush=True)
            is_noted = True
        time.sleep(1)


def main() -> None:
    """Launch the script; only the end of a process by a signal is reported here."""
    options = launch.launch_command_parser().parse_args()
    check_meeting_point(
        options.main_process_ip or "127.0.0.1", options.main_process_port or 0, options.machine_rank or 0
    )
    logging.disable()  # the processes report what matters
    # The launcher passes SIGTERM and SIGINT on to its processes. SLURM warns by SIGUSR1 before a time limit.
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        launch.launch_command(options)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode >= 0:
            sys.exit(first.exitcode)
        name = signal.Signals(-first.exitcode).name
        reason = f", {REASONS[name]}" if name in REASONS else ""
        sys.exit(f"error: process {rank} was ended by {name}{reason}. The others were stopped.")
