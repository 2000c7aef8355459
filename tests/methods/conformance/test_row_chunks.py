"""A long matrix in runs of rows comes out as it would in one piece, whatever the steps."""

from __future__ import annotations

import pytest
import torch

from llmcompress.methods import row_chunks
from llmcompress.methods.layer import apply, step
from llmcompress.methods.row_chunks import apply_in_runs
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import bits, dense
from tests.builders import gaussian, layer
from tests.methods.conformance.cases import ROTATE, SIZE, STEPS, Step, calibration, leads, spelled
from tests.tiers import tiered

PIPELINES: list[list[Step]] = [
    *([arguments] for arguments in STEPS),
    [ROTATE, {"method": "gptq", "bits": 3}, {"method": "refine"}],
    [{"method": "wanda", "sparsity": 0.5}, {"method": "gptq", "bits": 4}],
    [{"method": "pb_llm", "salient": "1:8", "salient_bits": 4}, {"method": "refine"}],
    [{"method": "gptq", "bits": 2}, {"method": "eora", "rank": 2}],
    [ROTATE, {"method": "trellis", "bits": 1.5, "memory": 8}, {"method": "refine"}],
]


def is_fast(pipeline: list[Step]) -> bool:
    return len(pipeline) > 1 or leads(pipeline[0])


@pytest.mark.parametrize("pipeline", tiered(PIPELINES, is_fast, lambda steps: "+".join(map(spelled, steps))))
def test_in_runs_as_in_one_piece(pipeline: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_chunks, "RUN", 20)
    given, steps = layer(gaussian(*SIZE), calibration(SIZE[1])), [step(arguments) for arguments in pipeline]
    # rows of a stream, which divide those of a run
    steps = [one.model_copy(update={"run": 10}) if one.method == "trellis" else one for one in steps]
    done, whole = apply_in_runs(given, steps).weight, apply(given, steps).expression()
    assert encode(done)[0] == encode(whole)[0] and bits(done) == bits(whole)
    # products of other heights may round the last bit of a weight otherwise
    torch.testing.assert_close(dense(done), dense(whole), rtol=1e-3, atol=1e-4)
