"""CUDA tensors without a GPU: shapes, dtypes and devices are those of a GPU run, values do not exist.

torch's FakeTensorMode computes the metadata of each operation and rejects operations that mix CPU and CUDA
tensors. `fake_cuda` adds what a CPU build of torch lacks for a whole training step: fused attention, pinned
memory, and, loaded by `start_process`, a device guard, without which autograd has no queue for CUDA
gradients. torch must find the guard when it is imported, so fake CUDA runs in a process of its own.
"""

import os
import subprocess
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import compress
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda", 0)
GUARD = ROOT / "tests" / "cuda_guard.cpp"
aten = torch.ops.aten
# Operations whose result has a size that depends on values: CUDA computes them and waits for the size.
DATA_DEPENDENT = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
                  aten.equal, aten.bincount}  # fmt: skip
INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
STAGED_BYTES = 2**16  # CUDA copies so much out of pageable memory without waiting
# Operations that do a step's work; their dtype is the precision of the part that they belong to.
MATRIX_PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.convolution}


# ---------------------------------------------------------------------------------------------- device guard


def build_guard(folder: Path) -> Path:
    """Compile the device guard into a library in `folder`, in two seconds; returns the library."""
    library, home = folder / "cuda_guard.so", Path(torch.__file__).parent
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(GUARD), "-o", str(library),
         f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home / 'lib'}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return library


def start_process(library: Path) -> ProcessPoolExecutor:
    """A process with the guard loaded; `call` runs functions of importable modules in it."""
    process = ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare)
    # torch asks once, while it is imported, which devices there are.
    with mock.patch.dict(os.environ, LD_PRELOAD=str(library)):
        process.submit(torch.accelerator.current_accelerator).result()
    return process


def call(process: ProcessPoolExecutor, function: Callable, *args: object) -> Any:
    """function(*args) in the process; raises `FakeCudaError` for whatever it raises."""
    return process.submit(_call, function, *args).result()


class FakeCudaError(RuntimeError):
    """An error on fake CUDA tensors, with its traceback as text: torch's own do not travel by pickle."""


def _call(function: Callable, *args: object) -> Any:
    try:
        return function(*args)
    except Exception:
        raise FakeCudaError(traceback.format_exc()) from None


def _prepare() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------- fake tensors


@contextmanager
def fake_cuda() -> Iterator["Observer"]:
    """Run a block on fake tensors and record what would slow down a GPU in the yielded `Observer`."""
    observer, attention = Observer(), F.scaled_dot_product_attention
    replaced = {
        (torch.cuda, "is_available"): lambda: True,  # GradScaler is disabled otherwise
        # For fake tensors transformers leaves out checks of values, which make a GPU wait.
        (masking_utils, "is_tracing"): lambda tensor=None: False,
        (F, "scaled_dot_product_attention"): partial(_attention, attention),
        (Tensor, "pin_memory"): lambda tensor: observer.pin(tensor),
        (FakeTensor, "tolist"): lambda tensor: observer.read(tensor),
        (FakeTensor, "data"): property(Tensor.data.__get__, _set_data),
    }
    for module in (import_module("torch.optim.optimizer"), _foreach_utils):  # as for real tensors
        replaced[module, "_foreach_supported_types"] = [*module._foreach_supported_types, FakeTensor]
    with ExitStack() as stack:
        for (target, name), value in replaced.items():
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(_FakeTensors(allow_non_fake_inputs=True))
        stack.enter_context(observer)
        yield observer


def to_fake(model: nn.Module, device: torch.device = DEVICE) -> nn.Module:
    """Replace parameters and buffers of a real model by fake ones on `device`, in place, in `fake_cuda`."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            new = torch.empty_like(tensor, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            setattr(module, name, new)
    return model


class Observer(TorchDispatchMode):
    """Records host syncs, and the dtypes of matrix products by phase, of operations on CUDA tensors.

    A number read from a CUDA tensor is 0, or True for a bool: no overflow was found, all checks passed.
    """

    def __init__(self):
        super().__init__()
        self.syncs = Counter()  # "operation, file:line" -> times
        self.float64 = Counter()  # the same, of operations with a float64 result on CUDA
        self.dtypes = defaultdict(Counter)  # phase -> dtype -> matrix products
        self.current_phase = "none"
        self.pinned = set()  # storages in pinned memory

    def forget(self) -> None:
        """Start anew: what was recorded belongs to loading."""
        for record in (self.syncs, self.float64, self.dtypes):
            record.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Phase of a block; what `refl_step` takes."""
        before, self.current_phase = self.current_phase, name
        yield
        self.current_phase = before

    def read(self, tensor: Tensor) -> list:
        """Ones in place of a tensor's values, which from CUDA take one host sync."""
        if tensor.is_cuda:
            self.syncs[_where("tolist")] += 1
        return np.ones(tuple(tensor.shape)).tolist()

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor whose storage counts as pinned memory."""
        copy = tensor.clone()
        self.pinned.add(StorageWeakRef(copy.untyped_storage()))
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self.pinned

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet, leaves = function.overloadpacket, tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if packet is aten._local_scalar_dense and getattr(given[0], "constant", None) is None:
            if given[0].is_cuda:
                self.syncs[_where(function)] += 1
            return {torch.bool: True}.get(given[0].dtype, 0.0 if given[0].is_floating_point() else 0)
        is_on_cuda = any(tensor.is_cuda for tensor in given)
        if is_on_cuda and (packet in DATA_DEPENDENT or packet in INDEXING and _waits_for_index(given)):
            self.syncs[_where(function)] += 1
        if is_on_cuda and packet in MATRIX_PRODUCTS:
            dtypes = {tensor.dtype for tensor in given}
            if len(dtypes) > 1:  # which fake tensors let pass
                raise RuntimeError(f"{_where(function)}: operands of different dtypes, {dtypes}")
            self.dtypes[self.current_phase].update(dtypes)
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(tensor.is_cuda and tensor.dtype == torch.float64 for tensor in made):
            self.float64[_where(function)] += 1
        if packet in (aten._to_copy, aten.copy_):
            source, target = (given[0], result) if packet is aten._to_copy else (given[1], given[0])
            if self._waits_for_copy(source, target, True in (kwargs.get("non_blocking"), *args[2:3])):
                self.syncs[_where(function)] += 1
        return result

    def _waits_for_copy(self, source: Tensor, target: Tensor, non_blocking: bool) -> bool:
        if source.is_cuda and not target.is_cuda:
            return True
        if source.is_cuda or not target.is_cuda:
            return False
        return not (non_blocking and (self.is_pinned(source) or source.nbytes <= STAGED_BYTES))


def _waits_for_index(given: list[Tensor]) -> bool:
    """Whether an index is uploaded for a CUDA tensor, or is a mask, whose number of elements is awaited."""
    tensor, *indices = given
    return tensor.is_cuda and any(not i.is_cuda or i.dtype in (torch.bool, torch.uint8) for i in indices)


def _where(function: object) -> str:
    """The operation, and the project's innermost line that leads to it."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    files = [Path(frame.filename) for frame in frames]  # an environment may lie inside the project
    is_own = [file.is_relative_to(ROOT) and "site-packages" not in file.parts for file in files]
    own = list(compress(frames, is_own)) or frames
    return f"{function}, {Path(own[-1].filename).name}:{own[-1].lineno}"


class _FakeTensors(FakeTensorMode):
    """Never asks CUDA for memory, although `torch.cuda.is_available` says that there is a GPU."""

    avoid_device_init = True


def _set_data(tensor: FakeTensor, data: Tensor) -> None:
    """`tensor.data = data`, after which the tensor is on the device of `data`."""
    Tensor.data.__set__(tensor, data)
    tensor.fake_device = data.device


def _attention(
    other: Callable, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
) -> Tensor:
    """CUDA's memory-efficient kernel, which takes every dtype and mask; `other` for tensors on the CPU."""
    if not query.is_cuda:
        return other(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    is_training = query.requires_grad or key.requires_grad or value.requires_grad
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, is_training, dropout_p, is_causal, scale=options.get("scale")
    )[0]
