"""Programs that torch traces from compressed modules give what the modules give, and leave no trace behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

from llmcompress.errors import RecipeError
from llmcompress.weight.expression import dense
from llmcompress.weight.layout import pack_weight
from llmcompress.weight.modules import CompressedEmbedding, CompressedLinear
from llmcompress.weight.nodes import Dense, TrellisCodes, Weight, shape
from llmcompress.weight.rows import check_rows
from llmcompress.weight.trellis import Trellis
from tests.builders import grid, streams
from tests.tiers import expressions

CASES = expressions(seed=7, count=16, fast=2)


def every(count: int) -> list[ParameterSet]:
    """The cases; of those that are fast elsewhere, one in `count` is here, and the others are slow."""
    fast = [case for case in CASES if not case.marks]
    return [
        case if case.marks or fast.index(case) % count == 0 else pytest.param(*case.values, id=case.id, marks=SLOW)
        for case in CASES
    ]


SLOW = pytest.mark.slow
NIGHTLY = pytest.mark.nightly
IDS = torch.tensor([[0, 2, 1, 0]])


def exported(module: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Export with any number of tokens."""
    dims = ({1: torch.export.Dim("tokens", min=2, max=64)},)
    return torch.export.export(module, (example,), dynamic_shapes=dims).module()


def compiled(module: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)


TRACES = [exported, pytest.param(compiled, marks=SLOW)]


def both_ways(cases: list[ParameterSet]) -> list[ParameterSet]:
    """Return every case exported, and compiled. A form is traced alike by both, so most compiled ones are nightly."""
    ways = [pytest.param(*case.values, exported, id=f"{case.id}-exported", marks=case.marks) for case in cases]
    for number, case in enumerate(cases):
        marks = [*case.marks, SLOW if number % 8 == 0 else NIGHTLY]
        ways.append(pytest.param(*case.values, compiled, id=f"{case.id}-compiled", marks=marks))
    return ways


def table_of(w: Weight) -> CompressedEmbedding:
    return CompressedEmbedding(*pack_weight(w), torch.float32)


@pytest.mark.parametrize(("w", "trace"), both_ways(every(3)))
def test_tables_are_looked_up(w: Weight, trace: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    """By every form that has rows; in an exported program, for other numbers of tokens too."""
    try:
        check_rows(w)
    except RecipeError:
        pytest.skip("has no rows")
    found = trace(table_of(w), IDS.clamp_max(shape(w)[0] - 1))
    ids = torch.arange(12).view(2, 6)[:1] % shape(w)[0]
    torch.testing.assert_close(found(ids), table_of(w)(ids), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found(ids), dense(w)[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("w", "trace"), both_ways(every(8)[::2]))
def test_linears_multiply(w: Weight, trace: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    """Without a kernel, as on other devices and with gradients."""
    x = torch.randn(1, 6, shape(w)[1], generator=torch.Generator().manual_seed(0))
    found = trace(CompressedLinear.of(w), x[:, :3])(x)
    torch.testing.assert_close(found, x @ dense(w).T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("trace", TRACES)
def test_numbers_that_never_change_are_no_part_of_a_program(trace: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    """The table of a trellis is made outside, even where nobody has wanted it before, and is a real one afterwards."""
    trellis = Trellis(6, 1, 12 if trace is exported else 13)  # sizes of this test alone
    w = streams(trellis, 7, 24, 22)
    assert isinstance(w, TrellisCodes)
    found = trace(table_of(w), IDS)
    expected = dense(w)[IDS]
    assert torch.equal(found(IDS), expected) and torch.equal(table_of(w)(IDS), expected)
    if trace is exported:
        assert "sort" not in str(found.graph)  # type: ignore[attr-defined]


@pytest.mark.parametrize("trace", [exported, compiled])
@pytest.mark.parametrize("token", [pytest.param(-1, marks=SLOW), 7])
@pytest.mark.parametrize(
    "w", [pytest.param(Dense(torch.zeros(7, 24)), marks=SLOW), grid((7, 24), 8, 24, 0, symmetric=True)]
)
def test_tokens_outside_of_a_table_end_a_program(
    w: Weight, token: int, trace: Callable[..., Callable[[Tensor], Tensor]]
) -> None:
    with pytest.raises(RuntimeError, match="a token is not in a table of 7"):
        trace(table_of(w), IDS)(torch.tensor([[1, token, 2]]))
