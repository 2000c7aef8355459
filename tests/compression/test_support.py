"""The matrix of families in docs/results/families.md, made again: it cannot say what is not so."""

from __future__ import annotations

from pathlib import Path

import pytest
import tables
from families import support

from tests.models.test_families import FAMILIES
from tests.tiers import tiered_nightly
from tests.tiny import FAMILY_CONFIGS
from tests.zoo import ENCODERS, EVERY, MIXTURES

RECORDS = {record["arm"]: record["numbers"] for record in tables.current("support", tables.all_records())}


def test_every_family_has_a_row() -> None:
    assert set(RECORDS) == set(EVERY), "run research/families.py FAMILY --jsonl docs/results/support.jsonl"
    assert set(FAMILIES) | set(MIXTURES) <= set(EVERY)


def test_a_family_that_can_be_planned_can_be_compressed_and_loaded() -> None:
    for family, row in RECORDS.items():
        assert row["plan"] == row["compress"], family
        if row["plan"] == "yes":
            assert {row["load"], row["dense"]} == {"yes"}, family
            assert row["generate"] == ("it predicts no next token" if family in ENCODERS else "yes"), family


@pytest.mark.parametrize("family", tiered_nightly(EVERY, FAMILY_CONFIGS.__contains__))
def test_row_is_made_again(family: str, tmp_path: Path) -> None:
    assert support(family, tmp_path) == RECORDS[family]
