"""Layouts: whatever their JSON says, they are refused before anything is built, or the layer runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import describe
from llmcompress.weight.layout import Layout, pack_weight
from llmcompress.weight.modules import CompressedEmbedding, CompressedLinear
from llmcompress.weight.nodes import Weight, shape
from llmcompress.weight.rows import has_rows, rows
from llmcompress.weight.schema import DEEPEST, check
from llmcompress.weight.trellis import Trellis, table
from tests.builders import every_node, random_nestings
from tests.mutations import REMOVED, changed, places, values
from tests.tiers import expressions

WEIGHTS = [pack_weight(w) for w in every_node() + random_nestings(5, 60)]


@pytest.mark.parametrize("w", expressions(seed=6, count=40))
def test_encoded_weights_match_the_schema(w: Weight) -> None:
    layout, payload = pack_weight(w)
    entry = json.loads(json.dumps(layout.to_json()))
    assert Layout.from_json(entry).to_json() == entry
    layout.check(payload)


def forward(layout: Layout, payload: Tensor) -> None:
    """Run a layer and, if its rows can be read, a table with this payload."""
    out, width = layout.size
    assert CompressedLinear(layout, payload)(torch.ones(3, width)).shape == (3, out)
    if has_rows(layout.header):
        found = CompressedEmbedding(layout, payload, torch.float32)(torch.tensor([0, out - 1]))
        assert found.shape == (2, width)


def judge(entry: Any, payload: Tensor) -> bool:
    """Return False for a layout that is refused, with this payload or a padded part of it; else run it."""
    try:
        layout = Layout.from_json(entry)
        wanted = layout.bytes()
        assert wanted < 2**24, "a mutated layout asks for memory that its tensors do not fill"
        held = torch.nn.functional.pad(payload[:wanted], (0, max(0, wanted - len(payload))))
        layout.check(held)
    except ValueError as error:
        assert str(error)
        return False
    forward(layout, held)
    return True


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.data())
@pytest.mark.slow
def test_any_change_of_any_field_is_refused_or_runs(data: st.DataObject) -> None:
    layout, payload = data.draw(st.sampled_from(WEIGHTS))
    entry = layout.to_json()
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places(entry))))
        entry = changed(entry, place, data.draw(values(entry)))
    judge(entry, payload)


@pytest.mark.slow
def test_each_field_of_each_layout_set_to_each_value() -> None:
    wrong: list[Any] = [
        REMOVED,
        -1,
        0,
        1,
        2,
        3,
        5,
        7,
        16,
        10**6,
        10**18,
        2**70,
        0.5,
        1e308,
        True,
        None,
        "",
        "dense",
        [],
        {},
    ]
    ran = refused = 0
    for layout, payload in WEIGHTS:
        entry = layout.to_json()
        for place in places(entry):
            for value in wrong:
                if judge(changed(entry, place, value), payload):
                    ran += 1
                else:
                    refused += 1
    assert refused > 20 * ran > 0


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.sampled_from(WEIGHTS), st.binary(min_size=1, max_size=64))
def test_a_payload_of_any_bytes_is_refused_or_decoded(weight: tuple[Layout, Tensor], octets: bytes) -> None:
    layout, payload = weight
    forged = torch.frombuffer(bytearray(octets), dtype=torch.uint8).repeat(len(payload))[: len(payload)]
    judge(layout.to_json(), forged)


@pytest.mark.parametrize("header", every_node(), ids=describe)
def test_rows_are_promised_where_they_can_be_read(header: Weight) -> None:
    written = encode(header)
    chosen = torch.zeros(1, dtype=torch.long)
    if has_rows(written[0]):
        assert shape(rows(*written, chosen))[0] == 1
    else:
        with pytest.raises(TypeError, match="no rows of its own"):
            rows(*written, chosen)


@pytest.mark.parametrize("depth", [DEEPEST + 1, 300, 900])
def test_deep_layouts_are_refused(depth: int) -> None:
    header: dict[str, Any] = {"node": "zero", "shape": [1, 1]}
    for _ in range(depth):
        header = {"node": "sum", "parts": [header]}
    with pytest.raises(ValueError, match="deep|parts"):
        check({"size": [1, 1], "header": header, "tensors": []})


def test_a_rank_beyond_both_sides_is_refused() -> None:
    """Zeros take no room in a file, and all of theirs in a product."""
    left, right = ({"node": "zero", "shape": size} for size in ([64, 2**24], [2**24, 64]))
    entry = {"size": [64, 64], "header": {"node": "low_rank", "left": left, "right": right}, "tensors": []}
    with pytest.raises(ValueError, match="its rank 16777216 is larger than"):
        check(entry)


def test_inputs_that_are_null_are_none() -> None:
    entry = WEIGHTS[0].layout.to_json()
    assert Layout.from_json(entry | {"inputs": None}) == Layout.from_json(entry)


def trellises() -> Iterator[Trellis]:
    """Every trellis that a header can name, of both codes."""
    for bits in range(1, 8):
        for memory in range(2 * bits, 17):
            for per_step in (1, 2):
                yield Trellis(bits, per_step, memory)
                yield Trellis(bits, per_step, memory, "linear")


@pytest.mark.slow
def test_every_trellis_that_a_header_can_name_has_a_table() -> None:
    for trellis in trellises():
        assert table(trellis).shape == (1 << trellis.memory, trellis.values)
