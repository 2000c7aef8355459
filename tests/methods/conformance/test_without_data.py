"""Methods that do without data, on moments of no tokens: sound, and what they are on white inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmcompress.methods.layer import Layer, apply, methods, relative_error, step
from llmcompress.methods.moments import Moments
from llmcompress.methods.presume import FLOOR, presumed_energy
from llmcompress.weight.expression import dense
from llmcompress.weight.nodes import Dense
from tests.builders import compressed, correlated, gaussian, moments, seeded
from tests.methods.conformance.cases import ROTATE, SIZE, STEPS, Step, assert_sound, leads, refusal, spelled
from tests.tiers import tiered

DATA_FREE = [arguments for arguments in STEPS if methods()[arguments["method"]].data_free]
TRELLIS: Step = {"method": "trellis", "bits": 3, "memory": 8}
REFINE: Step = {"method": "refine"}
PRESUME: Step = {"method": "presume"}


def without_data(weight: Tensor, *steps: Step) -> Layer:
    """The layer after `steps` where nothing is known of its inputs."""
    given = Layer("block.0.linear", weight, Dense(weight.to(torch.bfloat16)), Moments(0.0), seed="0")
    return apply(given, [step(arguments) for arguments in steps])


def test_methods_without_data_say_so() -> None:
    frugal = {name for name, method in methods().items() if method.data_free}
    assert frugal >= {"rtn", "hqq", "trellis", "rotate", "refine", "magnitude", "dimap", "svd", "presume"}
    assert not frugal & {"gptq", "wanda", "sparsegpt", "eora", "lqer"}


@pytest.mark.parametrize("size", [SIZE, (5, 33)], ids=str)
@pytest.mark.parametrize("arguments", tiered(DATA_FREE, leads, spelled))
def test_sound_on_moments_of_no_tokens(arguments: Step, size: tuple[int, int]) -> None:
    if refusal(size, arguments) is not None:
        return
    done = without_data(gaussian(*size), arguments)
    assert_sound(done, size, arguments)
    assert relative_error(gaussian(*size), done.expression()) <= 1
    assert torch.equal(dense(without_data(gaussian(*size), arguments).expression()), dense(done.expression()))


@pytest.mark.parametrize("steps", [[TRELLIS], [ROTATE, TRELLIS], [{"method": "rtn", "bits": 2}, REFINE]], ids=str)
def test_no_data_are_white_inputs(steps: list[Step]) -> None:
    """With H the identity there is nothing to feed back; damping only multiplies it."""
    weight = gaussian(*SIZE)
    given = Layer("block.0.linear", weight, Dense(weight.bfloat16()), moments(8 * torch.eye(SIZE[1])), seed="0")
    white = apply(given, [step(arguments) for arguments in steps])
    blind = without_data(weight, *steps)
    errors = [relative_error(weight, done.expression()) for done in (white, blind)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_without_data_a_trellis_beats_rounding_in_the_same_bits() -> None:
    weight = gaussian(64, 64)
    blind, rounded = without_data(weight, ROTATE, TRELLIS), without_data(weight, ROTATE, {"method": "rtn", "bits": 3})
    assert relative_error(weight, blind.expression()) < 0.75 * relative_error(weight, rounded.expression())


@pytest.mark.parametrize("base", [{"method": "rtn", "bits": 3}, TRELLIS, {"method": "hqq", "bits": 2}], ids=spelled)
def test_without_data_refine_never_loses(base: Step) -> None:
    weight = gaussian(*SIZE)
    before, after = without_data(weight, base), without_data(weight, base, REFINE)
    gained = relative_error(weight, after.expression()) / relative_error(weight, before.expression())
    assert gained < 0.999 if base is TRELLIS else gained <= 1 + 1e-6, "rounding alone is nearest, a trellis is not"


# --- presumed statistics --------------------------------------------------------------------------------------------


def test_presumed_energies_are_inverse_squares_of_mean_magnitudes() -> None:
    weight = gaussian(32, 16) * torch.logspace(-0.3, 0.3, 16)
    sizes = [sum(abs(float(w)) for w in weight[:, column]) / 32 for column in range(16)]
    inverse = torch.tensor([size**-2 for size in sizes])
    torch.testing.assert_close(presumed_energy(weight), inverse / inverse.mean(), rtol=1e-4, atol=0)


def test_channels_without_weights_are_not_presumed_endless() -> None:
    weight = gaussian(32, 16)
    weight[:, 3] = 0
    energy = presumed_energy(weight)
    assert float(energy[3] / energy.min()) < (3 / FLOOR) ** 2
    assert torch.equal(presumed_energy(torch.zeros(4, 8)), torch.ones(8))


def test_measured_moments_stay() -> None:
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1])
    gptq = {"method": "gptq", "bits": 3}
    alone, presuming = compressed(weight, inputs, gptq), compressed(weight, inputs, PRESUME, gptq)
    assert torch.equal(dense(presuming.approx), dense(alone.approx))


@pytest.mark.parametrize("steps", [[ROTATE, TRELLIS], [ROTATE, TRELLIS, REFINE]], ids=str)
def test_the_presumption_pays_where_weights_are_small_on_strong_channels(steps: list[Step]) -> None:
    """And costs where all channels' weights are alike next to nothing: four layers, 3 bits."""
    gains = torch.logspace(-0.5, 0.5, 64)[torch.randperm(64, generator=seeded(3))]
    errors = torch.zeros(2, 2)
    for seed in range(4):
        plain, inputs = gaussian(48, 64, 10 * seed), torch.randn(512, 64, generator=seeded(seed))
        for kind, (weight, seen) in enumerate(((plain / gains, inputs * gains), (plain, inputs))):
            for i, presumed in enumerate(([PRESUME], [])):
                done = without_data(weight, *presumed, *steps)
                errors[kind, i] += relative_error(weight, done.expression(), moments(seen))
    assert errors[0, 0] < 0.8 * errors[0, 1], errors
    assert errors[1, 0] < 1.1 * errors[1, 1], errors
