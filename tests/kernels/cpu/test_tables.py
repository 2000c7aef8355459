"""Kernels of codebooks and of floats of few bits: what they decode and hold, and what has none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from llmcompress.kernels.accelerate import accelerate
from llmcompress.kernels.cpu import matmul, prefill
from llmcompress.kernels.cpu.emit import LANES
from llmcompress.kernels.cpu.layouts import pack_matrix
from llmcompress.kernels.cpu.prepare import is_supported, prepare
from llmcompress.kernels.cpu.tables import TILES
from llmcompress.weight.encoding import encode
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear
from llmcompress.weight.nodes import Bitmap, Codebook, FloatFormat, Minifloat, Weight, Where
from llmcompress.weight.trellis import Trellis
from tests.builders import codebook, grid, minifloat, payload_bits, seeded, streams, tensor_bytes
from tests.kernels.cpu.test_products import distance, every_tier, on_tier  # noqa: F401  (a fixture)

DECODED = [codebook((33, 300), 256, 4, 1), codebook((17, 100), 16, 1, 2), codebook((50, 77), 5, 3, 3)]
DECODED += [minifloat((33, 100), "e2m1", "e8m0", 32, 1), minifloat((33, 100), "e2m3", "e8m0", 32, 2)]


@every_tier
@pytest.mark.usefixtures("on_tier")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w", DECODED, ids=lambda w: type(w).__name__)
def test_decoded_columns_equal_the_dense_matrix(w: Codebook | Minifloat, dtype: torch.dtype) -> None:
    held = pack_matrix(w)
    found = prefill.decode_columns(held, 0, held.rows, dtype)[: held.size[1], : held.size[0]]
    assert torch.equal(found.T, dense(w).to(dtype))


@pytest.mark.parametrize("entries", [16, 256])
def test_products_of_more_rows_than_a_tile(entries: int) -> None:
    w = codebook((LANES * TILES + 40, 136), entries, 4, 1)
    for tokens, dtype, tolerance in ((1, torch.bfloat16, 4e-3), (2, torch.float32, 1e-5)):
        x = torch.randn(tokens, 136, generator=seeded(tokens)).to(dtype)
        assert distance(matmul.multiply(prepare(w), x, "auto"), x.double() @ dense(w).double().T) < tolerance


@pytest.mark.parametrize(
    "w",
    [
        codebook((512, 2048), 256, 4, 1),
        codebook((512, 2048), 16, 1, 2),
        codebook((512, 2048), 64, 8, 3),
        minifloat((512, 2048), "e2m1", "e8m0", 32, 4),
        minifloat((512, 2048), "e2m3", "e8m0", 32, 5),
    ],
    ids=lambda w: type(w).__name__,
)
def test_packed_codes_take_little_more_memory_than_on_disk(w: Weight) -> None:
    assert 8 * tensor_bytes(prepare(w)) < 1.25 * payload_bits(encode(w)[1]) + 8 * 8192


@pytest.mark.parametrize("code", [0, 1, 126, 250])
def test_bfloat16_scales_reach_as_far_as_float32(code: int) -> None:
    w = minifloat((20, 64), "e2m1", "e8m0", 32, 1)
    w = replace(w, scale=torch.full_like(w.scale, code))
    x = torch.full((1, 64), 0.125 if code > 127 else 64.0)
    assert torch.equal(matmul.multiply(prepare(w), x, "exact"), (x.double() @ dense(w).double().T).float())


@pytest.mark.parametrize(
    ("form", "scales", "group_size"),
    [("e2m1", "e4m3", 16), ("e2m1", "e4m3", 32), ("e3m2", "e8m0", 32), ("e4m3", "e8m0", 32), ("e2m1", "e8m0", 16)],
)
def test_floats_that_are_no_small_integers_have_no_kernel(
    form: FloatFormat, scales: FloatFormat, group_size: int
) -> None:
    w = minifloat((20, 64), form, scales, group_size, 1)
    assert not is_supported(w) and prepare(w) is None


@pytest.mark.parametrize(
    "w",
    [
        codebook((20, 70), 2, 17, 1),  # every number of a vector is compiled
        replace(codebook((20, 64), 16, 4, 1), scale=torch.full((20, 1), 0.01, dtype=torch.bfloat16)),
        replace(grid((20, 64), 16, 32, 1, True), scale=torch.full((20, 2), 0.01, dtype=torch.bfloat16)),
        replace(grid((20, 64), 16, 32, 1, True), scale=torch.full((20, 2), 0.01)),
        replace(streams(Trellis(2, 1, 12), 64, 10, 768), scale=torch.full((64, 1), 0.01)),
        streams(Trellis(1, 1, 4, "linear"), 64, 10, 768),  # 16 numbers
    ],
    ids=["long vectors", "codebook", "grid", "float32", "trellis", "few numbers"],
)
def test_what_kernels_would_misread_has_none(w: Weight) -> None:
    """They read scales as float16: a model is what it is decoded to, also where it multiplies."""
    layer = CompressedLinear.of(w)
    x = torch.randn(3, layer.in_features, generator=seeded(1))
    assert layer.layout.from_json(layer.layout.to_json()) == layer.layout
    torch.testing.assert_close(accelerated(layer)(x), x @ dense(w).T, rtol=1e-4, atol=1e-4)
    assert not is_supported(w) and prepare(w) is None


def test_elements_with_scales_of_another_dtype_are_what_they_decode_to() -> None:
    size = (40, 128)
    for share in (0.1, 0.5):
        inside = Bitmap(torch.rand(size, generator=seeded(1)) < share)
        part = grid(size, 16, 32, 1, True)
        w = Where(inside, replace(part, scale=part.scale.bfloat16()), grid(size, 2, 32, 2, True))
        x = torch.randn(3, 128, generator=seeded(1))
        found = accelerated(CompressedLinear.of(w))(x)
        torch.testing.assert_close(found, x @ dense(w).T, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def accelerated(layer: CompressedLinear) -> nn.Module:
    model = nn.Sequential(layer).eval()
    accelerate(model, "exact")
    return model
