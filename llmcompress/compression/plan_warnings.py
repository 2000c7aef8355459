"""What a plan and a report warn of: what stays dense, what other engines cannot read, what nobody measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from llmcompress.errors import listed
from llmcompress.methods.layer import methods
from llmcompress.models.auto_class import is_causal
from llmcompress.weight.modules import is_plain_table

if TYPE_CHECKING:
    from llmcompress.compression.plan import Job

DENSE_SHARE = 0.25  # of the weight files: more than that is worth a line


def warnings(job: Job) -> tuple[str, ...]:
    """Return warnings before a run: patterns that match nothing, and linears that stay dense."""
    shadowed = [f"pattern {pattern!r} matches only layers of earlier rules" for pattern in job.assignment.shadowed]
    dense = [name for name in job.assignment.steps if name not in job.steps]
    outside = [linear.name for linear in job.arch.outside if not _is_compressed(job, linear.name)]
    left = [f"{name} stays dense" for name in (*dense, *_parts(outside, job.arch.stack), *job.arch.other)]
    return (
        *job.source.notes,
        *job.assignment.complaints,
        *job.assignment.notes,
        *shadowed,
        *left,
        *_ragged(job),
        *_without_data(job),
        *_ungated(job),
    )


def mostly_dense(job: Job, kept: int, total: int) -> tuple[str, ...]:
    """Return a sentence if `kept` of the `total` bytes stay dense and that is much: what they are, and which setting
    compresses them."""
    if kept <= DENSE_SHARE * total:
        return ()
    source, arch, recipe = job.source, job.arch, job.recipe
    tables = [name for name in (arch.embedding, arch.head) if _could_be_compressed(job, name)]
    linears = [name for name in arch.linears() if name not in job.steps]
    said = f"{kept / 1e6:.1f} of {total / 1e6:.1f} MB stay dense"
    by_size = max((tables, linears), key=lambda names: sum(source.tensors[f"{name}.weight"].bytes for name in names))
    if not by_size:
        return (f"{said}; nothing of it can be compressed",)
    size = sum(source.tensors[f"{name}.weight"].bytes for name in by_size)
    said = f"{said}, {size / 1e6:.1f} of it in {listed(by_size)}"
    if by_size is linears:
        return (f"{said}; a rule that matches them compresses them",)
    steps = "{method: rtn, bits: 4, group_size: 64}"
    if recipe.calibration is not None:
        steps = "{method: rotate}, {method: gptq, bits: 4}"
    key = "head" if arch.embedding in job.tables else "embeddings"
    more = ", and a target of bytes (--size) chooses for them too" if recipe.target is not None else ""
    return (f"{said}; --set '{key}=[{steps}]' compresses them{more}",)


def _could_be_compressed(job: Job, name: str) -> bool:
    """True if the token table or the output head `name` stays dense and need not."""
    if name in job.tables or f"{name}.weight" not in job.source.tensors or not is_causal(job.source.config):
        return False
    return name != job.arch.embedding or is_plain_table(job.source.skeleton().get_input_embeddings())


def _ungated(job: Job) -> tuple[str, ...]:
    """Return a sentence if the recipe has gates of quality that cannot be measured."""
    if not job.recipe.gates.of_quality or job.ungated is None:
        return ()
    return (unmeasured(job.ungated),)


def unmeasured(reason: str) -> str:
    """Return the warning for a model whose quality nobody has measured."""
    return f"gates: nobody measures how far the model is from the dense one, since {reason}"


def _parts(names: Sequence[str], stack: str) -> Iterator[str]:
    """Yield the parts of a model that linears outside of its blocks are in, as the tower for images, with their count.

    `stack`: the module path of the blocks.
    """
    parts: dict[str, int] = {}
    for name in names:
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(name.split("."), stack.split("."), strict=False))
        part = ".".join(name.split(".")[: len(list(shared)) + 1])
        parts[part] = parts.get(part, 0) + 1
    for part, count in parts.items():
        yield f"{part} ({count} linears)" if count > 1 else part


def _ragged(job: Job) -> Iterator[str]:
    """Yield a sentence for each matrix whose width is no multiple of its group size."""
    widths = {name: linear.shape[1] for name, linear in job.arch.linears().items()}
    widths |= {name: job.source.tensors[f"{name}.weight"].shape[1] for name in job.tables}
    for name, steps in (job.steps | job.tables).items():
        sizes = {getattr(step, "group_size", None) or widths[name] for step in steps}
        for size in sorted(size for size in sizes if widths[name] % size):
            stored = (
                f"the last of its groups has {widths[name] % size}" if size < widths[name] else "a row is one group"
            )
            yield (
                f"{name}: group_size {size} does not divide its width {widths[name]}, so {stored}, which few other "
                f"engines read; {max(one for one in range(1, size + 1) if widths[name] % one == 0)} divides it"
            )


def _without_data(job: Job) -> tuple[str, ...]:
    """Return a sentence if methods that can learn from data have none."""
    used = {step.method for steps in (job.steps | job.tables).values() for step in steps}
    able = sorted(name for name in used if methods()[name].needs)
    if job.recipe.calibration is not None or not able:
        return ()
    return (f"without calibration, {', '.join(able)} can use only the weights, not the inputs of layers",)


def _is_compressed(job: Job, name: str) -> bool:
    """True if the linear `name`, which is outside the blocks, is or shares a table that is compressed."""
    return name in job.tables or (job.arch.tied and name == job.arch.head and job.arch.embedding in job.tables)
