"""Promises of every registered method, checked on every example of its config: a new method is tested from here on.

A step is given small layers of several shapes; where it cannot work on one, it must say so in a sentence, and
`sketch` must say the same before anything is run.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from llmcompress.errors import NumericsError, RecipeError
from llmcompress.methods.layer import Layer, apply, methods, relative_error, step
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import bits, dense
from llmcompress.weight.nodes import Dense
from tests.builders import compressed, correlated, gaussian, layer, moments
from tests.methods.conformance.cases import (
    ROTATE,
    SIZE,
    STEPS,
    Step,
    assert_sound,
    calibration,
    every_step,
    leads,
    refusal,
    sketched,
    spelled,
)
from tests.tiers import tiered

Case = tuple[Step, tuple[int, int]]

SHAPES = ((1, 1), (7, 33), SIZE, (64, 128), (5, 300))
CASES: list[Case] = [(arguments, size) for arguments in STEPS for size in SHAPES if refusal(size, arguments) is None]
REFUSED: list[Case] = [(arguments, size) for arguments in STEPS for size in SHAPES if refusal(size, arguments)]


def named(case: Case) -> str:
    return f"{spelled(case[0])}-{case[1][0]}x{case[1][1]}"


def is_fast(case: Case) -> bool:
    return leads(case[0]) and case[1] in ((7, 33), SIZE)


# --- every example on every shape -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observed:
    """One step on one layer, and what it did besides."""

    arguments: Step
    size: tuple[int, int]
    given: Layer
    done: Layer
    edited: list[str]  # tensors of `given` that are not what they were
    drew: bool  # from the global generator


@pytest.fixture(scope="module", params=tiered(CASES, is_fast, named))
def observed(request: pytest.FixtureRequest) -> Observed:
    """A step run once for all tests that look at it."""
    arguments, size = request.param
    given = layer(gaussian(*size), calibration(size[1]))
    before = {name: tensor.clone() for name, tensor in held(given).items()}
    state = torch.get_rng_state()
    done = apply(given, [step(arguments)])
    edited = [name for name, tensor in held(given).items() if not torch.equal(before[name], tensor)]
    return Observed(arguments, size, given, done, edited, drew=not torch.equal(torch.get_rng_state(), state))


def held(given: Layer) -> dict[str, Tensor]:
    """The tensors that a layer brings to its steps."""
    assert isinstance(given.approx, Dense)
    inputs = given.inputs
    found = {"weight": given.weight, "approx": given.approx.values, "outer": inputs.outer, "square": inputs.square}
    return {name: tensor for name, tensor in (found | {"cross": inputs.cross}).items() if tensor is not None}


def test_finite_and_as_large_as_planned(observed: Observed) -> None:
    assert_sound(observed.done, observed.size, observed.arguments)


def test_same_input_same_bits(observed: Observed) -> None:
    once = encode(observed.done.expression())
    torch.randn(3)  # the global generator is nobody's business
    weight, inputs = gaussian(*observed.size), calibration(observed.size[1])
    again = encode(compressed(weight, inputs, observed.arguments).expression())
    assert once[0] == again[0]
    assert all(torch.equal(once[1][name], again[1][name]) for name in once[1]), "two runs differ"


def test_inputs_are_not_edited(observed: Observed) -> None:
    given = observed.given
    assert observed.edited == [] and not observed.drew
    assert observed.done is not given and given.rotation is None and given.notes == ()


def test_never_worse_than_zeroing(observed: Observed) -> None:
    inputs = moments(calibration(observed.size[1]))
    error = relative_error(gaussian(*observed.size), observed.done.expression(), inputs)
    assert error <= 1 + 1e-6, f"error {error}: dropping the layer would be better"


@every_step
def test_no_matrix_stays_behind(arguments: Step) -> None:
    """Memory goes back when the layer does: matrices in cycles would wait for the collector, the largest of a run."""
    compressed(gaussian(*SIZE), calibration(SIZE[1]), arguments)  # tables that stay are made by now
    gc.disable()
    gc.freeze()  # what is there by now is not counted, nor looked through later
    try:
        compressed(gaussian(*SIZE), calibration(SIZE[1]), arguments)
        assert matrices() == 0
        cycle = [torch.zeros(2, 2)]
        cycle.append(cycle)  # type: ignore[arg-type]
        del cycle
        assert matrices() == 1, "one that stays behind is seen"
    finally:
        gc.enable()


def matrices() -> int:
    """The number of tensors of two dimensions that are alive and not frozen."""
    return sum(issubclass(type(each), Tensor) and each.dim() == 2 for each in gc.get_objects())


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_plan_and_run_refuse_in_one_sentence(case: Case) -> None:
    arguments, size = case
    planned = refusal(size, arguments)
    with pytest.raises(RecipeError) as refused:
        compressed(gaussian(*size), calibration(size[1]), arguments)
    for message in (str(refused.value), str(planned)):
        assert message.startswith(f"block.0.linear: {arguments['method']}: "), message
        assert "\n" not in message and ";" in message, f"what is wrong; what to do: {message}"


def test_only_patterns_ranks_and_halves_limit_shapes() -> None:
    limited = [a for a, _ in REFUSED if "pattern" not in str(a) and ":" not in str(a.get("salient"))]
    limited = [a for a in limited if a["method"] != "binary_low_rank"]  # scales of a small matrix take all its bits
    assert all(a["bits"] == 1.5 for a in limited), "an example refuses a shape"


# --- difficult layers -----------------------------------------------------------------------------------------------


@lru_cache
def difficult() -> dict[str, tuple[Tensor, Tensor]]:
    """(weight, inputs) by what is difficult about them; not to be written to."""
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1], seed=1)
    dead = inputs.clone()
    dead[:, 3] = 0
    dead[:, 40:48] = 0
    twins = inputs.clone()
    twins[:, 1::2] = twins[:, ::2]
    spiky = inputs.clone()
    spiky[0] *= 1000
    outlier = weight.clone()
    outlier[5, 7] = 100.0
    return {
        "dead channels": (weight, dead),
        "no input at all": (weight, torch.zeros_like(inputs)),
        "one token": (weight, inputs[:1]),
        "fewer tokens than channels": (weight, inputs[:20]),
        "twin channels": (weight, twins),
        "constant inputs": (weight, torch.ones(64, SIZE[1])),
        "one loud token": (weight, spiky),
        "an outlier weight": (outlier, inputs),
        "constant weights": (torch.full(SIZE, 0.5), inputs),
        "bfloat16 weights": (weight.bfloat16().float(), inputs),
        "tiny inputs": (weight, inputs * 1e-4),
        "huge inputs": (weight, inputs * 1e4),
    }


@pytest.mark.parametrize("difficulty", difficult())
@every_step
def test_difficult_layers(arguments: Step, difficulty: str) -> None:
    weight, inputs = difficult()[difficulty]
    done = compressed(weight, inputs, arguments)
    assert_sound(done, SIZE, arguments)
    needs = methods()[arguments["method"]].needs  # without data, only the weights' own error is minimised
    error = relative_error(weight, done.expression(), moments(inputs) if needs else None)
    assert error <= 1 + 1e-6, f"error {error}: dropping the layer would be better"
    assert relative_error(weight, done.expression()) < 1.5, "the weights themselves went astray"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weights", "input statistics"])
@every_step
def test_nan_and_inf_are_refused_with_the_layer_named(arguments: Step, where: str, bad: float) -> None:
    weight, inputs = gaussian(*SIZE), correlated(256, SIZE[1])
    (weight if where == "weights" else inputs)[3, 5] = bad
    with pytest.raises(NumericsError, match=rf"^block\.0\.linear: its {where} hold NaN or Inf; "):
        compressed(weight, inputs, arguments)


@every_step
def test_a_zero_matrix_stays_zero(arguments: Step) -> None:
    done = compressed(torch.zeros(SIZE), correlated(256, SIZE[1]), arguments)
    assert_sound(done, SIZE, arguments)
    assert int(dense(done.expression()).count_nonzero()) == 0


@every_step
def test_twice_the_weights_give_twice_the_approximation(arguments: Step) -> None:
    weight, inputs = 16 * gaussian(*SIZE), correlated(1024, SIZE[1], seed=1)
    one = dense(compressed(weight, inputs, arguments).expression())
    two = dense(compressed(2 * weight, inputs, arguments).expression())
    torch.testing.assert_close(two, 2 * one, rtol=1e-4, atol=1e-5)


@every_step
def test_dead_channels_keep_their_weights(arguments: Step) -> None:
    """A channel that calibration never saw may speak later; its weights are approximated like any other's."""
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1], seed=1)
    inputs[:, :8] = 0
    if arguments["method"] == "rotate":
        inputs = correlated(1024, SIZE[1], seed=1)  # no channel is dead in a rotated basis
    done = compressed(weight, inputs, arguments)
    lost = (weight - dense(done.expression()))[:, :8].square().sum() / weight[:, :8].square().sum()
    assert lost < 1, f"{lost} of the unseen channels' energy is lost"


# --- against the data-free sibling ----------------------------------------------------------------------------------

SIBLINGS: list[tuple[list[Step], list[Step]]] = [
    *(
        ([{"method": "gptq", **form}], [{"method": "rtn", **form}])
        for form in (
            {"bits": 1},
            {"bits": "ternary"},
            {"bits": 2, "group_size": 16},
            {"bits": 3, "symmetric": False},
            {"bits": 4, "clip": False},
        )
    ),
    *(
        ([{"method": better, **form}], [{"method": "magnitude", **form}])
        for better in ("wanda", "sparsegpt")
        for form in ({"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"})
    ),
    *(
        ([{"method": "pb_llm", **form}], [{"method": "pb_llm", **form, "feedback": False}])
        for form in ({"salient": 0.1}, {"salient": 0.1, "structure": "columns"}, {"salient": "1:8", "group_size": 16})
    ),
    *(
        (
            [{"method": "rtn", "bits": 2}, {"method": better, **form}],
            [{"method": "rtn", "bits": 2}, {"method": "svd", **form}],
        )
        for better in ("eora", "lqer")
        for form in ({"rank": 4}, {"rank": 4, "factor_bits": 16}, {"rank": 4, "factor_bits": 4})
    ),
    *(
        ([{"method": name, **form}], [{"method": name, **form, "feedback": False}])
        for name, form in (
            ("planes", {"bits": 1}),
            ("planes", {"bits": 2}),
            ("planes", {"bits": 3, "group_size": 16}),
            ("fdb", {"group_size": 16}),
            ("billm", {}),
            ("planes", {"bits": 1, "columns": True}),
            ("kmeans", {}),
        )
    ),
    ([{"method": "adadim", "bits": 3, "group_size": 16}], [{"method": "rtn", "bits": 3, "group_size": 16}]),
    *(
        ([{"method": name, **form}], [{"method": name, **form, "rounds": 0}])
        for name, form in (
            ("planes", {"bits": 2, "start": "residual"}),
            ("planes", {"bits": 3}),
            ("fdb", {"group_size": 16}),
            ("billm", {"rounds": 15}),
            ("billm", {"rounds": 15, "columns": True, "bitmap": "all"}),
        )
    ),
    ([{"method": "planes", "bits": 2}], [{"method": "planes", "bits": 2, "start": "residual"}]),
    ([{"method": "planes", "bits": 2}], [{"method": "gptq", "bits": 2}]),
    ([ROTATE, {"method": "trellis", "memory": 8}], [ROTATE, {"method": "gptq", "bits": 2}]),
    ([ROTATE, {"method": "vq"}], [ROTATE, {"method": "kmeans", "bits": 2}]),
    (
        [{"method": "sparsegpt", "sparsity": 0.5, "bits": 4}],
        [{"method": "magnitude", "sparsity": 0.5}, {"method": "rtn", "bits": 4}],
    ),
]


@pytest.mark.parametrize("steps, sibling", SIBLINGS, ids=lambda steps: " > ".join(map(spelled, steps)))
def test_calibration_pays_on_tokens_it_has_not_seen(steps: list[Step], sibling: list[Step]) -> None:
    """Mean over four layers with correlated inputs, 16 tokens a channel; the data must earn at least 3 %."""
    errors = torch.zeros(2)
    for seed in range(4):
        weight = gaussian(48, 64, seed=10 * seed)
        calibration, unseen = (correlated(1024, 64, seed=100 * seed + part, basis=seed) for part in (1, 2))
        for i, chosen in enumerate((steps, sibling)):
            w = compressed(weight, calibration, *chosen).expression()
            errors[i] += relative_error(weight, w, moments(unseen))
    assert errors[0] <= 0.97 * errors[1], f"held-out error {errors[0] / 4:.4f}, without data {errors[1] / 4:.4f}"


# --- the registry ---------------------------------------------------------------------------------------------------


def test_unknown_methods_and_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'gptq'"):
        step({"method": "gptg"})
    with pytest.raises(ValueError, match="grup_size"):
        step({"method": "gptq", "grup_size": 3})


def test_layers_that_share_an_input_share_a_rotation_and_its_moments() -> None:
    inputs = moments(calibration(64))
    layers = [
        Layer(name, gaussian(48, 64, s), Dense(gaussian(48, 64, s)), inputs, seed="5") for s, name in enumerate("qk")
    ]
    q, k = (apply(each, [step(ROTATE)]) for each in layers)
    assert q.rotation is not None and k.rotation is not None and torch.equal(q.rotation.signs, k.rotation.signs)
    assert q.inputs is k.inputs, "the rotated moments are computed twice"
    other = apply(Layer("o", gaussian(48, 64), Dense(gaussian(48, 64)), inputs, seed="6"), [step(ROTATE)])
    assert other.rotation is not None and not torch.equal(other.rotation.signs, q.rotation.signs)


def test_sketches_need_no_values() -> None:
    big = (2**20, 2**14)  # 34 GB in bfloat16
    for arguments in ({"method": "gptq", "bits": 3, "group_size": 128}, {"method": "eora", "rank": 64}):
        assert bits(sketched(big, arguments)) > 0
