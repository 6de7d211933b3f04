"""A training step, a validation and offloading on fake CUDA tensors: devices, dtypes and host syncs.

No GPU is needed, and no value is computed. Skipped where there is no C++ compiler.
"""

import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor

import fake_cuda
import fake_cuda_step
import pytest
import torch
from fake_cuda_step import Case, Report

FLOAT32 = {("cuda", torch.float32)}
GUIDED = {"guidance_scale": 3.0}
SHORT = {
    "num_inference_steps": 4, "max_stop": 3, "gradient_accumulation_steps": 3, "rollout_steps": 3,
    "rollout_sampler": "dpm++", "plan": "draft_k", "num_gradient_steps": 2, "decode_resolution": 32,
}  # fmt: skip
REGULARISED = {"noise_distance_weight": 1.0, "pretrain_weight": 0.5}
# Host syncs of the updater, once an optimizer step: loss and whether to stop are read together, and
# the gradient norm; in float16 the scale before and after, and whether a gradient overflowed.
UPDATE_SYNCS = {"fp32": 2, "bf16": 2, "fp16": 6}
CASES = {
    "bf16": Case(),
    "fp32 with gradient checkpointing": Case("fp32", {"gradient_checkpointing": True}),
    "fp16, guided": Case("fp16", GUIDED),
    "guided in the rollout alone, the LoRA off for the empty prompt": Case(
        options=GUIDED
        | {"guidance_in": "rollout", "lora_in_uncond": False, "max_stop": 1, "gradient_accumulation_steps": 3}
    ),
    "regularised": Case(options=REGULARISED),
    "short rollouts, a gradient through several steps": Case(options=SHORT),
    "low memory, all at once": Case("fp16", {"low_memory": True} | GUIDED | REGULARISED),
    "full size": Case(is_full_size=True),
}
DEFAULT_TIER = ("bf16", "low memory, all at once", "short rollouts, a gradient through several steps")


@pytest.fixture(scope="module")
def process(tmp_path_factory) -> ProcessPoolExecutor:
    if not shutil.which("g++"):
        pytest.skip("fake CUDA needs a C++ compiler, g++")
    try:
        library = fake_cuda.build_guard(tmp_path_factory.mktemp("cuda_guard"))
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the device guard does not compile: {error.stderr}")
    with fake_cuda.start_process(library) as process:
        yield process


@pytest.fixture
def step(process, tiny):
    """An optimizer step of a `Case` in that process."""

    def run(case: Case) -> Report:
        return fake_cuda.call(process, fake_cuda_step.optimizer_step, tiny, case)

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DEFAULT_TIER)) for name in CASES]
)
def test_a_step_stays_on_the_gpu_in_its_precision(step, name):
    case = CASES[name]
    report, dtype = step(case), fake_cuda_step.DTYPES[case.precision]
    assert report.syncs == {} and report.float64 == {}
    assert report.gradients == report.lora == FLOAT32
    expected = {
        "rollout": {dtype},
        "decode": {torch.float32 if dtype == torch.float16 else dtype},  # it overflows in float16
        "reward": {dtype, torch.float32},  # its head and its score are in float32
        "grad_step": {dtype},
        **({"pretraining": {dtype}} if case.options.get("pretrain_weight") else {}),
        **({"chain": {dtype}} if case.options.get("plan") == "draft_k" else {}),
    }
    assert {phase: report.dtypes[phase] for phase in expected} == expected
    assert report.update_syncs.total() == UPDATE_SYNCS[case.precision], report.update_syncs


def test_the_first_gradient_of_a_reward_costs_three_reads(step):
    assert step(Case(is_checked=False)).syncs.total() == 3


def test_a_validation_sends_and_reads_once(process, tiny):
    case = Case(options={"low_memory": True, "held_out_reward": "imagereward"})
    report = fake_cuda.call(process, fake_cuda_step.validation, tiny, case)
    # The order of the images is sent, scores are read, the held-out reward's first scores and the first
    # features are checked.
    assert report.syncs.total() == 4, report.syncs


# ---------------------------------------------------------------------- faults that these tests must not miss


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("batch on the CPU", "cpu"),
        ("CPU tensor", "cpu"),
        ("boolean mask", "index"),
        ("float32 layer", "dtypes"),
        ("float16 LoRA", "dtype"),
    ],
)
def test_a_wrong_device_or_dtype_is_an_error(step, fault, message):
    with pytest.raises(fake_cuda.FakeCudaError, match=f"(?i){message}"):
        step(Case(fault=fault))


def test_host_syncs_are_found_at_their_lines(step):
    report = step(Case(fault="syncs"))
    operations = sorted(where.partition(",")[0] for where in report.syncs)
    scalar, copy = "aten._local_scalar_dense.default", "aten._to_copy.default"
    assert operations == [scalar, scalar, copy, copy, "tolist"]
    assert all("fake_cuda_step.py" in where for where in report.syncs)


def test_float64_is_found(step):
    assert step(Case(fault="float64")).float64
