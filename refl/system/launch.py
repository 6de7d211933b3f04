"""`accelerate launch` that ends with the script's own exit code and shows no traceback of its own.

python -m refl launch --multi_gpu --num_processes 2 refl_lora.py ...
"""

import logging
import os
import signal
import sys

# Seconds that processes get, once told to stop, to finish their step and save it.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")

from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Launch; what went wrong was said by the process in which it did, unless that was killed."""
    logging.disable()  # what matters is said by the processes
    # The launcher passes SIGTERM and SIGINT on to its processes; SLURM's warning before its time limit too.
    signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        launch.main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            reason = ", which is what happens when the machine's memory runs out" if name == "SIGKILL" else ""
            sys.exit(f"error: process {rank} was ended by {name}{reason}. The others were stopped.")
        sys.exit(first.exitcode)
