"""`exl3`: searches of rings against tiles whose codes are known, and feedback against explicit conditional minima."""

from __future__ import annotations

import pytest
import torch

from llmcompress.allocation.distortion import rough
from llmcompress.errors import RecipeError
from llmcompress.methods.layer import apply, relative_error, step
from llmcompress.methods.solvers.hessian import inverse_factor, second_moment
from llmcompress.methods.trellises.exl3 import SPREAD, WIDE_SPREAD, nearest_tiles, tiles_with_feedback
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Tiles
from llmcompress.weight.tiles import STEPS, from_tiles, numbers, states, to_tiles
from tests.builders import compressed, correlated, gaussian, layer, moments, seeded
from tests.methods.conformance.cases import assert_sound

LIMITS = {1: 0.25, 2: 0.0625, 4: 0.0039}  # of the squared error on a Gaussian: 4^-bits


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_tiles_of_exact_numbers_are_found(size: int) -> None:
    codes = torch.randint(1 << size, (6, STEPS), generator=seeded(size), dtype=torch.uint8)
    wanted = numbers()[states(codes, size)]
    found = numbers()[states(nearest_tiles(wanted, size), size)]
    assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("size", LIMITS)
def test_the_error_on_a_gaussian_is_near_its_limit(size: int) -> None:
    wanted = torch.randn(32, STEPS, generator=seeded(size)) * SPREAD.get(size, WIDE_SPREAD)
    found = numbers()[states(nearest_tiles(wanted, size), size)]
    error = float((found - wanted).square().mean() / wanted.square().mean())
    assert LIMITS[size] < error < 1.2 * LIMITS[size]


@pytest.mark.slow
def test_feedback_moves_later_inputs_to_their_minimum() -> None:
    """Later inputs want `w + inverse(H_ll) H_le e`, in float64."""
    weight, inputs = torch.randn(64, 32, generator=seeded(1)), moments(correlated(512, 64))
    hessian = second_moment(inputs)
    hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
    found = tiles_with_feedback(weight, inverse_factor(inputs, 0.1)[0], 2)
    values = from_tiles(numbers()[states(found, 2)]).double()
    for start in range(16, 64, 16):
        made = weight[:start].double() - values[:start]
        moved = torch.linalg.solve(hessian[start:, start:], hessian[start:, :start] @ made)
        wanted = (weight[start:].double() + moved)[:16].float()
        expected = from_tiles(numbers()[states(nearest_tiles(to_tiles(wanted), 2), 2)])
        differing = (expected != values[start : start + 16]).float().mean()
        assert differing < 0.02, "up to ties that rounding decides"


@pytest.mark.slow
def test_data_and_bits_help() -> None:
    weight, inputs = gaussian(128, 256), correlated(1024, 256)
    with_data, blind = (compressed(weight, x, {"method": "exl3"}) for x in (inputs, correlated(0, 256)))
    for done in (with_data, blind):
        assert_sound(done, (128, 256), {"method": "exl3"})
    more = compressed(weight, inputs, {"method": "exl3", "bits": 3})
    errors = [relative_error(weight, done.expression(), moments(inputs)) for done in (more, with_data, blind)]
    assert errors[0] < 0.4 * errors[1] < 0.4 * 0.7 * errors[2]
    w = with_data.expression()
    assert isinstance(w, Tiles) and bits(w) == 2 * weight.numel() + 16 * (128 + 256)
    assert torch.equal(dense(compressed(weight, inputs, {"method": "exl3"}).expression()), dense(w))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_errors_without_a_search_are_as_large(size: int) -> None:
    """On even weights, and where rows and columns differ."""
    inputs, weight = correlated(1024, 256), gaussian(128, 256)
    spread = torch.exp(torch.randn(256, generator=seeded(1))) * torch.exp(torch.randn(128, 1, generator=seeded(2)))
    for each in (weight, weight * spread):
        own = (step({"method": "exl3", "bits": size}),)
        found, quick = (
            relative_error(each, apply(layer(each, inputs), steps).expression(), moments(inputs))
            for steps in (own, rough(own))
        )
        assert 0.85 * found < quick < 1.15 * found


def test_other_widths_and_a_second_rotation_are_refused() -> None:
    inputs = correlated(64, 128)
    with pytest.raises(
        RecipeError, match="EXL3 needs sides that 128 divides, and it is 100 x 128; leave it dense, or use trellis"
    ):
        compressed(gaussian(100, 128), inputs, {"method": "exl3"})
    with pytest.raises(RecipeError, match="has a rotation of its own; drop the step that rotates"):
        compressed(gaussian(128, 128), inputs, {"method": "rotate"}, {"method": "exl3"})
