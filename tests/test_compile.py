"""Compiled models take the same step as they do without torch.compile."""

import shutil

import refl_lora
from refl.model.compile import compile_unet
from refl.model.lean import lora_cast_once, lora_off, make_lean
from refl.model.lora import add_lora
from refl.train import models

import pytest
import torch
from conftest import LORA, SMOOTH, run_in_process
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SIZES = (2, 1)  # of a rollout whose samples stop one after the other


@pytest.fixture
def fresh_compiler():
    """Nothing that an earlier test compiled, and its settings afterwards."""
    limit = torch._dynamo.config.recompile_limit
    torch.compiler.reset()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()


def step(base, lora, steps=1) -> list[torch.Tensor]:
    """Predictions, images and gradients of what a training step computes with the models."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    computed = []
    for _ in range(steps):
        timestep, embeds = torch.tensor(7), draw(2, 77, 16)
        with torch.no_grad(), lora_cast_once(base.unet):
            for size in SIZES:
                computed.append(base.unet(draw(size, 4, 8, 8), timestep, embeds[:size]).sample)
        x0 = draw(1, 4, 8, 8).requires_grad_()
        image = base.decode(x0)
        (upstream,) = torch.autograd.grad(image.square().sum(), x0)
        with torch.no_grad(), lora_off(base.unet):
            computed.append(base.unet(x0.detach(), timestep, embeds[:1]).sample)
        output = base.unet(x0.detach(), timestep, embeds[:1]).sample
        computed += [image.detach(), upstream, output.detach()]
        computed += torch.autograd.grad(output, lora, upstream)
    return computed


@pytest.mark.parametrize(
    ("backend", "checkpointing"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_a_compiled_step_is_the_same_step(fresh_compiler, parts, backend, checkpointing):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler on the CPU")
    lora = add_lora(parts.unet, 2, 2, 0)
    with torch.no_grad():
        for matrix in lora:
            matrix.normal_(std=0.1)
    for model in (parts.unet, parts.vae):
        make_lean(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
    expected = step(parts, lora, steps=2)
    names = set(parts.unet.state_dict())

    compile_unet(parts.unet, backend)
    first, number = step(parts, lora), len(expected) // 2
    with torch.compiler.set_stance("fail_on_recompile"):  # the second step compiles nothing
        both = step(parts, lora, steps=2)
    for ours, eager in zip([*first, *both], expected[:number] + expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item())
    assert set(parts.unet.state_dict()) == names and any(gradient.any() for gradient in first[-len(lora) :])


def test_a_run_can_be_compiled(fresh_compiler, training_options, tmp_path, monkeypatch):
    """The whole training by the option; on the CPU, aot_eager in place of inductor, which takes minutes."""
    run_in_process(refl_lora, monkeypatch, *training_options, *SMOOTH, "--output_dir", tmp_path / "eager")
    compiled = []

    def with_aot_eager(unet):
        compiled.append(unet)
        compile_unet(unet, "aot_eager")

    monkeypatch.setattr(models, "compile_unet", with_aot_eager)
    options = ["--torch_compile", "--output_dir", tmp_path / "compiled"]
    run_in_process(refl_lora, monkeypatch, *training_options, *SMOOTH, *options)
    assert len(compiled) == 1
    eager, ours = (load_file(tmp_path / name / LORA) for name in ("eager", "compiled"))
    for name, value in eager.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6)
