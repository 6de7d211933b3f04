"""Lean layers compute what the libraries' own do, and save less for the backward pass."""

import copy

from refl.model.lean import (
    FrozenConv2d,
    LeanResnetBlock2D,
    LoraLinear,
    lora_cast_once,
    lora_off,
    make_lean,
    norm_silu,
)
from refl.model.lora import add_lora
from refl.model.stable_diffusion import decode

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def test_every_layer_of_stable_diffusion_that_can_be_is_lean(parts):
    add_lora(parts.unet, 2, 2, 0)
    for model in (parts.unet, parts.vae):
        make_lean(model)
        kinds = [type(module) for module in model.modules()]
        assert not {nn.Conv2d, ResnetBlock2D, PeftLinear} & set(kinds)
        assert FrozenConv2d in kinds and LeanResnetBlock2D in kinds
        assert (LoraLinear in kinds) == (model is parts.unet)


def test_other_convolutions_stay_as_they_are():
    layers = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 3, 1, padding_mode="circular").requires_grad_(False),
        nn.Conv2d(3, 3, 3, padding="same").requires_grad_(False),
    )
    make_lean(layers)
    assert {type(module) for module in layers} == {nn.Conv2d}


GEOMETRIES = {
    "3x3": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1),
    "strided": dict(kernel_size=3, stride=2, padding=1),
    "strided, unpadded": dict(kernel_size=3, stride=2),
    "even kernel": dict(kernel_size=4, stride=2, padding=1),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "grouped": dict(kernel_size=3, padding=1, groups=4),
    "uneven": dict(kernel_size=(3, 1), stride=(2, 1), padding=(1, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_frozen_convolution_has_the_gradient_of_torch_s(geometry, dtype):
    """The same bits in the same layout, for the weights in channels last that models are loaded with."""
    layer = nn.Conv2d(8, 16, **GEOMETRIES[geometry]).to(dtype=dtype, memory_format=torch.channels_last)
    layer.requires_grad_(False)
    lean = nn.Sequential(copy.deepcopy(layer))
    make_lean(lean)
    for size in ((8, 8), (9, 7), (16, 12)):
        for layout in LAYOUTS:
            x = torch.randn(2, 8, *size, dtype=dtype).to(memory_format=layout).requires_grad_()
            outputs = [module(x) for module in (layer, lean)]
            upstream = torch.randn_like(outputs[0])
            for other in LAYOUTS:  # of the gradient that arrives
                ours, theirs = (
                    torch.autograd.grad(y, x, upstream.to(memory_format=other), retain_graph=True)[0]
                    for y in reversed(outputs)
                )
                assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def saved_bytes(run) -> int:
    """Bytes that autograd saves for the backward pass of `run`, without weights."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # noqa: F841, what it keeps must not be freed before it is counted
    return sum(kept.values())


def test_the_decoder_saves_a_third(parts):
    lean = copy.deepcopy(parts.vae)
    make_lean(lean)
    x0 = torch.randn(1, 4, 8, 8, requires_grad=True)
    kept = [saved_bytes(lambda vae=vae: decode(vae, x0)) for vae in (parts.vae, lean)]
    assert kept[1] < 0.45 * kept[0]


def test_the_unet_saves_less(parts):
    add_lora(parts.unet, 2, 2, 0)
    lean = copy.deepcopy(parts.unet)
    make_lean(lean)
    arguments = torch.randn(1, 4, 8, 8), 7, torch.randn(1, 77, 16)
    kept = [saved_bytes(lambda unet=unet: unet(*arguments).sample) for unet in (parts.unet, lean)]
    assert kept[1] < 0.9 * kept[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_decoder_draws_the_same_bits_with_the_same_gradient(parts, dtype, layout):
    vae = parts.vae.to(dtype=dtype, memory_format=layout)
    lean = copy.deepcopy(vae)
    make_lean(lean)
    x0 = torch.randn(2, 4, 8, 8, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    images, gradients = [], []
    for model in (vae, lean):
        images.append(decode(model, x0))
        gradients += torch.autograd.grad(images[-1].square().sum(), x0)
    assert torch.equal(*images)
    assert (gradients[0] - gradients[1]).norm() <= 4 * torch.finfo(dtype).eps * gradients[0].norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_silu(layout):
    norm = nn.GroupNorm(4, 8).double().requires_grad_(False)
    norm.weight.normal_()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    upstream = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(y, x, upstream) for y in (norm_silu(norm, x), F.silu(norm(x))))
    assert torch.equal(*ours, *theirs)
    with torch.no_grad():
        assert torch.equal(norm_silu(norm, x), F.silu(norm(x)))


def test_the_lora_layer_is_that_of_peft(parts):
    lora = add_lora(parts.unet.double(), 2, 3, 0)
    with torch.no_grad():
        for matrix in lora:
            matrix.data = torch.randn_like(matrix).double()
    layer = next(module for module in parts.unet.modules() if type(module) is PeftLinear)
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    inputs = x, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = []
    for cls in (PeftLinear, LoraLinear):
        layer.__class__ = cls
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_lora_cast_once_is_the_lora_at_that_time(parts):
    unet = parts.unet.bfloat16()
    lora = add_lora(unet, 2, 3, 0)
    make_lean(unet)
    arguments = torch.randn(2, 4, 8, 8).bfloat16(), torch.tensor(7), torch.randn(2, 77, 16).bfloat16()

    def change():
        for matrix in lora:
            matrix.add_(torch.randn_like(matrix))

    with torch.no_grad():
        change()
        alone = unet(*arguments).sample
        with lora_cast_once(unet):
            assert torch.equal(unet(*arguments).sample, alone)
            change()
            assert torch.equal(unet(*arguments).sample, alone)
        assert not torch.equal(unet(*arguments).sample, alone)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["to_q", "conv1"]}])
def test_any_kind_of_lora_can_be_switched_off(parts, settings):
    arguments = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 77, 16)
    with torch.no_grad():
        base = parts.unet(*arguments).sample
        config = {"target_modules": ["to_q"], "init_lora_weights": False} | settings
        parts.unet.add_adapter(LoraConfig(r=2, **config))
        make_lean(parts.unet)
        changed = parts.unet(*arguments).sample
        assert not torch.allclose(changed, base, atol=1e-3)
        with lora_off(parts.unet):
            torch.testing.assert_close(parts.unet(*arguments).sample, base, rtol=1e-5, atol=1e-5)
        assert torch.equal(parts.unet(*arguments).sample, changed)
