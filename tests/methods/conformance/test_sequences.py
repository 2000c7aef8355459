"""Steps after one another: what an earlier one made stays, or the plan and the run refuse with one sentence."""

from __future__ import annotations

import pytest
import torch

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import apply, base_and_term, relative_error, step, support
from llmcompress.weight.expression import dense
from tests.builders import compressed, correlated, gaussian, moments
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
    spelled,
)
from tests.tiers import tiered

PREDECESSORS: dict[str, Step] = {
    "pruned": {"method": "magnitude", "sparsity": 0.5},
    "pruned 2:4": {"method": "wanda", "pattern": "2:4"},
    "quantized": {"method": "rtn", "bits": 4, "group_size": 16},
    "partly binary": {"method": "pb_llm", "salient": 0.25},
    "compensated": {"method": "svd", "rank": 2},
    "rotated": ROTATE,
}


@pytest.mark.parametrize("arguments", tiered([step for step in STEPS if step != ROTATE], leads, spelled))
def test_in_a_rotated_basis(arguments: Step) -> None:
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1], seed=1)
    done = compressed(weight, inputs, ROTATE, arguments)
    assert_sound(done, SIZE, ROTATE, arguments)
    seen = relative_error(done.weight, done.approx, done.inputs)
    real = relative_error(weight, done.expression(), moments(inputs))
    assert seen == pytest.approx(real, rel=1e-3, abs=1e-6), "the error in the rotated basis is the layer's error"
    assert real <= 1


@pytest.mark.parametrize(
    "arguments", [{"method": "rtn", "bits": 8}, {"method": "hqq"}, {"method": "mxfp", "format": "fp8"}]
)
def test_what_feedback_moved_stays_when_it_is_rounded(arguments: Step) -> None:
    first: Step = {"method": "sparsegpt", "sparsity": 0.6}
    before = compressed(gaussian(*SIZE), correlated(1024, SIZE[1], seed=1), first)
    after = apply(before, [step(arguments)])
    original = before.weight * support(before.approx)
    given, rounded = dense(before.approx), dense(after.approx)
    assert (rounded - given).norm() < 0.8 * (rounded - original).norm(), "not the original weights again"


@pytest.mark.parametrize("before", PREDECESSORS)
@every_step
def test_after_another_step(arguments: Step, before: str) -> None:
    """The work of an earlier step stays, or the plan and the run refuse."""
    first = PREDECESSORS[before]
    given = compressed(gaussian(*SIZE), calibration(SIZE[1]), first)
    why = refusal(SIZE, first, arguments)
    if why is not None:
        assert why.startswith(f"block.0.linear: {arguments['method']}: ") and ";" in why, why
        return
    done = apply(given, [step(arguments)])
    assert_sound(done, SIZE, first, arguments)
    base = dense(base_and_term(done.approx)[0])
    keep = support(given.approx)
    if keep is not None:
        assert int(base[~keep].count_nonzero()) == 0, "pruned weights came back"
    elif before in ("quantized", "partly binary"):
        assert torch.equal(base, dense(base_and_term(given.approx)[0])), "the quantized base was changed"
    assert relative_error(gaussian(*SIZE), done.expression(), moments(calibration(SIZE[1]))) <= 1


PIPELINES: list[list[Step]] = [
    [ROTATE, {"method": "pb_llm", "salient": 0.1, "salient_bits": 4}],
    [{"method": "wanda", "pattern": "2:4"}, {"method": "gptq", "bits": 3, "group_size": 16}],
    [ROTATE, {"method": "sparsegpt", "sparsity": 0.5, "bits": 3}],
    [ROTATE, {"method": "gptq", "bits": 2, "group_size": 16, "symmetric": False}],
    [{"method": "sparsegpt", "pattern": "2:4"}, {"method": "refine"}],
]


@pytest.mark.parametrize("steps", PIPELINES, ids=lambda steps: " > ".join(map(spelled, steps)))
@pytest.mark.parametrize("factor_bits", [4, 8, 16])
def test_eora_at_the_end_of_any_pipeline_lowers_the_output_error(steps: list[Step], factor_bits: int) -> None:
    weight, inputs = gaussian(*SIZE), correlated(1024, SIZE[1], seed=1)
    eora = {"method": "eora", "rank": 4, "factor_bits": factor_bits}
    before, after = compressed(weight, inputs, *steps), compressed(weight, inputs, *steps, eora)
    assert_sound(after, SIZE, *steps, eora)
    assert torch.equal(dense(base_and_term(after.approx)[0]), dense(base_and_term(before.approx)[0])), (
        "the base was changed"
    )
    errors = [relative_error(weight, done.expression(), moments(inputs)) for done in (after, before)]
    assert errors[0] < errors[1], errors


UNDOING: list[tuple[Step, Step]] = [
    ({"method": "rtn"}, {"method": "rtn"}),
    ({"method": "gptq"}, {"method": "wanda", "sparsity": 0.5}),
    ({"method": "wanda", "sparsity": 0.5}, {"method": "sparsegpt", "sparsity": 0.5}),
    ({"method": "wanda", "pattern": "2:4"}, {"method": "pb_llm"}),
    ({"method": "pb_llm"}, {"method": "gptq"}),
    ({"method": "rtn"}, ROTATE),
    ({"method": "svd", "rank": 1}, ROTATE),
    (ROTATE, ROTATE),
    ({"method": "svd", "rank": 1}, {"method": "eora", "rank": 1}),
]


@pytest.mark.parametrize("first, second", UNDOING, ids=spelled)
def test_a_step_that_would_undo_an_earlier_one_is_refused_by_the_plan(first: Step, second: Step) -> None:
    assert refusal(SIZE, first) is None
    assert refusal(SIZE, first, second) is not None, "the plan lets it pass"


IMPOSSIBLE: list[tuple[Step, ...]] = [
    ({"method": "eora", "rank": 49},),
    ({"method": "wanda", "pattern": "2:5"},),
    ({"method": "pb_llm", "salient": "1:8", "group_size": 12},),
    ({"method": "magnitude", "sparsity": 0.5}, {"method": "gptq", "act_order": True}),
    (
        {
            "method": "alternate",
            "base": {"method": "gptq", "act_order": True},
            "low_rank": {"method": "svd", "rank": 99},
        },
    ),
]


@pytest.mark.parametrize("steps", IMPOSSIBLE, ids=lambda steps: " > ".join(map(spelled, steps)))
def test_the_plan_refuses_what_the_run_refuses(steps: tuple[Step, ...]) -> None:
    with pytest.raises(RecipeError, match="^block.0.linear: "):
        compressed(gaussian(*SIZE), calibration(SIZE[1]), *steps)
    assert refusal(SIZE, *steps) is not None, "plan promises what the run cannot do"


def test_a_rotation_is_not_a_base_to_alternate_with() -> None:
    turning = {"method": "alternate", "base": ROTATE, "low_rank": {"method": "svd", "rank": 1}, "rounds": 1}
    assert "a step of its own" in str(refusal(SIZE, turning))
    with pytest.raises(RecipeError, match="a step of its own"):
        compressed(gaussian(*SIZE), calibration(SIZE[1]), turning)
    for base in ("svd", "eora"):
        with pytest.raises(ValueError, match="makes no base"):
            step({**turning, "base": {"method": base, "rank": 1}})
    with pytest.raises(ValueError, match="makes no low-rank term"):
        step({**turning, "low_rank": {"method": "rtn"}})
