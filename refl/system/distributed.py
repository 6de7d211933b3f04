"""Processes of one run: how they are launched, how long they wait for each other, how they end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from refl.system import devices
from refl.system.errors import UserError

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
    devices.weight_dtype(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )


@contextmanager
def process_group() -> Iterator[None]:
    """Destroy torch's process group, if there is one, whichever way the block is left.

    After an error other processes may be gone. NCCL's orderly shutdown would wait for them, so its
    communicators are aborted instead.
    """
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
