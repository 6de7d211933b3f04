"""Devices, precisions and processes: settings that only a GPU or a second machine would show."""

import importlib
import os
from datetime import timedelta

import refl
from refl.system import devices, distributed
from refl.system.errors import UserError

import pytest
import torch


@pytest.fixture
def tf32_flags():
    """Restore torch's flags afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions(tf32_flags, allowed, recwarn):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not allowed
    devices.set_tf32(allowed)
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is allowed
    if hasattr(torch.backends.cudnn, "conv"):  # the newer settings agree
        precision = {True: ("tf32",), False: ("ieee", "none")}[allowed]
        assert torch.backends.cuda.matmul.fp32_precision in precision
        assert torch.backends.cudnn.conv.fp32_precision in precision
    assert not recwarn.list


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_allocator_is_set_unless_the_user_sets_it(monkeypatch, given, expected):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(refl)
    assert {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name} == expected


def test_the_precision_follows_the_visible_gpus(monkeypatch):
    capabilities = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: capabilities[gpu])
    assert devices.best_precision() == "no"
    capabilities[:] = [(8, 0), (9, 0)]
    assert devices.best_precision() == "bf16"
    capabilities[:] = [(9, 0), (7, 5)]
    assert devices.best_precision() == "fp16"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "ACCELERATE_MIXED_PRECISION",
            "fp8",
            "mixed precision fp8 is not supported; use",
        ),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed is not supported"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not supported"),
    ],
)
def test_a_launch_that_is_not_supported(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        distributed.make_accelerator(None)


def test_an_option_wins_over_the_launch(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert distributed.make_accelerator("no").mixed_precision == "no"


@pytest.fixture
def one_process(monkeypatch):
    """The environment of a launch of one process over gloo."""
    settings = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ending", [None, UserError, SystemExit, KeyboardInterrupt])
def test_the_process_group_is_destroyed_on_every_exit(ending):
    try:
        with distributed.process_group():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            assert torch.distributed.is_initialized()
            if ending:
                raise ending
    except BaseException as error:
        assert type(error) is ending
    assert not torch.distributed.is_initialized()


def test_without_a_process_group_nothing_is_destroyed():
    with pytest.raises(UserError, match="as it was"), distributed.process_group():
        raise UserError("as it was")


def test_nccl_is_aborted_after_an_error(monkeypatch):
    """Its orderly shutdown would wait for processes that may be gone."""
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: "abort" not in calls)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(distributed.distributed_c10d, "_abort_process_group", lambda: calls.append("abort"))
    with pytest.raises(UserError), distributed.process_group():
        raise UserError
    assert calls == ["abort"]
    calls.clear()
    with distributed.process_group():
        pass
    assert calls == ["destroy"]


def test_the_time_that_processes_wait_is_passed_on(one_process, monkeypatch):
    given, init = {}, torch.distributed.init_process_group

    def record(**settings):
        given.update(settings)
        init("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

    monkeypatch.setattr(torch.distributed, "init_process_group", record)
    accelerator = distributed.make_accelerator(None)
    assert accelerator.num_processes == 1 and torch.distributed.is_initialized()
    assert given["timeout"] == distributed.TIMEOUT == timedelta(minutes=8)


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:41023"
LOST = [
    RuntimeError(GLOO),
    RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 480000ms"),
    torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2094, remote process exited"),
    torch.distributed.DistNetworkError("The client socket has failed to connect"),
    torch.distributed.DistStoreError("wait timeout after 480000ms"),
    RuntimeError("NCCL communicator was aborted on rank 0."),
    RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"),
    RuntimeError("ncclRemoteError: A call failed possibly due to a network error"),
]
OURS = [
    RuntimeError("The size of tensor a (4) must match the size of tensor b (3)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ValueError(GLOO),
]


@pytest.mark.parametrize("error", LOST)
def test_errors_of_a_lost_process(error):
    assert distributed.is_peer_lost(error)


@pytest.mark.parametrize("error", OURS)
def test_errors_of_this_process(error):
    assert not distributed.is_peer_lost(error)
