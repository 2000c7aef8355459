"""Microscaling floats against a search over all numbers and scales in float64, one group at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmcompress.methods.engines.floats import LAYOUTS, FloatLayout, nearest_floats
from llmcompress.weight.expression import bits, dense, float_steps, float_values
from llmcompress.weight.nodes import Minifloat, Where, Zero
from tests.builders import compressed, correlated, gaussian

FORMATS = sorted(LAYOUTS)


def slow(group: Tensor, numbers: Tensor, scales: Tensor, tried: tuple[int, ...]) -> float:
    """The least squared error of a group over the scales tried, by every number for every weight; all float64."""
    covering = float(group.abs().max()) / float(numbers.max())
    below = max((code for code in range(len(scales)) if float(scales[code]) <= covering), default=-1)
    errors = []
    for offset in tried:
        scale = scales[min(max(below + offset, 0), len(scales) - 1)]
        errors.append(sum(float((numbers * scale - weight).square().min()) for weight in group))
    return min(errors)


def finite(values: Tensor) -> Tensor:
    return values[values.isfinite()].double()


@pytest.mark.parametrize("name", [name for name in FORMATS if LAYOUTS[name].scales != "bfloat16"])
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (6, 64)])
def test_every_group_has_the_least_squared_error_of_the_scales_tried(name: str, size: tuple[int, int]) -> None:
    layout, weight = LAYOUTS[name], gaussian(*size)
    w = nearest_floats(weight, layout)
    numbers, scales = finite(float_values(layout.form)), finite(float_values(layout.scales))
    scales = scales if layout.scales == "e8m0" else scales[:127]  # the others are negative
    if w.tensor_scale is not None:
        assert math.frexp(float(w.tensor_scale))[0] == 0.5, "its reciprocal would be rounded"
        assert 448 / 4 <= float(weight.abs().max()) / 6 / float(w.tensor_scale) <= 448 / 2
        scales = scales * w.tensor_scale.double()
    error = (dense(w).double() - weight.double()).square()
    for row in range(size[0]):
        for start in range(0, size[1], layout.group(size[1])):
            part = slice(start, start + layout.group(size[1]))
            expected = slow(weight[row, part].double(), numbers, scales, layout.tried)
            assert float(error[row, part].sum()) == pytest.approx(expected, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("name, largest", [("mxfp4", 2), ("mxfp6", 2), ("mxfp8", 8)])
def test_no_group_is_worse_than_with_the_scale_of_the_specification(name: str, largest: int) -> None:
    """OCP Microscaling 1.0, section 6.3: 2^(floor(log2 of the largest magnitude) - exponent of the largest number)."""
    layout, weight = LAYOUTS[name], gaussian(16, 96)
    ours = (dense(nearest_floats(weight, layout)) - weight).square().unflatten(1, (-1, 32)).sum(2)
    numbers = finite(float_values(layout.form))
    strictly = False
    for row in range(16):
        for group in range(3):
            part = weight[row, 32 * group : 32 * group + 32].double()
            scale = 2.0 ** (math.floor(math.log2(float(part.abs().max()))) - largest)
            theirs = float((numbers * scale - part[:, None]).square().min(1).values.sum())
            assert float(ours[row, group]) <= theirs * (1 + 1e-5)
            strictly |= float(ours[row, group]) < 0.99 * theirs
    assert strictly, "the search never finds a better scale"


@pytest.mark.parametrize("name", ["fp8", "fp8_tensor"])
def test_eight_bits_under_one_scale_lose_about_as_little_as_with_any_scale_of_an_octave(name: str) -> None:
    """Every bfloat16 scale from the one that just covers the largest magnitude to twice that, by torch's own cast."""
    weight = gaussian(5, 48)
    w = nearest_floats(weight, LAYOUTS[name])  # type: ignore[index]
    assert w.scale.dtype == torch.bfloat16 and w.scale.shape == ((1, 1) if name == "fp8_tensor" else (5, 1))
    groups = weight.reshape(1, -1) if name == "fp8_tensor" else weight
    ours = (dense(w) - weight).square().reshape(groups.shape).sum(1)
    for group, lost, scale in zip(groups, ours, float_steps(w)[:, 0], strict=True):
        largest = float(group.abs().max())
        assert 0.99 * largest / 448 < float(scale) < 2.02 * largest / 448
        tried = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
        tried = tried[(tried >= largest / 448) & (tried <= 2 * largest / 448)]
        cast = (group / tried[:, None]).to(torch.float8_e4m3fn).float() * tried[:, None]
        errors = (cast - group).square().sum(1)
        assert float(lost) < float(errors.mean()) and float(lost) < 4 / 3 * float(errors.min())


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_format_holds_stays_as_it_is(name: str) -> None:
    layout = LAYOUTS[name]
    numbers = float_values(layout.form)
    weight = numbers[numbers.isfinite()].repeat(3, 8) * 0.25
    torch.testing.assert_close(dense(nearest_floats(weight, layout)), weight, rtol=1e-6, atol=0)


def test_smaller_groups_with_finer_scales_lose_less() -> None:
    weight = gaussian(32, 128)
    lost = {name: float((dense(nearest_floats(weight, LAYOUTS[name])) - weight).square().sum()) for name in FORMATS}
    assert lost["mxfp8"] < lost["mxfp6"] < lost["nvfp4"] < lost["mxfp4"]
    assert lost["fp8"] < lost["fp8_tensor"] < lost["mxfp6"]
    plain = FloatLayout("e2m1", "e8m0", 32, (0,))
    assert lost["mxfp4"] < float((dense(nearest_floats(weight, plain)) - weight).square().sum())


def test_a_pruned_base_stays_pruned_and_only_what_is_kept_is_fitted() -> None:
    weight, inputs = gaussian(8, 64), correlated(256, 64)
    pruned = compressed(weight, inputs, {"method": "magnitude", "sparsity": 0.5})
    done = compressed(weight, inputs, {"method": "magnitude", "sparsity": 0.5}, {"method": "mxfp"})
    assert isinstance(done.approx, Where) and isinstance(pruned.approx, Where)
    assert isinstance(done.approx.inside, Minifloat) and isinstance(done.approx.outside, Zero)
    keep = pruned.approx.index.inside
    assert torch.equal(done.approx.index.inside, keep) and int(dense(done.approx)[~keep].count_nonzero()) == 0
    assert torch.equal(dense(done.approx), dense(nearest_floats(weight * keep, LAYOUTS["mxfp4"])))
    assert bits(done.approx) == 8 * 64 + 4 * int(keep.sum()) + 8 * 8 * 2
