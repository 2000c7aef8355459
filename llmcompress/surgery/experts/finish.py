"""The changed mixture, written or only looked at, and its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcompress.data.calibration import CalibrationTokens
from llmcompress.models.dense.companions import companions
from llmcompress.models.files import file_names
from llmcompress.models.files.checkpoint import writing
from llmcompress.surgery.edited_model import ChangedConfig, Made, write
from llmcompress.surgery.experts.mixture import ExpertMixture
from llmcompress.surgery.experts.report import BlockFate, ExpertsReport, Way, unused


def finished(
    way: Way,
    mixture: ExpertMixture,
    change: ChangedConfig,
    made: Mapping[str, Made],
    tokens: CalibrationTokens,
    blocks: Sequence[BlockFate],
    settings: dict[str, Any],
    experts: int,
    output: str | Path | None,
) -> ExpertsReport:
    """Write the changed model with its report to the folder `output`, if one is given, and return the report.

    `experts`: in each of its blocks that still have some. Raises InputError for a change that the model's type does not
    allow, DiskError for an output that cannot be written.
    """
    new, source = change.complete(made), mixture.source
    report = ExpertsReport(
        model=source.public_name,
        output=None if output is None else str(output),
        way=way,
        settings=settings,
        experts_before=mixture.experts,
        experts_after=experts,
        bytes_before=source.bytes,
        bytes_after=new.bytes,
        calibration=tokens.report(),
        blocks=tuple(blocks),
        warnings=(*source.notes, *tokens.notes, *unused(blocks)),
    )
    if output is not None:
        beside = companions(source.folder)
        with writing(Path(output), new.bytes) as writer:
            beside.copy(writer.folder)
            write(new, change.skeleton, mixture.arch, writer)
            writer.write(file_names.EXPERTS, json.dumps(report.to_json() | {"output": None}, indent=1))
    return report
