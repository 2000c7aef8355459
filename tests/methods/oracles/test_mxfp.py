"""Microscaling floats against a search over all numbers and scales in float64, one group at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import relative_error
from llmcompress.methods.refine import descend
from llmcompress.methods.solvers import floats
from llmcompress.methods.solvers.floats import LAYOUTS, FloatLayout, nearest_floats
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import bits, dense, float_steps, float_values
from llmcompress.weight.nodes import Minifloat, Where, Zero
from tests.builders import compressed, correlated, gaussian, moments
from tests.methods.conformance.cases import refusal
from tests.methods.oracles.slow import damped_moment, optimal_brain_surgeon

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
def test_numbers_of_the_format_stay(name: str) -> None:
    layout = LAYOUTS[name]
    numbers = float_values(layout.form)
    weight = numbers[numbers.isfinite()].repeat(3, 8) * 0.25
    torch.testing.assert_close(dense(nearest_floats(weight, layout)), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_few_rows_at_a_time_come_out_as_in_one_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(23, 40)
    whole = encode(nearest_floats(weight, LAYOUTS[name]))[1]
    monkeypatch.setattr(floats, "ROWS", 5)
    parts = encode(nearest_floats(weight, LAYOUTS[name]))[1]
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


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


def steps_of(columns: Tensor, layout: FloatLayout, factor: float, importance: Tensor) -> Tensor:
    """The step of each row of `columns [out, group]`, float64 `[out]`: of the scales tried, that of the least error."""
    numbers, scales = finite(float_values(layout.form)), finite(float_values(layout.scales)) * factor  # type: ignore[arg-type]
    scales = scales if layout.scales == "e8m0" else scales[:127]
    found = []
    for row in columns:
        below = int((scales <= float(row.abs().max() / numbers.max())).sum()) - 1
        tried = [scales[min(max(below + offset, 0), len(scales) - 1)] for offset in layout.tried]
        lost = [float((((numbers * s - row[:, None]).square().amin(1)) * importance).sum()) for s in tried]
        found.append(tried[lost.index(min(lost))])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "nvfp4"])
def test_feedback_stores_what_brain_surgery_of_one_column_after_the_other_stores(name: str) -> None:
    layout, weight, inputs = LAYOUTS[name], gaussian(6, 40), correlated(640, 40)  # type: ignore[index]
    mine = compressed(weight, inputs, {"method": "gptq", "format": name}).approx
    assert isinstance(mine, Minifloat)
    factor = 1.0 if mine.tensor_scale is None else float(mine.tensor_scale)
    importance, numbers, steps = inputs.double().square().mean(0), finite(float_values(layout.form)), torch.zeros(6)

    def begin(column: int, current: Tensor, pivots: Tensor) -> None:
        nonlocal steps
        if column % layout.group(40) == 0:
            part = slice(column, column + layout.group(40))
            steps = steps_of(current[:, part], layout, factor, importance[part])

    def store(column: int, wanted: Tensor) -> Tensor:
        points = numbers * steps[:, None]
        return points.gather(1, (points - wanted[:, None]).abs().argmin(1, keepdim=True))[:, 0]

    slow_result = optimal_brain_surgeon(weight, damped_moment(inputs, 0.1), begin, store)
    same = torch.isclose(dense(mine).double(), slow_result, rtol=1e-4, atol=1e-7).all(1)
    assert int(same.sum()) >= 5, "float32 may take another side of a tie in one row at most"


@pytest.mark.parametrize("name", FORMATS)
def test_feedback_loses_less_of_the_outputs_and_refine_no_more(name: str) -> None:
    """In the same bits, on tokens not seen."""
    weight, inputs = gaussian(32, 96), correlated(2000, 96, seed=3)
    steps = [{"method": "mxfp", "format": name}], [{"method": "gptq", "format": name}]
    nearest, fed = (compressed(weight, inputs, *those).approx for those in steps)
    refined = compressed(weight, inputs, *steps[1], {"method": "refine"}).approx
    unseen = moments(correlated(2000, 96, seed=4))
    lost = [relative_error(weight, w, unseen) for w in (nearest, fed, refined)]
    assert bits(nearest) == bits(fed) == bits(refined)
    assert lost[1] < 0.8 * lost[0] and lost[2] < 1.02 * lost[1], lost


def test_a_refined_float_is_the_best_of_all_numbers_of_its_group() -> None:
    weight, inputs = gaussian(3, 40), correlated(640, 40)
    hessian = damped_moment(inputs, 0.1)
    w = nearest_floats(weight, LAYOUTS["mxfp4"])
    values, numbers = dense(w).double(), finite(float_values("e2m1"))
    for row in range(3):
        for column in range(40):
            losses = []
            for number in numbers * float(float_steps(w)[row, column // 32]):
                trial = values[row].clone()
                trial[column] = number
                error = weight[row].double() - trial
                losses.append((float(error @ hessian @ error), float(number)))
            values[row, column] = min(losses)[1]
    torch.testing.assert_close(dense(descend(w, weight, hessian.float())).double(), values, rtol=1e-5, atol=1e-6)


def test_feedback_that_outgrows_the_factor_clips() -> None:
    """The factor is chosen before feedback: the last columns must take up whatever the first ones leave."""
    weight, inputs = gaussian(4, 64), correlated(200, 64)
    weight[:, :32] *= 1e-3
    done = compressed(weight, inputs, {"method": "sparsegpt", "pattern": "2:4", "format": "nvfp4"})
    assert bool(dense(done.approx).isfinite().all()) and relative_error(weight, done.approx, moments(inputs)) < 0.5


def test_a_format_leaves_nothing_to_say_of_a_grid() -> None:
    with pytest.raises(ValueError, match="format: mxfp4 says how weights are stored; drop bits, group_size"):
        refusal((8, 64), {"method": "gptq", "format": "mxfp4", "bits": 4, "group_size": 32})
    with pytest.raises(ValueError, match="bits are of a grid, and format is of floats; give one of them"):
        refusal((8, 64), {"method": "sparsegpt", "sparsity": 0.5, "format": "mxfp4", "bits": 4})
    for grid in ({"group_size": 16}, {"symmetric": False}, {"clip": False}):
        for form in ({}, {"format": "mxfp4"}):
            with pytest.raises(ValueError, match="are of a grid; give its bits, or leave them out"):
                refusal((8, 64), {"method": "sparsegpt", "sparsity": 0.5, **form, **grid})
