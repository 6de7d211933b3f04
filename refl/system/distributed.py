"""Processes of one run: how they are launched, how long they wait for each other, how they end."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from refl.system import devices
from refl.system.errors import UserError, is_first_process
from refl.system.ownership import mark_ending

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed import distributed_c10d

# The longest time that a process waits for another in a collective operation. Processes do equal work, so a
# healthy run waits for seconds: while the first one writes a checkpoint, or another loads weights.
#
# gloo raises at once when a connection closes, and after this time when a machine falls silent. NCCL's
# watchdog notices a closed connection within seconds and a silent machine after this time, and ends the
# process by SIGABRT: what an aborted operation left on the GPU is not defined, so nothing may be saved after
# it. TORCH_NCCL_BLOCKING_WAIT is no substitute: it switches that handling off, and an operation that Python
# does not wait for could hang.
TIMEOUT = timedelta(minutes=8)  # accelerate does not pass on 10, the default of NCCL, to gloo

START_LIMIT = timedelta(minutes=6)  # for all processes to start and find each other
START_NOTE = timedelta(seconds=20)  # after which a process says for what it waits

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
PEER_LOST = (  # parts of the messages of errors that torch raises as plain RuntimeErrors
    "gloo/transport",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
    "ncclRemoteError",
    "ncclSystemError",
    "Connection closed by remote peer",
    "Connection reset by peer",
)


def make_accelerator(mixed_precision: str | None) -> Accelerator:
    """Join the processes that were launched. Raises `UserError` for a launch that is not supported."""
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"{name} is not supported: only the LoRA is trained, so there is nothing to shard. "
                "Use train_refl_lora.sh, which ignores `accelerate config`."
            )
    mixed_precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    devices.weight_dtype(mixed_precision)
    with joining():
        return Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=mixed_precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )


def check_environment() -> None:
    """Raise `UserError` for variables of a launcher that are impossible or left over from another program."""
    values = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if text := os.environ.get(name):
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                raise UserError(f"{name}={text} in the environment: must be a whole number. {UNSET}")
            values[name] = int(text)
    world_size = values.get("WORLD_SIZE", 1)
    missing = {"RANK", "LOCAL_RANK", "MASTER_PORT"} - values.keys()
    if world_size > 1 and missing:
        raise UserError(f"WORLD_SIZE={world_size} in the environment, without {min(missing)}. {UNSET}")
    for name, bound in (("RANK", world_size), ("LOCAL_RANK", world_size), ("MASTER_PORT", 2**16)):
        if values.get(name, 0) >= bound:
            raise UserError(f"{name}={values[name]} in the environment: must be below {bound}. {UNSET}")


UNSET = "If no launcher set it, it is left over from another program: unset it."


@contextmanager
def joining() -> Iterator[None]:
    """Check the launcher's variables, and bound the time in which this process waits for the others.

    After `START_LIMIT` it prints an error and ends with code 2. Raises `UserError`.
    """
    check_environment()
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size == 1:
        yield
        return
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ['MASTER_PORT']}"
    joined = Event()
    Thread(target=_bound_joining, args=(joined, world_size, place), daemon=True).start()
    try:
        yield
    except torch.distributed.DistError as error:
        raise UserError(f"the processes did not find each other at {place} ({error}).") from error
    finally:
        joined.set()


def _bound_joining(joined: Event, world_size: int, place: str) -> None:
    if joined.wait(START_NOTE.total_seconds()):
        return
    if is_first_process():
        print(f"waiting for all {world_size} processes to meet at {place} ...", file=sys.stderr, flush=True)
    if not joined.wait((START_LIMIT - START_NOTE).total_seconds()):
        print(
            f"error: not all {world_size} processes met at {place} within {START_LIMIT}. Start the others, "
            f"check --main_process_ip and --main_process_port, or see WORLD_SIZE in the environment. {UNSET}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(2)


def watch_launcher() -> None:
    """Send this process SIGTERM when its launcher has ended without it, by SIGKILL for example.

    It then stops as if the launcher had passed the signal on: training saves its state first.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(launcher: int, seconds: float = 1.0) -> None:
    while os.getppid() == launcher:
        time.sleep(seconds)
    if is_first_process():
        print("warning: the launcher has ended, so its processes stop.", file=sys.stderr, flush=True)
    mark_ending()  # the same command may have been given again
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def process_group() -> Iterator[None]:
    """Destroy torch's process group, if there is one, whichever way the block is left; in it, watch the
    launcher.

    After an error other processes may be gone. NCCL's orderly shutdown would wait for them, so its
    communicators are aborted instead.
    """
    watch_launcher()
    try:
        yield
    except BaseException:
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
            distributed_c10d._abort_process_group()
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective operation failed because another process or machine ended or fell silent."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in PEER_LOST)
