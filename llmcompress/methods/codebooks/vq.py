"""Codebooks in the feedback loop: `vq` of vectors of weights, `kmeans` of single ones.

Entries are shared by all rows of a matrix, and every row has a scale of its own. Entries of every row's own cost more
than they bring: in a rotated basis they lose as much at 2 and 3 bits as shared ones do, and take 0.08 and 0.19 bits a
weight more where a row has 576.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.methods.layer import (
    Layer,
    StepConfig,
    base_target,
    join,
    method,
    own_generator,
    term_beside_dense,
    with_base,
)
from llmcompress.methods.solvers.feedback import Projection, feedback, few_threads
from llmcompress.methods.solvers.grid import GridFormat, grid_sketch
from llmcompress.methods.solvers.hessian import feedback_factor, metric
from llmcompress.methods.solvers.projection import GridPoints, Selection, columns, largest
from llmcompress.methods.solvers.scales import refit_scales
from llmcompress.methods.solvers.vectors import Vectors, k_means, nearest_entries, sum_of_books
from llmcompress.weight.nodes import Codebook, Columns, Weight, Where, shape

OUTLIERS = GridFormat(256)  # the form of columns that are not coded


class CodebookConfig(StepConfig):
    """Arguments of every method that makes codebooks."""

    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")


class KMeans(CodebookConfig):
    """Arguments of `kmeans`."""

    method: Literal["kmeans"] = "kmeans"
    bits: int = Field(2, ge=1, le=8, description="a weight")
    feedback: bool = Field(True, description="columns make up for the errors of those before them (GPTQ)")
    examples = ({}, {"bits": 1}, {"bits": 4}, {"bits": 3, "feedback": False})

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return codebook_sketch(approx, [2**self.bits], 1, 0)


@method("kmeans", KMeans, needs={"outer"}, data_free=True)
def kmeans(layer: Layer, config: KMeans) -> Layer:
    """Scalar k-means (SqueezeLLM, arXiv 2306.07629): every weight goes to one of 2^bits points.

    Points minimise the squared error, weighted by the Hessian diagonal (or, in the feedback loop, by what an error
    costs there), and are fitted to outputs by least squares at the end. Stores a `Codebook` of single weights.

    Differs from the paper: all rows share the points, and each has a float16 scale, instead of points of its own.
    Errors are weighted by layer inputs, not by gradients. There are no sparse outliers. `feedback: false` is closer to
    the paper.
    """
    return quantize_to_codebooks(layer, config, [2**config.bits], 1, 0, config.feedback)


class VQ(CodebookConfig):
    """Arguments of `vq`."""

    method: Literal["vq"] = "vq"
    length: int = Field(4, ge=1, le=16, description="columns of a vector")
    entries: tuple[Annotated[int, Field(ge=2, le=256)], ...] = Field(
        (256,), min_length=1, max_length=4, description="of each codebook; several are added up"
    )
    outliers: float = Field(0, ge=0, le=0.5, description="share of the columns kept at 8 bits")
    examples = (
        {"entries": [16]},
        {"length": 2, "entries": [16, 4]},
        {"length": 3, "entries": [32], "outliers": 0.05},
    )

    def sketch(self, approx: Weight) -> Weight:
        """See `StepConfig.sketch`."""
        return codebook_sketch(approx, self.entries, self.length, self.outliers)


@method("vq", VQ, needs={"outer"}, data_free=True)
def vq(layer: Layer, config: VQ) -> Layer:
    """Vector quantization in the feedback loop (GPTVQ, arXiv 2402.15319; VPTQ, arXiv 2409.17066).

    Minimises tr(E H E^T) greedily, without data |E|^2. Vectors of `length` consecutive input columns of a row become
    entries of a codebook. k-means places the entries and counts an error as feedback makes it count. Each vector goes
    to the entry that is nearest once its error is fed back; at the end entries and scales are fitted to outputs by
    least squares. Stores a `Codebook`, or several added up: if `entries` has several numbers, each codebook codes what
    those before it leave. A share of the columns, those with the most energy, can stay outside at 8 bits. Made for few
    bits, and for weights that look Gaussian: rotate first, which also leaves no outlier columns. `refine` and `pv`
    choose again.

    Differs from the papers: vectors lie along a row (GPTVQ) and not down a column (VPTQ). So one choice sees the
    Hessian between its weights, by the whole triangular block of the loop's factor, not its diagonal. A row has one
    scale, and a matrix one codebook of at most 256 entries, since a larger one takes more bits than it saves in small
    matrices.
    """
    return quantize_to_codebooks(layer, config, config.entries, config.length, config.outliers, True)


def quantize_to_codebooks(
    layer: Layer, config: CodebookConfig, entries: Sequence[int], length: int, outliers: float, fed_back: bool
) -> Layer:
    """Return the layer with its base in codebooks of so many `entries` each, added up, fitted to outputs at the end.

    A share `outliers` of its columns has 8 bits.
    """
    config.sketch(layer.approx)
    target = base_target(layer)
    factor, notes = feedback_factor(layer.inputs, config.damping) if fed_back else (None, ())
    hessian = metric(layer.inputs, target, config.damping)
    energy = hessian.diagonal()
    cost = energy if factor is None else 1 / factor.diagonal().square()  # of a squared error in a column
    precise_columns = largest(target.square().sum(0) * cost, outlier_count(target.shape[1], outliers))
    random = own_generator(layer, config.method)
    books = fit_codebooks(target, torch.where(precise_columns, 0.0, cost), entries, length, random)
    vectors = Vectors(books, factor, energy)
    projection: Projection = vectors
    if bool(precise_columns.any()):
        chosen = precise_columns[:, None].expand(-1, len(target))
        precise = GridPoints(OUTLIERS, len(precise_columns), energy)
        projection = Selection(
            precise, vectors, lambda now, start: chosen[start : start + len(now)], len(precise_columns), columns
        )
    base = feedback(target, factor, projection)
    return with_base(layer, refit_scales(base, target, hessian), notes)


def fit_codebooks(
    target: Tensor, importance: Tensor, entries: Sequence[int], length: int, random: torch.Generator
) -> tuple[Codebook, ...]:
    """Return codebooks for `target [out, in]`, each fitted to what those before it leave; codes are all 0.

    Squared errors count by the `importance [in]` of their columns (0: left out). Scales are the root mean squares of
    rows.
    """
    counted = importance > 0
    energy = (target.square() * counted).sum(1, keepdim=True) / counted.sum().clamp_min(1)
    scale = energy.sqrt().clamp_max(torch.finfo(torch.float16).max).to(torch.float16)
    fill = (0, -target.shape[1] % length)
    left = torch.where(scale > 0, target / scale.float(), 0.0)
    left = torch.nn.functional.pad(left, fill).reshape(-1, length)
    counts = torch.nn.functional.pad(importance * scale.float().square(), fill).reshape(-1, length)
    codes = torch.zeros(len(target), len(left) // len(target), dtype=torch.uint8, device=target.device)
    books: list[Codebook] = []
    with few_threads(length):
        for number in entries:
            if books:
                last = books[-1].centroids.float()
                left = left - last[nearest_entries(left, counts, last)]
            centroids = k_means(left, counts, number, random).to(torch.float16)
            books.append(Codebook(codes, centroids, scale, target.shape[1]))
    return tuple(books)


def outlier_count(width: int, share: float) -> int:
    """Return the number of columns that are not coded."""
    return round(width * share)


def codebook_sketch(approx: Weight, entries: Sequence[int], length: int, outliers: float) -> Weight:
    """Return the result of `quantize_to_codebooks` without values. Raises RecipeError as `term_beside_dense`."""
    term = term_beside_dense(approx, "a codebook")
    rows, width = shape(approx)
    codes = torch.empty(rows, -(-width // length), dtype=torch.uint8, device="meta")
    scale = torch.empty(rows, 1, dtype=torch.float16, device="meta")
    parts = [torch.empty(number, length, dtype=torch.float16, device="meta") for number in entries]
    books = sum_of_books([Codebook(codes, centroids, scale, width) for centroids in parts])
    kept = outlier_count(width, outliers)
    if kept:
        index = Columns(torch.arange(width) < kept)
        return join(Where(index, grid_sketch((rows, width), OUTLIERS), books), term)
    return join(books, term)
