"""Codebooks in the feedback loop: fitted before it, coded within it.

Entries are shared by all rows of a matrix, and every row has a scale of its own. Entries of every row's own cost more
than they bring: in a rotated basis they lose as much at 2 and 3 bits as shared ones do, and take 0.08 and 0.19 bits a
weight more where a row has 576.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from llmcompress.errors import RecipeError
from llmcompress.methods.layer import Layer, StepConfig, base_and_term, base_target, join, with_base
from llmcompress.methods.solvers.centroids import k_means, nearest_entries
from llmcompress.methods.solvers.feedback import Projection, feedback, few_threads
from llmcompress.methods.solvers.grid import GridFormat, grid_sketch
from llmcompress.methods.solvers.hessian import feedback_factor, metric
from llmcompress.methods.solvers.projection import GridPoints, Selection, columns, largest
from llmcompress.methods.solvers.scales import refit_scales
from llmcompress.methods.solvers.vectors import Vectors, sum_of_books
from llmcompress.runtime.seeding import generator
from llmcompress.weight.expression import describe
from llmcompress.weight.nodes import Codebook, Columns, Dense, Weight, Where, shape

KEPT = GridFormat(256)  # of columns that are not coded


class CodebookConfig(StepConfig):
    """The arguments of every method that makes codebooks."""

    damping: float = Field(0.1, gt=0, le=10, description="share of the mean Hessian diagonal that is added")


def quantize_to_codebooks(
    layer: Layer, config: CodebookConfig, entries: Sequence[int], length: int, outliers: float, fed_back: bool
) -> Layer:
    """The layer with its base in codebooks of so many entries each, added up, fitted to outputs at the end; a share
    `outliers` of its columns at 8 bits."""
    config.sketch(layer.approx)
    target = base_target(layer)
    factor, notes = feedback_factor(layer.inputs, config.damping) if fed_back else (None, ())
    hessian = metric(layer.inputs, target, config.damping)
    energy = hessian.diagonal()
    cost = energy if factor is None else 1 / factor.diagonal().square()  # of a squared error in a column
    precise_columns = largest(target.square().sum(0) * cost, outlier_count(target.shape[1], outliers))
    random = generator(config.method, layer.name)
    books = fit_codebooks(target, torch.where(precise_columns, 0.0, cost), entries, length, random)
    vectors = Vectors(books, factor, energy)
    projection: Projection = vectors
    if bool(precise_columns.any()):
        chosen = precise_columns[:, None].expand(-1, len(target))
        precise = GridPoints(KEPT, len(precise_columns), energy)
        projection = Selection(
            precise, vectors, lambda now, start: chosen[start : start + len(now)], len(precise_columns), columns
        )
    base = feedback(target, factor, projection)
    return with_base(layer, refit_scales(base, target, hessian), notes)


def fit_codebooks(
    target: Tensor, importance: Tensor, entries: Sequence[int], length: int, random: torch.Generator
) -> tuple[Codebook, ...]:
    """Codebooks for `target [out, in]`, each fitted to what those before it leave, squared errors counted by the
    `importance [in]` of their columns (0: left out); scales are the root mean squares of rows, codes are yet to choose.
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
    """Columns that are kept."""
    return round(width * share)


def codebook_sketch(approx: Weight, entries: Sequence[int], length: int, outliers: float) -> Weight:
    """Return what `coded` leaves, without values. Raises RecipeError where an earlier step made a base."""
    base, term = base_and_term(approx)
    if not isinstance(base, Dense):
        raise RecipeError(f"a codebook stores every weight, so it does not go after {describe(base)}; drop one")
    rows, width = shape(base)
    codes = torch.empty(rows, -(-width // length), dtype=torch.uint8, device="meta")
    scale = torch.empty(rows, 1, dtype=torch.float16, device="meta")
    parts = [torch.empty(number, length, dtype=torch.float16, device="meta") for number in entries]
    books = sum_of_books([Codebook(codes, centroids, scale, width) for centroids in parts])
    kept = outlier_count(width, outliers)
    if kept:
        index = Columns(torch.arange(width) < kept)
        return join(Where(index, grid_sketch((rows, width), KEPT), books), term)
    return join(books, term)
