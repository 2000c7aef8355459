"""Inputs of few bits: what the library of compressed-tensors rounds them to, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmcompress.weight.inputs import InputFormat, InputName
from llmcompress.weight.layout import Layout
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Dense
from tests.builders import gaussian

WIDTH = 96
FLOAT8 = {"num_bits": 8, "type": "float"}
ENTRIES: dict[tuple[InputName, bool], dict[str, Any]] = {  # of the library, by format and whether it is calibrated
    ("fp8", False): FLOAT8 | {"strategy": "token", "dynamic": True},
    ("fp8", True): FLOAT8 | {"strategy": "tensor", "dynamic": False},
    ("int8", False): {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ("int8", True): {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
    ("mxfp8", False): FLOAT8 | {"strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
    ("nvfp4", True): {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    },
}  # fmt: skip


def hostile(dtype: torch.dtype) -> Tensor:
    """Return tokens of many magnitudes: zeros, an outlier channel, the middles between numbers of few bits."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 40, WIDTH, generator=generator) * torch.logspace(-7, 3, 40)[None, :, None]
    x[0, 0], x[1, 3, :40] = 0, 0
    x[:, :, 5] *= 30
    x[2, 7] = torch.arange(WIDTH) / 8 - 6
    x[2, 8] = 2.0 ** -torch.arange(WIDTH)
    return x.to(dtype)


def of_library(x: Tensor, entry: dict[str, Any], form: InputFormat) -> Tensor:
    """Return what the library makes of the inputs of a linear with our scale."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from compressed_tensors.quantization.lifecycle.initialize import initialize_qparams

    linear = nn.Linear(WIDTH, 2, dtype=x.dtype).requires_grad_(False)
    arguments = quantization.QuantizationArgs(**entry)
    initialize_qparams(linear, "input", arguments, (WIDTH,), x.dtype)
    linear.quantization_status = quantization.QuantizationStatus.FROZEN
    for name, value in linear.named_parameters():
        if name.startswith("input"):
            value.fill_(0.0 if "zero" in name else form.scale or 0.0)
    found: Tensor = forward_quantize(linear, x.clone(), "input", arguments)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "calibrated"), ENTRIES)
def test_rounding_equals_the_library(name: InputName, calibrated: bool, dtype: torch.dtype) -> None:
    x = hostile(dtype)
    form = InputFormat.of_peak(name, float(x.abs().max()) / 2) if calibrated else InputFormat(name)
    rounded = form.round(x)
    assert rounded.dtype == dtype and torch.equal(rounded, of_library(x, ENTRIES[name, calibrated], form))
    assert not torch.equal(rounded, x)


@pytest.mark.parametrize(("name", "calibrated"), ENTRIES)
def test_a_linear_multiplies_rounded_inputs_and_gradients_pass(name: InputName, calibrated: bool) -> None:
    form = InputFormat.of_peak(name, 3.0) if calibrated else InputFormat(name)
    weight, x = gaussian(8, WIDTH), gaussian(5, WIDTH, 1).requires_grad_()
    linear = CompressedLinear.of(Dense(weight), inputs=form)
    y = linear(x)
    assert torch.equal(y, form.round(x.detach()) @ weight.T)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight.sum(0).expand(5, -1))


def test_a_layout_keeps_them_and_refuses_nonsense() -> None:
    linear = CompressedLinear.of(Dense(gaussian(4, 40)), inputs=InputFormat.of_peak("int8", 2.0))
    entry = linear.layout.to_json()
    assert (
        Layout.from_json(entry) == linear.layout
        and "inputs" not in CompressedLinear.of(Dense(gaussian(4, 40))).layout.to_json()
    )
    for inputs in (
        {"format": "int4"},
        {"format": "int8", "scale": -1.0},
        {"format": "int8", "scale": float("inf")},
        {"format": "mxfp8"},  # groups of 32 in 40 columns
        {"format": "nvfp4", "scale": 1.0},
        {"format": "int8", "bits": 8},
    ):
        with pytest.raises(ValueError, match="inputs"):
            Layout.from_json(entry | {"inputs": inputs})
    wide = CompressedLinear.of(Dense(gaussian(4, 64))).layout.to_json()
    for inputs in ({"format": "mxfp8", "scale": 1.0}, {"format": "nvfp4"}):
        with pytest.raises(ValueError, match="does not fit"):
            Layout.from_json(wide | {"inputs": inputs})
