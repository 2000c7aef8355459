"""Low-rank terms that are trained in: LoRA (arXiv 2106.09685) as a part of the compressed weight, not beside it.

`add_terms` adds `B A` to the expression of every linear that the recipe names, `B [out, rank]` and `A [rank, in]` in
bfloat16. They train like any low-rank factors, and the checkpoint grows by their bits. Factors of fewer bits are
rounded after training (`round_terms`), to the grids of methods/solvers/low_rank.py: A per component, and B is then
solved for the rounded A.

A term starts at `zero`, as in LoRA, with A random and B zero, so that nothing changes before the first step; or at
`residual`, the truncated SVD of the compressed weight's error (as in LoftQ, arXiv 2310.08659). The size of A's numbers
is chosen so that B's first step, `rate` in every element, changes the product by `rate` times the size of the weight's
own numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmcompress.errors import RecipeError, list_names
from llmcompress.methods.layer import Layer, base_and_term
from llmcompress.methods.low_rank.factors import SVD, svd
from llmcompress.methods.moments import Moments
from llmcompress.models.dense.blocks import matched_blocks, original_name
from llmcompress.models.dense.experts import experts_of, holder, unfuse
from llmcompress.recipe.rules import matches
from llmcompress.recipe.sections import Adaptation
from llmcompress.runtime.seeding import generator
from llmcompress.weight.algebra import add_term, split_components, term_ends
from llmcompress.weight.expression import dense
from llmcompress.weight.modules import CompressedLinear, Multiplying, compressed_linears, put
from llmcompress.weight.nodes import Dense, LowRank, Sum, Weight, shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def add_terms(
    model: PreTrainedModel, options: Adaptation, teacher: Callable[[], PreTrainedModel], seed: int
) -> tuple[str, ...]:
    """Add a term to each compressed linear of `model` that `options` match, except the head; return their names.

    `teacher`: gives the dense model, for terms that start at the residual. Raises RecipeError for a pattern that
    matches nothing, and for a rank that is larger than a matrix.
    """
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in compressed_linears(model).items() if layer is not head}
    for pattern in options.match:
        if not any(matches(pattern, name) for name in layers):
            raise RecipeError(
                f'adapt matches no compressed linear of the student ("{pattern}"); it has {list_names(layers)}'
            )
    chosen = [name for name in layers if any(matches(pattern, name) for pattern in options.match)]
    targets = teacher_weights(model, teacher()) if options.start == "residual" else None
    for name in chosen:
        layer, target = layers[name], None if targets is None else targets(name)
        earlier = len(list(term_ends(layer.expression())))  # a second draw of the same rows would add nothing
        random = generator(seed, "adapt", name, *([earlier] if earlier else []))
        term = _starting_term(name, layer.dequantize(), options.rank, target, random)
        put(model, name, CompressedLinear.of(add_term(layer.expression(), term), layer.bias, layer.layout.inputs))
    return tuple(chosen)


@torch.no_grad()
def round_terms(
    layers: Mapping[str, Multiplying], adapted: Iterable[str], options: Adaptation, nested: Sequence[int] = ()
) -> dict[str, CompressedLinear]:
    """Return the layers named `adapted` with the factors of their last term rounded to the bits of `options`; none
    for bfloat16. `nested`: sizes that learned together, whose components are not mixed."""
    if options.factor_bits == 16:
        return {}
    linears = {}
    for name in adapted:
        layer = layers[name]
        match layer, layer.expression():
            case CompressedLinear(), (Sum((*_, LowRank())) | LowRank()) as whole:
                stored = _round_last(name, whole, options, nested)
                linears[name] = CompressedLinear.of(stored, layer.bias, layer.layout.inputs)
            case _, other:
                raise TypeError(f"{name} has no low-rank term to round, it is a {type(other).__name__}")
    return linears


def _round_last(name: str, w: Sum | LowRank, options: Adaptation, nested: Sequence[int]) -> Weight:
    """Return a weight with its last term rounded. `w` is nothing else beside a matrix in common with others."""
    parts = w.parts if isinstance(w, Sum) else (w,)
    *_, (_, end) = term_ends(w)
    apart = split_components(parts[-1], [rank - (end - options.rank) for rank in nested])
    terms = [term for term in (apart.parts if isinstance(apart, Sum) else (apart,)) if isinstance(term, LowRank)]
    stored = [_best_term(name, dense(term), shape(term.left)[1], options.factor_bits) for term in terms]
    return Sum((*parts[:-1], *stored)) if len(parts) + len(stored) > 2 else stored[0]


def dense_weight(model: PreTrainedModel, name: str) -> Tensor:
    """Return the matrix `[out, in]`, float32, of the linear `name` of a model, which may be compressed."""
    module = model.get_submodule(name)
    if isinstance(module, CompressedLinear):
        return module.dequantize()
    weight = module.get_parameter("weight").detach().float()
    return weight if isinstance(module, nn.Linear) else weight.T


def teacher_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> Callable[[str], Tensor]:
    """Return a function from the name of a student's compressed linear to the teacher's matrix `[out, in]`, float32.

    Raises RecipeError if the models' blocks do not match; the function raises it for a matrix that the teacher lacks,
    or of another shape, and for one of experts that are not as many. The experts of `teacher` become linears, as those
    of a compressed student are.
    """
    unfuse(teacher)
    blocks, layers = matched_blocks(student, teacher), compressed_linears(student)
    own, counted, theirs = experts_of(student), experts_of(teacher), {name for name, _ in teacher.named_modules()}

    def weight(name: str) -> Tensor:
        original, layer = original_name(student, name, blocks), layers[name]
        here, there = (holder(path, experts) for path, experts in ((name, own), (original, counted)))
        counts = {experts[place].num_experts for experts, place in ((own, here), (counted, there)) if place}
        if len(counts) > 1 or original not in theirs:
            raise RecipeError(
                f"the teacher has no {name}, or other experts there; start latents at codes, and terms and weights at "
                f"zero"
            )
        matrix = dense_weight(teacher, original)
        if tuple(matrix.shape) != (layer.out_features, layer.in_features):
            raise RecipeError(f"{name} is not as large as the teacher's; start its latents at codes, its terms at zero")
        return matrix

    return weight


def _starting_term(name: str, value: Tensor, rank: int, target: Tensor | None, random: torch.Generator) -> LowRank:
    """Return the term that a linear of the weight `value [out, in]` starts with."""
    out, width = value.shape
    if rank > min(out, width):
        raise RecipeError(f"adapt: rank {rank} is larger than the matrix [{out}, {width}] of {name}; lower it")
    if target is not None:
        return _best_term(name, target.to(value.device) - value, rank, 16)
    size = (float(value.square().mean().sqrt()) or 1.0) / math.sqrt(rank)
    right = torch.randn(rank, width, dtype=torch.float32, generator=random) * size
    left = torch.zeros(out, rank, dtype=torch.bfloat16)
    return LowRank(Dense(left.to(value.device)), Dense(right.to(value.device, torch.bfloat16)))


def _best_term(name: str, matrix: Tensor, rank: int, factor_bits: Literal[4, 8, 16]) -> LowRank:
    """Return the truncated SVD of a matrix `[out, in]`, as stored factors."""
    nothing = Layer(name, matrix, Dense(torch.zeros_like(matrix)), Moments(0.0))
    term = base_and_term(svd(nothing, SVD(rank=rank, factor_bits=factor_bits)).approx)[1]
    if term is None:
        raise TypeError(f"{name}: svd gave no low-rank term")
    return term
