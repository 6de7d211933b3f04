"""`accelerate launch` with the exit code of the script and without a traceback of the launcher.

python -m refl launch --multi_gpu --num_processes 2 refl_lora.py ...
"""

import logging
import os
import signal
import sys

# Seconds in which processes that are told to stop finish their step and save it.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# What a signal that ended a process means here.
REASONS = {
    "SIGKILL": "which is what happens when the machine's memory runs out",
    "SIGABRT": "which is how NCCL ends a process that lost another one; the same command resumes the run",
}


def main() -> None:
    """Launch the script; only the end of a process by a signal is reported here."""
    logging.disable()  # the processes report what matters
    # The launcher passes SIGTERM and SIGINT on to its processes. SLURM warns by SIGUSR1 before a time limit.
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        launch.main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode >= 0:
            sys.exit(first.exitcode)
        name = signal.Signals(-first.exitcode).name
        reason = f", {REASONS[name]}" if name in REASONS else ""
        sys.exit(f"error: process {rank} was ended by {name}{reason}. The others were stopped.")
