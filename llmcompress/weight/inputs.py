"""Inputs of few bits: the numbers that a linear's inputs are rounded to before it multiplies them.

The numbers and scales of each format are those of compressed-tensors, bit for bit, computed in the dtype of the inputs.
Gradients pass as if nothing was rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

InputName = Literal["fp8", "int8", "nvfp4", "mxfp8"]
FP8, INT8, FP4 = 448.0, 127.5, 6.0  # the number that a group's largest magnitude is scaled to
SCALES = torch.finfo(torch.float8_e4m3fn).max  # the largest scale of a group of nvfp4
GROUPS = {"nvfp4": 16, "mxfp8": 32}  # columns with a scale of their own


@dataclass(frozen=True)
class InputFormat:
    """A format of inputs.

    `scale`: the calibrated scale of fp8 and int8, None for one a token; for nvfp4, the factor of its groups' scales.
    """

    format: InputName
    scale: float | None = None

    @staticmethod
    def of_peak(name: InputName, peak: float) -> InputFormat:
        """Return a format with the scale for inputs of at most this magnitude, a bfloat16 as every engine holds it."""
        scale = {"nvfp4": FP4 * SCALES / peak, "fp8": peak / FP8, "int8": peak / INT8}[name]
        return InputFormat(name, float(torch.tensor(scale).bfloat16()))

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a layout."""
        return {"format": self.format} | ({} if self.scale is None else {"scale": self.scale})

    def __str__(self) -> str:
        return describe_inputs(self.format, self.scale is not None)

    def round(self, x: Tensor) -> Tensor:
        """Return `x [..., in]` rounded, in its dtype."""
        return _Rounding.apply(x, self) if x.requires_grad else self.nearest(x)

    def round_before(self, linear: nn.Module) -> None:
        """Let `linear` round its inputs."""
        linear.register_forward_pre_hook(lambda _, inputs: (self.round(inputs[0]), *inputs[1:]))

    def nearest(self, x: Tensor) -> Tensor:
        """Return `round(x)`, through which no gradient passes."""
        size = GROUPS.get(self.format, x.shape[-1])
        groups = x.unflatten(-1, (-1, size))
        if self.format == "nvfp4":
            numbers, scale = _fp4(groups, torch.full((), self.scale or 1.0, device=x.device))
        else:
            scale = self._scale(groups)
            scaled = groups / scale
            whole = scaled.clamp(-128, 127).round() if self.format == "int8" else _fp8(scaled)
            numbers = whole.to(x.dtype)
        return (numbers * scale).flatten(-2).to(x.dtype)

    def _scale(self, groups: Tensor) -> Tensor:
        """Return the scale of each group, in the dtype of the inputs."""
        if self.scale is not None:
            return torch.full((), self.scale, dtype=groups.dtype, device=groups.device)
        peak = groups.abs().amax(-1, keepdim=True)
        if self.format == "mxfp8":
            scale = _power_of_two(peak)
            return torch.where(scale == 0, 1.0, scale)
        scale = peak / (FP8 if self.format == "fp8" else INT8)
        return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def describe_inputs(name: InputName, is_calibrated: bool) -> str:
    """Return a format of inputs in words."""
    if name in GROUPS:
        return f"{name} inputs"
    return f"{name} inputs with a scale {'for all' if is_calibrated else 'a token'}"


class _Rounding(torch.autograd.Function):
    """Rounds, and lets gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, form: InputFormat) -> Tensor:
        """Return the rounded inputs."""
        return form.nearest(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it comes."""
        return gradient, None


def _fp8(values: Tensor) -> Tensor:
    return values.clamp(-FP8, FP8).to(torch.float8_e4m3fn)


def _fp4(groups: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return e2m1 numbers and their scales, float32: e4m3 over `factor`."""
    peak = groups.abs().amax(-1, keepdim=True)
    wanted = ((peak / FP4).float() * factor).clamp(-SCALES, SCALES)
    local = wanted.to(torch.float8_e4m3fn).float()
    scale = torch.where(local == 0, 0.125, local) / factor
    scaled = (groups / scale).clamp(-FP4, FP4)
    step = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))  # ties go to even numbers
    return (scaled / step).round() * step, scale


def _power_of_two(peak: Tensor) -> Tensor:
    """Return the power of two under which e4m3 holds `peak`: a quarter below the next one counts as that."""
    least = torch.finfo(peak.dtype).tiny
    peak = torch.where(peak < least, torch.where(peak < 0.75 * least, 0.0, least), peak)
    mantissa, exponent = torch.frexp(peak.float())
    whole = exponent - 1 + (mantissa >= 0.875) - 8
    return torch.where(peak > 0, torch.ldexp(torch.ones_like(mantissa), whole.clamp(-127, 127)), 2.0**-127).to(
        peak.dtype
    )
